"""What watches a forward pass for attention blocks, and asks at each which weights belong to which head.

Ownership is found by gradients while the pass runs. The output projection is the linear layer whose input is the
concatenated heads, or a chunk for each head that depends on that head alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import UnsupportedModelError
from secateur.sites.attention_block import AttentionBlock, unpruned_site
from secateur.sites.attention_parts import count_key_value_heads, learned_extras_of, parts_of, written_part
from secateur.sites.direct import reads_heads
from secateur.sites.forward import takes_bias
from secateur.sites.gating import HeadReading
from secateur.sites.layout import AttentionSite, Slice
from secateur.sites.moved import present_recipe
from secateur.sites.ownership import Ownership, Part
from secateur.support.interrupts import undoing
from secateur.support.threads import in_own_thread


class AttentionFinder:
    """Collects what one forward pass shows of every attention block of a base model."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self.ownership = Ownership(base, AttentionSite.kind)
        self.blocks: dict[str, AttentionBlock] = {}
        # The block that attended last and the outputs of its heads, until a layer reads them.
        self.unread: tuple[AttentionBlock, Tensor] | None = None

    @undoing
    def watching(self) -> Iterator[None]:
        """Watch the input of every layer with a weight matrix meanwhile."""
        with ExitStack() as hooks:
            for name, module in self.base.named_modules():
                weight = getattr(module, "weight", None)
                if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
                    hooks.callback(module.register_forward_pre_hook(in_own_thread(self._reader(name))).remove)
            yield

    def _reader(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                self.see_linear(module, name, args[0])

        return hook

    def see_attention(self, reading: HeadReading) -> None:
        """Take what an attention block computes, to be called as soon as it has: its output projection comes next."""
        block = self.blocks.get(reading.site)
        if block is None:  # shared layers attend again and again
            block = self.blocks[reading.site] = self._block_of(reading)
        if block.output is None:
            self.unread = (block, reading.outputs)

    def _block_of(self, reading: HeadReading) -> AttentionBlock:
        """Ask what the heads own of the block, but for its output projection."""
        self.ownership.look_up_names()
        heads, width = reading.outputs.shape[2:]
        block = AttentionBlock(reading.site, reading.module, heads, count_key_value_heads(reading), width)
        for part in parts_of(reading):
            slices = self._slices(block, part)
            if not any(self.ownership.is_matrix(piece) for piece in slices):
                what = "projections" if part.role == "head" else f"{part.role} projection"
                raise UnsupportedModelError(
                    f"site {block.name}: no weight of its {what} belongs to single heads "
                    "(a normalisation or mixing across heads, or weights outside the site)"
                )
            block.slices += slices
        if not takes_bias(block.module):
            for part in learned_extras_of(reading):
                block.slices += self.ownership.slices(block.name, block.module, part)
        return block

    def _slices(self, block: AttentionBlock, part: Part) -> list[Slice]:
        module = block.module
        # A table of biases serves other layers too: it stays whole, and the module picks from what it computes.
        tables = [m for m in module.modules() if isinstance(m, nn.Embedding)] if hasattr(module, "compute_bias") else []
        shared = {self.ownership.names.get(id(table.weight), "") for table in tables}
        slices = self.ownership.slices(block.name, module, part, leave_out=shared)
        if not slices:  # some classes hold their projections beside, not inside, the module that attends
            parent = self.base.get_submodule(block.name.rpartition(".")[0])
            slices = self.ownership.slices(block.name, parent, part)
        return slices

    def see_linear(self, module: nn.Module, name: str, taken: Tensor) -> None:
        """Recognise the output projection of the block that attended last by the input that it takes."""
        if self.unread is None:
            return
        block, outputs = self.unread
        if taken.numel() != outputs.numel():
            return
        as_they_are = torch.equal(taken.detach().reshape(-1), outputs.detach().reshape(-1))
        # Some models multiply each head by a gate of its own, or normalise it, before the projection reads it.
        if not as_they_are and not reads_heads(outputs, taken, outputs.transpose(1, 2).shape[:3]):
            return
        self.unread = None
        self.ownership.look_up_names()
        block.output = name
        if block.num_heads:
            block.slices += self._slices_written(block, module, outputs, taken)
            if not as_they_are:
                block.slices += self._slices_between(block, outputs, taken)

    def _slices_written(self, block: AttentionBlock, module: nn.Module, outputs: Tensor, taken: Tensor) -> list[Slice]:
        """Ask which columns of the output projection read which head: those of its place and no others."""
        part = written_part(module, outputs.detach(), taken.detach(), self.ownership.random)
        slices = self.ownership.slices(block.name, module, part)
        side_by_side = tuple(head for head in range(block.num_heads) for _ in range(block.width))
        if not any(self.ownership.is_matrix(piece) and piece.owners == side_by_side for piece in slices):
            raise UnsupportedModelError(
                f"site {block.name}: the output projection {block.output} does not keep heads apart"
            )
        return slices

    def _slices_between(self, block: AttentionBlock, outputs: Tensor, taken: Tensor) -> list[Slice]:
        """Ask what the heads own of gates or norms that lie between their outputs and the output projection."""
        # Key and value weights serve whole groups of heads; those of the query may hold the gates' rows too.
        known = {piece.parameter for piece in block.slices if piece.role in ("key", "value")}
        part = Part.along_first_axis("query", taken.reshape(outputs.shape).movedim(2, 0))
        return self.ownership.slices(block.name, block.module, part, leave_out=known)

    def sites(self) -> dict[str, AttentionSite]:
        """Return the sites that were seen, and those that the config's recipe says are left out of every pass."""
        if not self.blocks:
            raise UnsupportedModelError(
                f"{type(self.base).__name__} has no attention whose heads can be told apart: it goes neither through "
                "transformers' attention interface nor from a softmax straight to an output projection"
            )
        recipe = present_recipe(self.base)
        weights = {name for name, _ in self.base.named_parameters(remove_duplicate=False)}
        found = {name: block.as_site(recipe, weights) for name, block in self.blocks.items()}
        if recipe is not None:
            for name in recipe.bypassed:  # never asks for attention, but is still a site
                unpruned = unpruned_site(recipe, name)
                found[name] = replace(unpruned, num_units=0, num_groups=0, slices=(), attributes={}, units=())
        return found
