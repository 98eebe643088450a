"""How long a pruning will take here: a pass and a training step are timed, and what is planned is counted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from secateur.choosing.by_cut import SENSITIVITY_TEXTS
from secateur.choosing.sensitivity import LEVELS
from secateur.models.offload import device_of
from secateur.models.state import evaluation_mode, held, random_states_kept
from secateur.pruning_plan import SCORED_TEXTS
from secateur.restoring.reconstruction import RIDGES
from secateur.scorers.base import Scorer
from secateur.settings import Cut, Reading, Restore
from secateur.sites.layout import Site
from secateur.support.defaults import UNITS
from secateur.support.durations import duration
from secateur.texts.calibration import PreparedModel

_WIDTH = 512  # of the matrix that is factored to see how long that takes
_TUNING = 9  # passes of three epochs, a backward pass counted as two


@dataclass(frozen=True)
class Pace:
    """Seconds of a pass of a text, of a training step of it, and of factoring a matrix for each cubed row."""

    forward: float
    step: float
    factor: float

    @classmethod
    def of(
        cls,
        base: PreTrainedModel,
        batch: Mapping[str, Any],
        trains: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Pace:
        """Time one of each, after a pass that warms up; a training step has a forward and a backward pass.

        Where nothing `trains` that step is not made, as its gradients take as much memory as the weights.
        """
        size = len(next(iter(batch.values())))
        matrix = torch.eye(_WIDTH, dtype=torch.float64)
        parameters = [parameter for parameter in base.parameters() if parameter.requires_grad]

        def step() -> None:
            with torch.enable_grad():
                loss = base(**batch)[0].float().square().mean()
                torch.autograd.grad(loss, parameters, allow_unused=True)

        def seconds(run: Callable[[], Any]) -> float:
            start = clock()
            run()
            if device_of(base).type == "cuda":
                torch.cuda.synchronize()
            return clock() - start

        with held(base), evaluation_mode(base), torch.inference_mode(False), random_states_kept(), torch.no_grad():
            base(**batch)
            forward = seconds(lambda: base(**batch)) / size
            training = seconds(step) / size if parameters and trains else 3 * forward
            return cls(forward, training, seconds(lambda: torch.linalg.cholesky(matrix)) / _WIDTH**3)


@dataclass(frozen=True)
class Plan:
    """What a pruning will do: texts that are scored, measured and refitted on, how restored, and a share that stays."""

    scored: int
    passes: int
    measured: int
    refine: int
    fitted: int
    steps: int
    batch_size: int
    widths: Sequence[int]
    kept: float
    reach: float  # share of a pass that it takes to read what a site is given

    def seconds(self, pace: Pace) -> dict[str, float]:
        """Return about how long each phase takes, in seconds; phases that are not planned are missing.

        Sizes of a site are tried from whole to nothing in equal steps. Each takes half of a pass, from its layer on.
        """
        sites, cubes = len(self.widths), sum(width**3 for width in self.widths) * pace.factor
        trials = sum((level / LEVELS) ** 3 for level in range(LEVELS))
        apiece = 0.75 * self.reach + 0.25 * LEVELS / 2  # three of four texts are fitted on; the fourth judges each size
        found = {
            "scoring": self.scored * self.passes * pace.forward,
            "allocation": self.measured * sites * apiece * pace.forward + bool(self.measured) * trials * cubes,
            # An exchange is tried in a pass, and a gradient takes three.
            "refinement": self.scored * (self.refine * 2 + 3 * bool(self.refine)) * pace.forward,
            # Dense, cut and refitted, and each site's moments; two halves are fitted with every ridge.
            "reconstruction": self.fitted * (3 + sites * self.reach) * pace.forward
            + bool(self.fitted) * (2 * len(RIDGES) + 3) * self.kept**3 * cubes,
            "distillation": self.steps * self.batch_size * (pace.forward + self.kept * pace.step),
        }
        return {name: seconds for name, seconds in found.items() if seconds}


def passes_of(criterion: Scorer, units: int) -> int:
    """Return about how many forward passes a criterion takes over its texts, by what it says of itself."""
    count = int(criterion.passes.split()[0].rstrip(","))
    alone = units if "number of heads" in criterion.passes else 0
    backward = 3 if criterion.needs_gradients else 1
    return count * backward + alone + (_TUNING if "fine-tuning" in criterion.passes else 0)


def widths_of(base: PreTrainedModel, sites: Mapping[str, Site]) -> list[int]:
    """Return how many inputs the output projection of each site has that can be refitted."""
    found = []
    for site in sites.values():
        pieces = [p for p in site.slices_of("output") if base.get_parameter(p.parameter).ndim > 1]
        found += [len(piece.owners) for piece in pieces[:1]]
    return found


def in_words(seconds: Mapping[str, float]) -> str:
    """Say how long phases take together and one by one, such as "about 2 min: scoring 10 s, distillation 2 min"."""
    parts = ", ".join(f"{name} {duration(found)}" for name, found in seconds.items())
    return f"about {duration(sum(seconds.values()))}: {parts}"


def planned(
    prepared: PreparedModel,
    texts: Sequence[Any],
    reading: Reading,
    *,
    cut: Cut,
    criteria: Mapping[str, Scorer],
    restore: Restore,
    steps: int,
) -> Plan:
    """Return what a pruning of a prepared model will do on texts in a list."""
    sites = prepared.sites_of(cut.kinds)
    scored = min(len(texts), reading.stop) if isinstance(reading.stop, int) else len(texts)
    units = sum(site.num_units for site in sites.values())
    limits = [budget.limit for budget in cut.budgets if budget.quantity not in UNITS]
    return Plan(
        scored=scored,
        passes=sum(passes_of(criterion, units) for criterion in criteria.values()),
        measured=min(len(texts), SENSITIVITY_TEXTS) if cut.allocation == "sensitivity" else 0,
        refine=cut.refine,
        fitted=min(scored, SCORED_TEXTS) if restore != "none" else 0,
        steps=steps if restore == "distill" else 0,
        batch_size=reading.batch_size,
        widths=widths_of(prepared.base, sites),
        kept=min(limits, default=1 - cut.pruning_ratio),
        reach=_reach(prepared),
    )


def _reach(prepared: PreparedModel) -> float:
    """Return the share of a pass to a site: its layer and the one before it, or half of a pass where there are none."""
    layers = sum(prepared.layers[name].num_units for name in prepared.lists)
    return min(0.5, 2 / layers) if layers else 0.5


def tell_duration(prepared: PreparedModel, texts: Any, reading: Reading, plan: Callable[..., Plan]) -> None:
    """Say on stderr how long a plan will take, made by `planned` with all but the first three of its arguments known.

    Nothing is said where that cannot be timed: the step that fails says why.
    """
    if not isinstance(texts, Sequence):
        return
    try:
        found = plan(prepared, texts, reading)
        pace = Pace.of(prepared.base, prepared.batch(list(texts[: reading.batch_size])), found.steps > 0)
        said = in_words(found.seconds(pace))
    except Exception:
        return
    tqdm.write(said, file=sys.stderr)
