"""What watches a forward pass for feed-forward blocks, and asks at each which weights belong to which neuron.

A site is a linear layer each of whose input channels is written by rows of matrices that write no other channel,
through any activation and any gate. The autograd graph behind the input says which matrices these can be: the first
ones met on every way back. Where products of activations, or a table of embeddings, are met first, or where several
layers read what the same rows write, it is no feed-forward block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.errors import UnsupportedModelError
from secateur.models.offload import is_offloaded
from secateur.sites.feed_forward import FeedForwardSite, channel_axis, is_projection, num_channels, read_slice
from secateur.sites.layout import Slice
from secateur.sites.ownership import Ownership, Part, only
from secateur.support.interrupts import undoing
from secateur.support.threads import in_own_thread

_MOST_MATRICES = 3  # that write neurons; a graph that meets more of them before any other is the residual stream's
_WRITERS = (nn.Linear, Conv1D, _ConvNd, _BatchNorm)
_LEAST, _MOST = 0.1, 0.9  # where no activation is silent, saturated or clamped
_PRODUCTS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Linear", "Mkldnn", "ScaledDot", "Efficient", "Flash")
_VIEWS = (
    "TBackward",
    "Transpose",
    "Permute",
    "View",
    "UnsafeView",
    "Reshape",
    "Expand",
    "Unsqueeze",
    "Squeeze",
    "Alias",
)


class FeedForwardFinder:
    """Collects what one forward pass shows of every feed-forward block of a base model.

    `refused` has the reason for every block that cannot be divided.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self.ownership = Ownership(base, FeedForwardSite.kind)
        self.modules = dict(base.named_modules())
        self.is_offloaded = is_offloaded(base)
        self._look_up()
        # Shared layers run again and again, and what a second run reads is mixed by the first.
        self.seen: set[str] = set()
        self.written: dict[str, list[Any]] = {}  # by each projection: the nodes of the graph that its outputs are of
        self.found: dict[str, FeedForwardSite] = {}
        self.refused: dict[str, str] = {}

    def _look_up(self) -> None:
        """Learn which parameter is called what, and which module has it, as of now."""
        self.ownership.look_up_names()
        self.holders = {id(p): module for module in self.modules.values() for p in module.parameters(recurse=False)}

    @undoing
    def watching(self) -> Iterator[None]:
        """Watch what every projection takes and writes meanwhile, and let all that is written look awake.

        Rectified units are silent on most inputs, and would seem to own nothing; saturated ones too. So each layer that
        may write neurons gives small positive numbers drawn at random, with the gradients of its own: at those every
        activation passes something on.
        """
        random = torch.Generator().manual_seed(0)

        def awake(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return output
            numbers = _LEAST + (_MOST - _LEAST) * torch.rand(output.shape, generator=random)
            return numbers.to(output) + (output - output.detach())

        with ExitStack() as hooks:
            for name, module in self.modules.items():
                if is_projection(module):
                    read, note = in_own_thread(self._reader(name)), in_own_thread(self._noter(name))
                    hooks.callback(module.register_forward_pre_hook(read, with_kwargs=True).remove)
                    if not self.is_offloaded:  # what is noted holds weights that were fetched
                        hooks.callback(module.register_forward_hook(note).remove)
                if isinstance(module, _WRITERS):
                    hooks.callback(module.register_forward_hook(in_own_thread(awake)).remove)
            yield

    def _noter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.grad_fn is not None:
                self.written.setdefault(name, []).append(output.grad_fn)

        return hook

    def _reader(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            taken = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if taken is not None and name not in self.seen:
                self.seen.add(name)
                self.see(name, module, taken)

        return hook

    def see(self, name: str, module: nn.Module, taken: Tensor) -> None:
        """Take the input `taken` of the projection `module`, and ask what its channels own."""
        axis, channels = channel_axis(module), num_channels(module)
        if taken.ndim < 2 or taken.shape[axis] != channels or not taken.requires_grad:
            return
        if self.is_offloaded:
            self._look_up()
        parameters = writers_of(taken)
        matrices = [p for p in parameters or () if p.ndim > 1 and id(p) in self.ownership.names]
        if parameters is None or not 0 < len(matrices) <= _MOST_MATRICES:
            return
        part = Part("neuron", channels, lambda chosen: [only(chosen, taken, axis)])
        if not self.ownership.divides(matrices, part):
            return
        try:
            slices = self.ownership.slices_of(name, parameters, self.holders, part)
        except UnsupportedModelError as error:
            self.refused[name] = str(error)
            return
        reason = self._reason_against(name, taken, slices)
        if reason:
            self.refused[name] = f"site {name}: {reason}"
            return
        self.found[name] = FeedForwardSite.unpruned(
            name, tuple(range(channels)), slices=(*slices, read_slice(name, module)), attributes={}, output=name
        )

    def sites(self) -> dict[str, FeedForwardSite]:
        """Return the sites that were seen, but for readers of the residual stream, which others read too."""
        readers = Counter(
            piece.parameter for site in self.found.values() for piece in site.slices if piece.role == "neuron"
        )
        return {
            name: site
            for name, site in self.found.items()
            if all(readers[piece.parameter] == 1 for piece in site.slices if piece.role == "neuron")
        }

    def others_read(self, site: FeedForwardSite, outputs: Sequence[Tensor]) -> bool:
        """Do `outputs`, which the watched pass returned, also depend on the site's neurons past its own projection?

        A residual sum reads them then, or the model hands them out: it is no feed-forward block.
        """
        rows = {id(self.base.get_parameter(piece.parameter)) for piece in site.slices if piece.role == "neuron"}
        waiting: list[Any] = [tensor.grad_fn for tensor in outputs]
        known = set(self.written.get(site.name, ()))
        while waiting:
            node = waiting.pop()
            if node is None or node in known:
                continue
            known.add(node)
            if hasattr(node, "variable") and id(node.variable) in rows:
                return True
            waiting += [child for child, _ in node.next_functions]
        return False

    def _reason_against(self, name: str, taken: Tensor, slices: list[Slice]) -> str:
        """Return why the projection's channels are no neurons that could go, or nothing."""
        channels = num_channels(self.modules[name])
        rows = [set(piece.owners) for piece in slices if self.ownership.is_matrix(piece)]
        if not any(set(range(channels)) <= owners for owners in rows):
            return "some of its channels own no row of a matrix: they never were active, or are mixed before"
        for piece in slices:
            holder = self.holders[id(self.base.get_parameter(piece.parameter))]
            if isinstance(holder, _BatchNorm):  # whose statistics go with their channels
                continue
            wide = [key for key, value in holder.named_buffers(recurse=False) if value.ndim and channels in value.shape]
            if wide:
                return f"{type(holder).__name__} between its projections keeps statistics of every channel"
        return "it is one of several experts, each of which reads some tokens" if self._is_expert(name, taken) else ""

    def _is_expert(self, name: str, taken: Tensor) -> bool:
        """Is the projection in a list within a list of layers, beside others of its kind, and given loose tokens?"""
        lists = 0
        path = ""
        for part in name.split("."):
            path = f"{path}.{part}".lstrip(".")
            module = self.modules.get(path)
            if isinstance(module, nn.ModuleList | nn.ModuleDict) and len({type(m) for m in module.children()}) == 1:
                lists += len(list(module.children())) > 1
        return lists > 1 and taken.ndim == 2


def writers_of(taken: Tensor) -> list[nn.Parameter] | None:
    """Return the parameters met first on every way back from `taken`: matrices, and what lies between.

    None where a product of activations, or a look-up in a table, is among what is met, or more matrices than any block
    has.
    """
    found: dict[int, nn.Parameter] = {}
    waiting, known = [taken.grad_fn], set()
    matrices = 0
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        name = type(node).__name__
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        elif name.startswith("Embedding"):
            return None
        elif name.startswith(_PRODUCTS):
            children = [child for child, _ in node.next_functions]
            leaves = [leaf for leaf in map(_leaf, children) if leaf is not None]
            if not any(leaf.ndim > 1 for leaf in leaves):
                return None
            found |= {id(leaf): leaf for leaf in leaves}
            if name.startswith("Convolution") and all(leaf.shape[1] == 1 for leaf in leaves if leaf.ndim > 2):
                waiting += [child for child in children if _leaf(child) is None]  # each channel by itself
            else:
                matrices += 1
            if matrices > _MOST_MATRICES:
                return None
        else:
            waiting += [child for child, _ in node.next_functions]
    return list(found.values())


def _leaf(node: Any) -> nn.Parameter | None:
    """Return the parameter of which `node` is, or is a view; None where it is something computed."""
    while node is not None and not hasattr(node, "variable"):
        children = [child for child, _ in node.next_functions if child is not None]
        if len(children) != 1 or not type(node).__name__.startswith(_VIEWS):
            return None
        node = children[0]
    return None if node is None else node.variable
