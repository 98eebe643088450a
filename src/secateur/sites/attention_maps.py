"""Mean attention maps of every head, small enough to keep beside a pruned model and to show on a page."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UnsupportedModelError
from secateur.models.base_model import base_of
from secateur.models.state import evaluation_mode
from secateur.sites.gating import HeadReading, probe
from secateur.sites.layout import AttentionSite
from secateur.support.files import write_text
from secateur.support.interrupts import interruptible

MAX_TEXTS = 16
MAX_TOKENS = 32
MAX_BYTES = 1_000_000
"""Of all maps of a model, a byte a weight: models with more than 976 heads get fewer tokens."""


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Site name → mean attention maps of the heads that are there, `[heads, tokens, tokens]` in [0, 1].

    Entry [h, i, j] is how much head `heads[site][h]` (original numbering) lets token i look at token j, the mean over
    those of the `texts` that have a token i. A row adds up to 1 less what goes to later tokens than the last one here.
    `reason` says why there are no maps, where there are none.
    """

    maps: Mapping[str, Tensor]
    heads: Mapping[str, list[int]]
    texts: int = 0
    tokens: int = 0
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data: a byte a weight, in base64, times `peaks` of the head / 255."""
        sites = {}
        for site, maps in self.maps.items():
            peaks = maps.amax(dim=(1, 2)).clamp_min(1e-9)
            levels = (maps / peaks[:, None, None] * 255).round().to(torch.uint8)
            sites[site] = {
                "heads": self.heads[site],
                "peaks": [float(f"{peak:.4g}") for peak in peaks.tolist()],
                "levels": base64.b64encode(levels.numpy().tobytes()).decode("ascii"),
            }
        return {
            "kind": "attention_maps",
            "texts": self.texts,
            "tokens": self.tokens,
            "reason": self.reason,
            "sites": sites,
        }

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(path, json.dumps(self.to_json()))


@interruptible
@torch.no_grad()
def mean_maps(model: nn.Module, sites: Mapping[str, AttentionSite], batch: Mapping[str, Tensor]) -> AttentionMaps:
    """Run one batch of texts, keyword arguments of the base model's forward, and average every head's maps.

    Counted are the real tokens of each text from its first one on: as many as half of the texts have, at most
    `MAX_TOKENS`, and no more than `MAX_BYTES` allows. Where the model computes no maps, the result has none and says
    why. The model is left as it was.
    """
    base = base_of(model)
    mask = batch.get("attention_mask")
    texts, length = next(iter(batch.values())).shape[:2]
    lengths = sorted(([length] * texts if mask is None else mask.sum(dim=1).tolist()), reverse=True)
    fitting = math.isqrt(MAX_BYTES // max(1, sum(site.num_units for site in sites.values())))
    tokens = max(1, min(MAX_TOKENS, int(lengths[(texts - 1) // 2]), fitting))
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    def add(reading: HeadReading) -> None:
        weights = reading.weights
        if weights is None or len(weights) != texts or min(weights.shape[2:]) < tokens:
            return  # such as attention within windows
        queries, there = _first_tokens(mask, weights.shape[2], texts, tokens)
        keys, _ = _first_tokens(mask, weights.shape[3], texts, tokens)
        rows = torch.arange(texts)[:, None, None]
        chosen = weights.float().cpu()[rows, :, queries[:, :, None], keys[:, None, :]]  # [texts, queries, keys, heads]
        total = (chosen * there[:, :, None, None]).sum(dim=0).permute(2, 0, 1)
        sums[reading.site] = sums.get(reading.site, 0) + total
        counts[reading.site] = counts.get(reading.site, 0) + there.sum(dim=0)

    try:
        with evaluation_mode(base), probe(base, add, weights=True):
            base(**batch)
    except UnsupportedModelError as error:
        return AttentionMaps({}, {}, reason=str(error).partition(";")[0])
    maps = {site: total / counts[site].clamp_min(1)[None, :, None] for site, total in sums.items() if len(total)}
    heads = {site: list(sites[site].units) for site in maps}
    return AttentionMaps(maps, heads, texts, tokens, "" if maps else "no site attends over whole texts")


def _first_tokens(mask: Tensor | None, length: int, texts: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Return where the first real tokens of each text are, and 1 for each that there is: both `[texts, tokens]`."""
    if mask is None or mask.shape != (texts, length):
        return torch.arange(tokens).expand(texts, -1), torch.ones(texts, tokens)
    values, places = torch.sort((mask > 0).int().cpu(), dim=1, descending=True, stable=True)
    return places[:, :tokens], values[:, :tokens].float()
