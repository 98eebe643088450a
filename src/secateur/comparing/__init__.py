"""Scorers side by side after fine-tuning, resumable, and what the rows say."""
