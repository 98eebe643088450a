"""What a pruner remembers of a model that it was fitted on: which heads good masks for other tasks keep.

On one model the best masks of different tasks are more alike than the evidence of any one task tells. Heads are known
again by the weights of their output projection: after fine-tuning, in another precision, under another name, and when
others of the model are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from secateur.pruners.evidence import Evidence, contribution_scores
from secateur.pruners.features import IS_PAIR
from secateur.pruners.writes import FINGERPRINT

KNOWN = 0.9  # mean correlation with a known model's heads; the closest heads of unlike models come to 0.4
SHARPNESS = 40.0  # for single texts: a sample counts e times as much where contributions correlate 1/40 more


class KnownModel(nn.Module):
    """What good masks keep of the `heads` heads of one model, in `samples` samples.

    `fingerprints` `[heads, FINGERPRINT]` tell the heads apart. Of each sample: `kept` `[samples, heads]` in [0, 1] is
    the share of its good masks that keep a head, `contributions` `[samples, heads]` is the log of how much each head
    writes on its texts, and `pairs` bool `[samples]` tells whether these are pairs.
    """

    fingerprints: Tensor
    kept: Tensor
    contributions: Tensor
    pairs: Tensor

    def __init__(self, heads: int, samples: int) -> None:
        super().__init__()
        self.register_buffer("fingerprints", torch.zeros(heads, FINGERPRINT))
        self.register_buffer("kept", torch.zeros(samples, heads))
        self.register_buffer("contributions", torch.zeros(samples, heads))
        self.register_buffer("pairs", torch.zeros(samples, dtype=torch.bool))

    @classmethod
    def of(cls, samples: Sequence[tuple[Evidence, Tensor]]) -> KnownModel:
        """Remember a model: `samples` holds the evidence of each, and what its good masks keep, `[heads]`."""
        known = cls(len(samples[0][1]), len(samples))
        known.fingerprints.copy_(cast("Tensor", samples[0][0].fingerprints))
        for number, (evidence, kept) in enumerate(samples):
            known.kept[number] = kept
            known.contributions[number] = contribution_scores(evidence)
            known.pairs[number] = _is_pair(evidence)
        return known

    def recall(self, evidence: Evidence) -> Tensor | None:
        """Return the share of good masks that keep each head, `[heads]`.

        The mean over samples of pairs for pairs; for single texts, which are represented by all their tokens, samples
        on which the heads write as they do here count more. None for another model, and for texts of a form that no
        sample has.
        """
        heads = self._find(evidence.fingerprints)
        alike = self.pairs == _is_pair(evidence)
        if heads is None or not alike.any():
            return None
        kept = self.kept[alike][:, heads]
        if _is_pair(evidence):
            return kept.mean(dim=0)
        here = contribution_scores(evidence).to(kept)
        likeness = correlations(here.unsqueeze(0), self.contributions[alike][:, heads])
        return ((SHARPNESS * likeness).softmax(dim=1) @ kept).squeeze(0)

    def likeness(self, evidence: Evidence) -> float:
        """Return the mean correlation of each head with the closest that is known; -1 where it has no fingerprints."""
        return -1.0 if evidence.fingerprints is None else float(self._closest(evidence.fingerprints)[0].mean())

    def _find(self, fingerprints: Tensor | None) -> Tensor | None:
        """Return which of the known heads each head is; None where they are not the same model's."""
        if fingerprints is None:
            return None
        likeness, heads = self._closest(fingerprints)
        is_known = likeness.mean() >= KNOWN and len(heads.unique()) == len(fingerprints)
        return heads if is_known else None

    def _closest(self, fingerprints: Tensor) -> tuple[Tensor, Tensor]:
        """Return each head's correlation with the closest of the known heads, and which that is."""
        closest = correlations(fingerprints.to(self.fingerprints), self.fingerprints).max(dim=1)
        return closest.values, closest.indices


def _is_pair(evidence: Evidence) -> bool:
    return bool(evidence.features[0, IS_PAIR])


def correlations(rows: Tensor, others: Tensor) -> Tensor:
    """Return the correlation of each row `[n, numbers]` with each of the others `[m, numbers]`, `[n, m]`."""
    one, other = (nn.functional.normalize(x - x.mean(dim=1, keepdim=True), dim=1) for x in (rows, others))
    return one @ other.T
