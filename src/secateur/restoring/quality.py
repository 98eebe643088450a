"""How much of a model is left, without labels: what it makes of texts that nothing else read, before and after."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.models.state import evaluation_mode, held
from secateur.relations import gated_representations, relational_kl, with_relations
from secateur.restoring.logits import has_classes, learned_logits
from secateur.settings import Reading
from secateur.texts.calibration import PreparedModel, is_pair
from secateur.texts.examples import Example, by_form

MOST_TEXTS = 256


@dataclass(frozen=True)
class Quality:
    """What pruning changed on `num_texts` texts: mean cosine to the dense model's representations, and relational KL.

    1 and 0 = nothing. `relational_kl` is the mean over batches. `agreement` is the share of texts, or of tokens, for
    which a task's head finds the same class likeliest; None for a model without a head that has learned classes.
    """

    cosine: float
    relational_kl: float
    num_texts: int
    agreement: float | None = None

    def __str__(self) -> str:
        """Say it in one line."""
        answers = "" if self.agreement is None else f"answers as the dense model {self.agreement:.1%}, "
        return (
            f"{answers}mean cosine to the dense model {self.cosine:.4f}, relational KL {self.relational_kl:.4f} "
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
        self.model = cast(PreTrainedModel, prepared.model)
        self.base, self.is_pair = prepared.base, is_pair(texts)
        self.batches = with_relations(prepared.batches(by_form(texts), reading.batch_size))
        self.dense = self._representations()
        self.answers = self._answers()

    def __call__(self, gates: Mapping[str, Tensor] | None = None) -> Quality:
        """Compare, under gates `[units]` by site where there are some."""
        pairs = list(zip(self.dense, self._representations(gates), strict=True))
        cosines = torch.cat([torch.cosine_similarity(dense, now, dim=1) for dense, now in pairs])
        losses = [float(relational_kl(dense, now)) for dense, now in pairs]
        agreement = None
        if gates is None and self.answers is not None and (now := self._answers()) is not None:
            agreement = float((now == self.answers).float().mean())
        return Quality(float(cosines.mean()), statistics.fmean(losses), len(cosines), agreement)

    def _representations(self, gates: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        with held(self.base), evaluation_mode(self.base), torch.inference_mode(False), torch.no_grad():
            return [gated_representations(self.base, b, gates or {}, self.is_pair).float().cpu() for b in self.batches]

    def _answers(self) -> Tensor | None:
        """Return the likeliest class of each text, or token, `[rows]`, None without a head that has learned classes."""
        found = []
        with held(self.base), evaluation_mode(self.model), torch.inference_mode(False):
            for batch in self.batches:
                logits = learned_logits(self.model, batch)
                if logits is None or not has_classes(self.model, logits):
                    return None
                found.append(logits.argmax(dim=-1).cpu())
        return torch.cat(found)
