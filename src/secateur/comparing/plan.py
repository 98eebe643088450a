"""What a comparison is made of: its settings, and the runs that follow from them."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field, fields, replace
from typing import get_args

from secateur.comparing.protocols import DEFAULT_PROTOCOL, PROTOCOLS, Protocol
from secateur.errors import invalid
from secateur.scorers import SCORERS, scorer_class
from secateur.settings import Restore
from secateur.support.checks import check_whole
from secateur.support.defaults import COMPARISON_SEEDS, COMPARISON_TEXTS, DISTILLATION_STEPS, PRUNING_RATIO
from secateur.units.select import Allocation

DENSE = "dense"
"""What stands in the place of a scorer where nothing is pruned."""


@dataclass(frozen=True)
class Settings:
    """Everything that a comparison's numbers depend on.

    `data` names tasks as `load_task` takes them, each with train and dev. A run's seed draws its `num_texts`
    calibration texts from the training texts (with their labels, for scorers that need those), its training texts, the
    classification head and their order: dense and pruned runs of one seed are pairs. `threads` is the number of CPU
    threads of one run: another number rounds otherwise, so it belongs to the settings. `pruners` maps scorers to their
    meta-pruners, where those that ship are not meant; `{task}` in a place becomes the task's name, for a pruner of each
    task. `max_train` lowers the protocol's number of training texts; `learning_rate` and `epochs` take the place of the
    protocol's, for models that its own do not train to their best. `bf16` trains as `finetune` does with it.
    `restore` says what happens between pruning and fine-tuning: "reconstruct" refits the output projections of the kept
    heads on the calibration texts, as `reconstruct_` does; "distill" does so too, and then lets `distill_` teach the
    pruned model what the dense one computes, in `steps` updates on the texts of the whole train split, without labels.

    Raises `InvalidInputError` for values outside their ranges and for names that repeat.
    """

    model: str
    data: tuple[str, ...]
    scorers: tuple[str, ...]
    ratios: tuple[float, ...] = (PRUNING_RATIO,)
    seeds: int = COMPARISON_SEEDS
    protocol: str = DEFAULT_PROTOCOL
    allocation: Allocation = "uniform"
    num_texts: int = COMPARISON_TEXTS
    threads: int = 1
    pruners: dict[str, str] = field(default_factory=dict)
    max_train: int | None = None
    learning_rate: float | None = None
    epochs: float | None = None
    bf16: bool = False
    restore: Restore = "none"
    steps: int = DISTILLATION_STEPS

    def __post_init__(self) -> None:
        self._check_cells()
        self._check_training()
        if self.restore not in get_args(Restore):
            raise invalid("restore", f"be one of {', '.join(get_args(Restore))}", self.restore)
        for scorer in self.pruners:
            if scorer not in self.scorers or "pruner" not in inspect.signature(scorer_class(scorer)).parameters:
                raise invalid("pruners", "go with scorers of the comparison that take a meta-pruner", scorer)

    def _check_cells(self) -> None:
        for name in ("data", "scorers", "ratios"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise invalid(name, "name at least one, each once", values)
        for scorer in self.scorers:
            if scorer not in SCORERS:
                raise invalid("scorers", f"be among {', '.join(sorted(SCORERS))}", scorer)
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise invalid("ratios", "lie between 0 and 1", ratio)

    def _check_training(self) -> None:
        for name in ("seeds", "num_texts", "threads", "max_train"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise invalid(name, "be at least 1", getattr(self, name))
        check_whole("steps", self.steps)
        for name in ("learning_rate", "epochs"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise invalid(name, "be above 0", getattr(self, name))
        if self.protocol not in PROTOCOLS:
            raise invalid("protocol", f"be one of {', '.join(PROTOCOLS)}", self.protocol)

    @property
    def training(self) -> Protocol:
        """How runs train: the protocol with what these settings put in its place."""
        protocol = PROTOCOLS[self.protocol]
        limits = [limit for limit in (protocol.max_train, self.max_train) if limit is not None]
        return replace(
            protocol,
            max_train=min(limits, default=None),
            learning_rate=self.learning_rate or protocol.learning_rate,
            epochs=self.epochs or protocol.epochs,
        )


CELLS = ("data", "scorers", "ratios", "seeds")
"""Settings that say which runs there are; more of them only add runs to those of a comparison that goes on."""

COMMON = tuple(each.name for each in fields(Settings) if each.name not in CELLS)
"""Settings that runs must have in common for their rows to be set side by side."""


@dataclass(frozen=True)
class Run:
    """One cell of a comparison; the dense model is the scorer `dense` at ratio 0."""

    data: str
    scorer: str
    ratio: float
    seed: int


def plan(settings: Settings) -> list[Run]:
    """Return every run, seed by seed, so that a comparison that is stopped early has whole seeds."""
    cells = [(DENSE, 0.0)] + [(scorer, ratio) for ratio in settings.ratios for scorer in settings.scorers]
    return [
        Run(data, scorer, ratio, seed)
        for seed in range(settings.seeds)
        for data in settings.data
        for scorer, ratio in cells
    ]


def scorings_of(runs: list[Run]) -> list[Run]:
    """Return what must be scored for `runs`, each once: for all ratios together where the scorer allows it."""
    pruned = [run for run in runs if run.scorer != DENSE]
    return list(
        dict.fromkeys(run if scorer_class(run.scorer).needs_ratio else replace(run, ratio=0.0) for run in pruned)
    )
