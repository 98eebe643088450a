"""What a pruning says of itself: plain values, and the file that they are written to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from secateur.choosing.budget import BudgetOutcome
from secateur.measuring.cost import ModelCost
from secateur.removal.proof import TOLERANCE
from secateur.report import render_report
from secateur.report.reading import pruning_data
from secateur.restoring.quality import Quality
from secateur.sites.attention_maps import AttentionMaps
from secateur.sites.packing import pack
from secateur.support.files import write_text
from secateur.support.versions import environment
from secateur.units.grid import grid_html
from secateur.units.masks import Mask, is_within
from secateur.units.scores import Scores


@dataclass(frozen=True)
class PruningReport:
    """What a pruning did and what it cost: plain values, ready for JSON.

    `pruning_ratio` is the fraction of the heads present before that went; `before` and `after` count heads, parameters
    and multiply-accumulates; `num_texts` were scored, and where scoring stopped by itself, `agreement` is the share of
    heads of which it is 95% sure; `budget` is what was asked for and reached where there was one, for which
    `requested_ratio` was found; `max_difference` is the proof's (float32, at most `tolerance`). `refinement` holds the
    relational KL of every mask that was tried to improve the one that the scores gave, which comes first; `mask` is the
    best of them. `reconstruction` holds the relational KL of that mask without reconstruction and with it, where it was
    done, and `distillation` that before and after `steps` updates, on texts of its own; `quality` is what is left
    of the model on texts held out; `left_out` says, in a line each, which steps were not taken and why. `command` is
    the command line that asked for it, where one did. `attention_maps` are those of the model before, where they were
    asked for; they have a file of their own. A notebook shows the units as a grid; `to_html` has the whole page.
    """

    model: str
    scorer: str
    allocation: str
    requested_ratio: float
    seed: int
    num_texts: int
    mask: Mask
    scores: Scores
    before: ModelCost
    after: ModelCost
    max_difference: float
    scoring_seconds: float
    agreement: float | None = None
    budget: tuple[BudgetOutcome, ...] = ()
    units: dict[str, tuple[int, int]] = field(default_factory=dict)
    refinement: tuple[float, ...] = ()
    reconstruction: tuple[float, ...] = ()
    distillation: tuple[float, ...] = ()
    steps: int = 0
    quality: Quality | None = None
    left_out: tuple[str, ...] = ()
    tolerance: float = TOLERANCE
    versions: dict[str, str] = field(default_factory=environment)
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))
    command: str = ""
    attention_maps: AttentionMaps | None = None

    @property
    def pruning_ratio(self) -> float:
        """Fraction of the heads present before that were removed."""
        return 1 - self.after.heads / max(self.before.heads, 1)

    def __str__(self) -> str:
        """Say in one line what was kept."""
        if set(self.units) <= {"heads"}:
            kept = f"kept {self.after.heads} of {self.before.heads} heads (pruning ratio {self.pruning_ratio:.2f})"
        else:
            kept = "kept " + ", ".join(f"{after} of {before} {kind}" for kind, (before, after) in self.units.items())
        return ", ".join([kept, *map(str, self.budget)])

    def __repr__(self) -> str:
        """Say in one line what of which model was kept."""
        return f"PruningReport({self.model!r}: {self})"

    def _repr_html_(self) -> str:
        """Return the grid of units that a notebook shows; a layer that went kept none of its units."""
        gone = self._layers_gone()
        kept = {site: row & (not is_within(site, gone)) for site, row in self.mask.items()}
        return grid_html(repr(self), kept, self.scores)

    def to_html(self) -> str:
        """Return the page that `prune(out=…)` saves as report.html, a file that loads nothing.

        It has all but the lines that load the folder, which the report does not know.
        """
        maps = None if self.attention_maps is None else self.attention_maps.to_json()
        return render_report([pruning_data(self.to_json(), maps)])

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; a layer that went kept none of its units."""
        gone = self._layers_gone()
        kept = {site: [] if is_within(site, gone) else units for site, units in self.mask.kept.items()}
        return {
            "kind": "pruning_report",
            "model": self.model,
            "scorer": self.scorer,
            "allocation": self.allocation,
            "requested_ratio": self.requested_ratio,
            "pruning_ratio": self.pruning_ratio,
            "seed": self.seed,
            "num_texts": self.num_texts,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "max_difference": self.max_difference,
            "tolerance": self.tolerance,
            "scoring_seconds": self.scoring_seconds,
            "agreement": self.agreement,
            "budget": [outcome.to_json() for outcome in self.budget],
            "units": {kind: list(counts) for kind, counts in self.units.items()},
            "refinement": list(self.refinement),
            "reconstruction": list(self.reconstruction),
            "distillation": list(self.distillation),
            "steps": self.steps,
            "quality": None if self.quality is None else self.quality.to_json(),
            "left_out": list(self.left_out),
            "scores": self._of_heads(self.scores.to_json()["scores"]),
            "kept_heads": self._of_heads(kept),
            "kept_neurons": {site: pack(units) for site, units in kept.items() if self._kind(site) == "neurons"},
            "kept_layers": {site: units for site, units in kept.items() if self._kind(site) == "layers"},
            "blocks": {
                site: {"kind": self._kind(site), "kept": len(units), "of": self.mask[site].numel()}
                for site, units in kept.items()
                if self._kind(site) != "heads"
            },
            "versions": self.versions,
            "created": self.created,
            "command": self.command,
        }

    def _layers_gone(self) -> list[str]:
        """Return the paths of the layers that went, by the names that they had in the model before."""
        lists = {site: self.mask[site] for site in self.mask if self._kind(site) == "layers"}
        there = {site: self.scores[site] > -math.inf for site in lists}  # not since an earlier pruning
        return [
            f"{site}.{number}"
            for site, row in lists.items()
            for number, stays in enumerate(row[there[site]].tolist())
            if not stays
        ]

    def _kind(self, site: str) -> str:
        return self.scores.kinds.get(site, "heads")

    def _of_heads(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        return {site: row for site, row in rows.items() if self._kind(site) == "heads"}

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(path, json.dumps(self.to_json(), indent=1))
