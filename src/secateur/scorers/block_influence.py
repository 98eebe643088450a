"""How much a layer changes the residual stream: one dense pass, whatever the layer is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.state import hooked
from secateur.pruners.tokens import mean_over_tokens
from secateur.scorers.base import Scorer, ScoringTask
from secateur.sites.layers import LayerSite, stream_into, stream_out_of
from secateur.support.threads import in_own_thread
from secateur.texts.batches import Batch


class BlockInfluenceScorer(Scorer):
    """Mean over real tokens, then over texts, of 1 − cos(x, y), x being the stream a layer is given, y what it returns.

    In [0, 2]; a layer that leaves the direction of every token as it was scores 0.
    """

    kinds = frozenset({LayerSite.kind})
    description = "how far a layer turns the residual stream"
    source = "Men et al. 2024 (arXiv 2403.03853)"
    passes = "1"
    texts_apart = True

    @torch.no_grad()
    def score(self, task: ScoringTask) -> dict[str, Tensor]:
        """Stream the batches through the model once."""
        sums = {name: torch.zeros(site.num_units, dtype=torch.float64) for name, site in task.sites.items()}
        count = 0

        def run(batch: Batch) -> tuple[dict[str, Tensor], int]:
            found = {name: torch.zeros(site.num_units, dtype=torch.float64) for name, site in task.sites.items()}
            lists: dict[str, Any] = {name: task.model.get_submodule(name) for name in task.sites}
            with hooked(
                layer.register_forward_hook(in_own_thread(_reader(found[name], number, batch)), with_kwargs=True)
                for name, layers in lists.items()
                for number, layer in enumerate(layers)
            ):
                task.model(**batch)
            return found, len(next(iter(batch.values())))

        for found, texts in task.each(run):
            count += texts
            for name, rows in found.items():
                sums[name] += rows
        return {name: total / max(count, 1) for name, total in sums.items()}


def _reader(found: Tensor, number: int, batch: Batch) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        taken, written = stream_into(args, kwargs), stream_out_of(output)
        assert taken is not None  # the site was found by both
        assert written is not None
        turned = 1 - torch.cosine_similarity(taken.float(), written.float(), dim=-1)  # [batch, …, tokens]
        turned = turned.flatten(1) if turned.ndim > 2 else turned
        mask = batch.get("attention_mask")
        mask = mask if mask is not None and mask.shape == turned.shape else None
        found[number] += mean_over_tokens(turned[..., None], mask)[:, 0].double().sum().cpu()

    return hook
