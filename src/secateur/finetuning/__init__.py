"""Fine-tuning with transformers' Trainer, and the metrics of tasks."""
