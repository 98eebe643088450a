"""How bad a mask is, by what it does to text representations: no labels, a gated pass for each mask."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from secateur.models.offload import is_offloaded
from secateur.relations import gated_representations, relational_kl, with_relations
from secateur.support.processes import in_order
from secateur.texts.batches import Batch
from secateur.texts.halving import is_out_of_memory
from secateur.units.masks import PresentMask


class MaskLoss:
    """The relational KL of masks on fixed texts; the dense pass is made once.

    The processes of `accelerator`, if any, evaluate a share of the batches each and get the same loss. Batches that are
    too small to have relations are left out; see `with_relations`, also for what it raises.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        is_pair: bool,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.model, self.is_pair, self.accelerator = model, is_pair, accelerator
        self.batches = with_relations(batches)
        self.dense: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, mask: PresentMask) -> float:
        """Return the mean over batches of KL(dense ‖ gated), ≥ 0; lower is better."""
        gates = {site: row.float() for site, row in mask.items()}

        def on_batch(number: int) -> float:
            if number not in self.dense:
                self.dense[number] = self._representations(number, {})
            return float(relational_kl(self.dense[number], self._representations(number, gates)))

        values = list(in_order(on_batch, range(len(self.batches)), self.accelerator))
        return sum(values) / len(values)

    def slopes(self, mask: PresentMask) -> Tensor:
        """Return the loss's derivative on every gate of a mask that was called with, `[heads]` over all sites.

        Zeros where the model has no gradients to give: weights that are fetched layer by layer, kernels without a
        backward pass. Each batch takes about as long as three masks.
        """
        heads = sum(len(row) for row in mask.values())

        def differentiate(number: int) -> Tensor:
            gates = {site: row.float().requires_grad_() for site, row in mask.items()}
            try:
                with torch.enable_grad():
                    loss = relational_kl(self.dense[number], self._representations(number, gates))
                slopes = torch.autograd.grad(loss, list(gates.values()), allow_unused=True, materialize_grads=True)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                return torch.zeros(heads)
            return torch.cat(slopes).nan_to_num(0.0, 0.0, 0.0)

        if is_offloaded(self.model):
            return torch.zeros(heads)
        by_batch = list(in_order(differentiate, range(len(self.batches)), self.accelerator))
        return torch.stack(by_batch).mean(dim=0)

    def _representations(self, number: int, gates: Mapping[str, Tensor]) -> Tensor:
        return gated_representations(self.model, self.batches[number], gates, self.is_pair)


class MeanLoss:
    """The mean of several `MaskLoss`es on as many texts each, as one."""

    def __init__(self, parts: Sequence[MaskLoss]) -> None:
        self.parts = parts

    def __call__(self, mask: PresentMask) -> float:
        """Return the mean of what the mask costs."""
        return statistics.fmean(part(mask) for part in self.parts)

    def slopes(self, mask: PresentMask) -> Tensor:
        """Return the mean of the derivatives on every gate of a mask that was called with, `[heads]`."""
        return torch.stack([part.slopes(mask) for part in self.parts]).mean(dim=0)
