"""Borrowing a model of transformers: loading it, its inputs, its state put back, its weights where they lie."""
