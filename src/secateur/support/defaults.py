"""Defaults that functions and commands share, where a command can read them without waiting for PyTorch."""

from __future__ import annotations

BATCH_SIZE = 32
MAX_LENGTH = 128
PRUNING_RATIO = 0.5
FLOOR = 1

CALIBRATION_TEXTS = 256
"""Texts that the commands score."""

TEACHING_TEXTS = 50_000
"""Texts that a command reads at most where they teach a smaller model."""

PREVIEW_SHARES = (0.9, 0.75, 0.5, 0.33, 0.25)
"""Of the multiply-accumulates, that a preview tells of."""

COMPARISON_TEXTS = 96
"""Texts that a comparison scores for each task."""

COMPARISON_SEEDS = 3

DISTILLATION_STEPS = 300
DISTILLATION_RATE = 5e-4

FINETUNING_EPOCHS = 3.0
FINETUNING_RATE = 2e-5

BENCHMARK_ROUNDS = 12
BENCHMARK_SHAPES = ("1x128", "8x128", "1x512")
"""Texts x tokens."""

MULTIPLE = 32
"""Neurons that stay at a site are a multiple of so many."""

UNITS = ("heads", "neurons", "layers")
"""Kinds of units."""
