"""How a meta-training went, on the texts that no step sees: at its start, at its best, and at its last look."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.meta_training.runs import CONTRIBUTION, HELD_OUT, read_log
from secateur.support.run_files import LOG


@dataclass(frozen=True)
class Look:
    """One look at the pruner: after how many updates, and the relational KL of its masks by task."""

    step: int
    relational_kl: Mapping[str, float]

    @property
    def mean(self) -> float:
        """The mean over tasks."""
        return statistics.fmean(self.relational_kl.values())


@dataclass(frozen=True)
class Outcome:
    """The first, the best and the last look, and what `contribution`'s masks cost on the same texts, if known."""

    start: Look
    best: Look
    last: Look
    contribution: Mapping[str, float]

    @classmethod
    def of(cls, looks: list[Mapping[str, Any]]) -> Outcome | None:
        """Take the log's lines that tell of held-out texts; None where there are none. The earliest best counts."""
        found = [Look(row["step"], row[HELD_OUT]) for row in looks]
        if not found:
            return None
        known: Mapping[str, float] = next((row[CONTRIBUTION] for row in looks if CONTRIBUTION in row), {})
        return cls(found[0], min(found, key=lambda look: look.mean), found[-1], known)

    @classmethod
    def read(cls, out: Path) -> Outcome | None:
        """Return how the run in a folder went."""
        return cls.of([row for row in read_log(out / LOG) if HELD_OUT in row])
