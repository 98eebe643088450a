"""A sample: what a dense pass tells about a model's heads on some texts, and what masks cost there; its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from secateur.errors import CheckpointError, invalid, shown
from secateur.pruners.evidence import Evidence
from secateur.pruners.features import FEATURES
from secateur.pruners.writes import FINGERPRINT
from secateur.support.checks import check_mapping, check_whole
from secateur.support.files import write_bytes
from secateur.support.parsing import short

LEAVE_ONE_OUT = 0
"""The set of trials that each drop a single head; the others are numbered from 1, one an allocation and ratio."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Evidence, and trials: `masks` bool `[trials, heads]`, `losses` `[trials]` ≥ 0, `trial_sets` `[trials]`.

    A trial's loss is the relational KL of its mask, divided by that of the one mask that its set shares. So losses are
    comparable within a set alone, of which `trial_sets` holds the number. `found` bool `[found, heads]` are the best
    masks of searches, of which `by_site` bool `[found]` tells those that had to leave as many heads at every site; None
    where there was no search.
    """

    subject: str
    task: str
    evidence: Evidence
    masks: Tensor
    losses: Tensor
    trial_sets: Tensor
    found: Tensor | None = None
    by_site: Tensor | None = None

    @property
    def found_by_ranking(self) -> Tensor:
        """The masks that searches found with heads ranked over the whole model, bool `[ratios, heads]`.

        Raises `InvalidInputError` where there are none.
        """
        if self.found is None or self.by_site is None or bool(self.by_site.all()):
            raise invalid("samples", "hold masks that a search found over the whole model", self.task)
        return self.found[~self.by_site]

    def save(self, path: str | Path) -> None:
        """Write as safetensors, whole or not at all."""
        tensors = {
            "features": self.evidence.features,
            "likeness": self.evidence.likeness,
            "masks": self.masks.to(torch.uint8),
            "losses": self.losses,
            "groups": self.trial_sets,
        }
        if self.evidence.fingerprints is not None:
            tensors["fingerprints"] = self.evidence.fingerprints
        if self.found is not None and self.by_site is not None:
            tensors |= {"found": self.found.to(torch.uint8), "by_site": self.by_site.to(torch.uint8)}
        about = {
            "subject": self.subject,
            "task": self.task,
            "heads": json.dumps(self.evidence.heads),
            "columns": ",".join(FEATURES),
        }
        write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, about))

    @classmethod
    def load(cls, path: str | Path) -> Sample:
        """Read what `save` wrote. Raises `CheckpointError` for anything else, and for evidence of other columns."""
        try:
            with safe_open(path, "pt") as file:
                about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise _no_sample(path, short(error)) from None
        if (about or {}).get("columns") != ",".join(FEATURES):
            raise CheckpointError(f"{path} holds evidence of another version; remove it, and it is collected again")
        try:
            heads = json.loads(about["heads"])
            _check_shapes(tensors, heads)
            subject, task = about["subject"], about["task"]
        except (KeyError, ValueError, RecursionError) as error:
            raise _no_sample(path, f"{type(error).__name__} {short(error)}") from None
        found, by_site = (tensors[name].bool() if name in tensors else None for name in ("found", "by_site"))
        return cls(
            subject=subject,
            task=task,
            evidence=Evidence(
                tensors["features"], tensors["likeness"], heads, fingerprints=tensors.get("fingerprints")
            ),
            masks=tensors["masks"].bool(),
            losses=tensors["losses"],
            trial_sets=tensors["groups"],
            found=found,
            by_site=by_site,
        )


def _check_shapes(tensors: Mapping[str, Tensor], heads: Any) -> None:
    """Raise `ValueError` where tensors of a sample do not fit each other, `KeyError` where one is missing."""
    check_mapping("heads", heads)
    for site, count in heads.items():
        check_whole(f"heads[{shown(site)}]", count, 0)
    total, (trials, *_) = sum(heads.values()), (*tensors["masks"].shape, 0)
    wanted: dict[str, tuple[int, ...]] = {
        "features": (total, len(FEATURES)), "likeness": (total, total), "masks": (trials, total), "losses": (trials,),
        "groups": (trials,),
    }  # fmt: skip
    if "found" in tensors or "by_site" in tensors:
        count = len(tensors["by_site"]) if tensors["by_site"].ndim else 0
        wanted |= {"found": (count, total), "by_site": (count,)}
    if "fingerprints" in tensors:
        wanted["fingerprints"] = (total, FINGERPRINT)
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise invalid(name, f"have the shape {list(shape)}", list(tensors[name].shape))


def _no_sample(path: str | Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} holds no sample: {reason}; remove it, and it is collected again")
