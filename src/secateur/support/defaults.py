"""Defaults that functions and commands share, where a command can read them without waiting for PyTorch."""

from __future__ import annotations

BATCH_SIZE = 32
MAX_LENGTH = 128
PRUNING_RATIO = 0.5
FLOOR = 1

CALIBRATION_TEXTS = 256
"""Texts that the commands score."""

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

# Of a meta-training; the paper's.
META_STEPS = 6000
META_BATCH_SIZE = 60
META_BATCHES_PER_STEP = 8
META_RATE = 0.02
META_OPTIMIZER = "sgd"
META_SIGNAL = "straight_through"
META_POOL = 0
META_TEMPERATURE = 1.0
META_EVALUATE_EVERY = 100
META_CHECKPOINT_EVERY = 100

# Of teaching a joint pruner.
JOINT_SAMPLES = 2
JOINT_TEXTS = 96
JOINT_SEARCH = 0
JOINT_JUDGES = 8
