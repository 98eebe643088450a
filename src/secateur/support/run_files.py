"""What lies where in the folders that runs leave: what one command writes, others read under the same name."""

from __future__ import annotations

PRUNING = "pruning_report.json"
ATTENTION_MAPS = "attention_maps.json"
DISTILLATION = "distillation.json"
FINETUNING = "finetune_result.json"
PAGE = "report.html"
CARD, CARD_BESIDE = "README.md", "PRUNING.md"
"""The model card, and its name where the folder has one from elsewhere."""

PRUNED = "pruned"
"""In a demo's folder, half of the model."""
HEADS = "heads"
"""In a demo's folder, the model with half of its heads."""
RESULT = "result.json"
"""In a demo's folder, its numbers."""

SETTINGS = "settings.json"
"""In a folder that grows with the work, what all of it is made with."""
ROWS = "runs.jsonl"
SCORES = "scores"
"""In a comparison's folder, a line for each run, and the folder of `scores_stem`."""

LOG = "log.jsonl"
PRUNER = "pruner"
BEST = "best"
"""In a meta-training's folder, the pruner that did best on held-out texts."""
SAMPLES = "samples"
CHECKPOINT = "checkpoint-"
"""In a meta-training's folder; the number of updates follows."""

DATA = "data"
META_TRAINING = "meta-training"
COMPARISON = "comparison"
TABLE = "results.md"
NUMBERS = "results.json"
"""In a reproduction's folder: the demo's sentences where these serve, its two parts, and what they give."""


def scores_stem(task: str, scorer: str, seed: int, ratio: float | None = None) -> str:
    """Return the name, less the ending, of a comparison's scores; `ratio` where they are good for one alone."""
    return "-".join([task.replace("/", "-"), scorer, *([] if ratio is None else [f"{ratio:g}"]), str(seed)])
