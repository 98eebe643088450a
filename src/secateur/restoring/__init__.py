"""Making up for what was removed: reconstruction and distillation."""
