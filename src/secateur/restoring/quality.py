"""How much of a model is left, without labels: what it makes of texts that nothing else read, before and after."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.models.state import evaluation_mode, held
from secateur.relations import gated_representations, relational_kl, with_relations
from secateur.settings import Reading
from secateur.texts.calibration import PreparedModel, is_pair
from secateur.texts.examples import Example, by_form

MOST_TEXTS = 256


@dataclass(frozen=True)
class Quality:
    """What pruning changed on `num_texts` texts: mean cosine to the dense model's representations, and relational KL.

    1 and 0 = nothing. `relational_kl` is the mean over batches.
    """

    cosine: float
    relational_kl: float
    num_texts: int

    def __str__(self) -> str:
        """Say both in one line."""
        return (
            f"mean cosine to the dense model {self.cosine:.4f}, relational KL {self.relational_kl:.4f} "
            f"({self.num_texts} texts held out)"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


class QualityJudge:
    """Keeps what a model makes of some texts now, to be compared with what it makes of them once it is pruned.

    Or of rows of ready inputs, each represented by the mean of its last hidden states.
    """

    def __init__(self, prepared: PreparedModel, texts: Sequence[Example], reading: Reading) -> None:
        self.base, self.is_pair = prepared.base, is_pair(texts)
        self.batches = with_relations(prepared.batches(by_form(texts), reading.batch_size))
        self.dense = self._representations()

    def __call__(self, gates: Mapping[str, Tensor] | None = None) -> Quality:
        """Compare, under gates `[units]` by site where there are some."""
        pairs = list(zip(self.dense, self._representations(gates), strict=True))
        cosines = torch.cat([torch.cosine_similarity(dense, now, dim=1) for dense, now in pairs])
        losses = [float(relational_kl(dense, now)) for dense, now in pairs]
        return Quality(float(cosines.mean()), statistics.fmean(losses), len(cosines))

    def _representations(self, gates: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        with held(self.base), evaluation_mode(self.base), torch.inference_mode(False), torch.no_grad():
            return [gated_representations(self.base, b, gates or {}, self.is_pair).float().cpu() for b in self.batches]
