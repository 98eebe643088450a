"""Finding attention sites: where they are, what their heads own, and what reads them.

No table of model names: ownership.py finds a head's weights by gradients, and the output projection is the linear layer
whose input is the concatenated heads, or a chunk for each head that depends on that head alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import UnsupportedModelError
from secateur.models.finite import check_weights
from secateur.models.inputs import example_inputs
from secateur.models.offload import check_loaded, gradients_within, is_offloaded, is_too_large_to_widen
from secateur.models.state import base_of, evaluation_mode, gradients_for_all, held, in_float32, without_autocast
from secateur.sites.direct import reads_heads
from secateur.sites.forward import reads_config, takes_bias
from secateur.sites.gating import HeadReading, count_heads, prepare, probe
from secateur.sites.layout import NOBODY, AttentionSite, Slice
from secateur.sites.ownership import Ownership
from secateur.sites.recipe import read_recipe
from secateur.support.checks import check_mapping

# Attributes that modelling code reads at run time, by what they count. An attribute is adjusted only where its value
# is the one expected, and every removal is proved afterwards, so a name too many does no harm.
_ATTRIBUTES = {
    "heads": ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads", "num_attn_heads"),
    "key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    "group": ("num_key_value_groups", "n_rep"),
    "width": ("all_head_size", "inner_dim", "split_size", "embed_dim"),
}


def find_sites(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> dict[str, AttentionSite]:
    """Return every attention site that a forward pass of `model` reaches, in the order of the pass.

    Args:
        model: a transformers model with floating-point weights.
        inputs: keyword arguments of the base model's forward; made up where absent.

    The model is run once, on a few tokens, in float32, and left as it was. Where `device_map` keeps weights on CPU or
    disk, or spreads half-precision ones, it is run twice as it is, and gradients flow around one site at a time. Raises
    `UnsupportedModelError` naming the site and the reason where heads cannot be told apart, and where the model has no
    reachable attention.
    """
    base = base_of(model)
    if inputs is not None:
        check_mapping("inputs", inputs)
    if getattr(base.config, "attention_type", None) == "block_sparse":
        raise UnsupportedModelError(
            f"{type(base).__name__} attends in sparse blocks; load it with `attention_type='original_full'`"
        )
    finder = _Finder(base)
    if inputs is not None and not is_offloaded(base):
        with in_float32(base):
            prepare(base, inputs)
    inputs = example_inputs(base) if inputs is None else inputs
    try:
        if is_too_large_to_widen(base):
            # The block around a site holds its projections too, also where the output projection is a neighbour.
            blocks = {
                site.rpartition(".")[0]: base.get_submodule(site.rpartition(".")[0])
                for site in count_heads(base, inputs)
            }
            with (
                held(base), evaluation_mode(base), gradients_for_all(base), probe(base, finder.see), finder.watching(),
                gradients_within(base, blocks),
            ):  # fmt: skip
                base(**inputs)
            if not finder.readings:
                check_loaded(base, "finding heads past transformers' attention interface")
        else:
            with (
                held(base), in_float32(base), without_autocast(base.device), evaluation_mode(base),
                gradients_for_all(base), probe(base, finder.see), finder.watching(),
            ):  # fmt: skip
                base(**inputs)
        return finder.finish()
    except UnsupportedModelError:
        if not is_offloaded(base):
            check_weights(base)  # NaN has no gradient to tell heads apart by
        raise


class _Finder:
    """Collects what one forward pass shows of every site."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self.ownership = Ownership(base)
        self.readings: dict[str, tuple[nn.Module, int, int, int]] = {}
        self.slices: dict[str, list[Slice]] = {}
        self.outputs: dict[str, str] = {}
        self.pending: tuple[str, Tensor] | None = None

    def watching(self) -> _Hooks:
        """Watch the input of every linear layer."""
        return _Hooks(self)

    def see(self, reading: HeadReading) -> None:
        """Take the query, key and value part of a site, and remember what its output projection must read."""
        site, module = reading.site, reading.module
        if site not in self.readings:
            self.ownership.look_up_names()
            heads = reading.outputs.shape[2]
            kv_heads = heads if reading.key is None else reading.key.shape[1]
            if kv_heads and heads % kv_heads:
                raise UnsupportedModelError(
                    f"site {site}: {heads} heads do not divide among {kv_heads} key-value heads"
                )
            if reading.key is not None and reading.value is not None and reading.value.shape[1] != kv_heads:
                raise UnsupportedModelError(
                    f"site {site}: {kv_heads} key heads and {reading.value.shape[1]} value heads do not pair up"
                )
            self.readings[site] = (module, heads, kv_heads, reading.outputs.shape[-1])
            found: list[Slice] = []
            for role, per_head in _heads_of(reading).items():
                pieces = self._pieces(site, module, role, per_head)
                if not any(self.ownership.is_matrix(p) for p in pieces):
                    what = "projections" if role == "head" else f"{role} projection"
                    raise UnsupportedModelError(
                        f"site {site}: no weight of its {what} belongs to single heads "
                        "(a normalisation or mixing across heads, or weights outside the site)"
                    )
                found += pieces
            if not takes_bias(module):
                for per_head in _extras_of(reading):
                    found += self.ownership.slices(site, module, "query", per_head)
            self.slices[site] = found
        if site not in self.outputs:
            self.pending = (site, reading.outputs)

    def _pieces(self, site: str, module: nn.Module, role: str, per_head: list[Tensor]) -> list[Slice]:
        # A table of biases serves other layers too: it stays whole, and the module picks from what it computes.
        tables = [m for m in module.modules() if isinstance(m, nn.Embedding)] if hasattr(module, "compute_bias") else []
        shared = {self.ownership.names.get(id(table.weight), "") for table in tables}
        pieces = self.ownership.slices(site, module, role, per_head, leave_out=shared)
        if not pieces:  # some classes hold their projections beside, not inside, the module that attends
            parent = self.base.get_submodule(site.rpartition(".")[0])
            pieces = self.ownership.slices(site, parent, role, per_head)
        return pieces

    def read_linear(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        """Recognise the output projection by its input, then find which of its columns read which head."""
        if self.pending is None:
            return
        site, outputs = self.pending
        heads_out = outputs.detach()
        if tensor.numel() != heads_out.numel():
            return
        as_they_are = torch.equal(tensor.reshape(-1), heads_out.reshape(-1))
        # Some models multiply each head by a gate of its own, or normalise it, before the projection reads it.
        if not as_they_are and not reads_heads(outputs, tensor, outputs.transpose(1, 2).shape[:3]):
            return
        self.pending = None
        self.ownership.look_up_names()
        self.outputs[site] = name
        heads, width = heads_out.shape[2:]
        if not heads:
            return
        per_head = []
        for head in range(heads):
            alone = torch.zeros(*heads_out.shape, device=tensor.device)
            alone[:, :, head] = torch.randn(*heads_out.shape[:2], width, generator=self.ownership.random).to(
                tensor.device
            )
            per_head.append(module.forward(alone.reshape(tensor.shape).to(tensor.dtype)))
        pieces = self.ownership.slices(site, module, "output", per_head)
        side_by_side = tuple(head for head in range(heads) for _ in range(width))
        if not any(self.ownership.is_matrix(p) and p.owners == side_by_side for p in pieces):
            raise UnsupportedModelError(f"site {site}: the output projection {name} does not keep heads apart")
        if not as_they_are:
            # Key and value weights serve whole groups of heads; those of the query may hold the gates' rows too.
            known = {piece.parameter for piece in self.slices[site] if piece.role in ("key", "value")}
            chunks = list(tensor.reshape(heads_out.shape).unbind(dim=2))
            owner = self.readings[site][0]
            pieces += self.ownership.slices(site, owner, "query", chunks, leave_out=known)
        self.slices[site] += pieces

    def finish(self) -> dict[str, AttentionSite]:
        if not self.readings:
            raise UnsupportedModelError(
                f"{type(self.base).__name__} has no attention whose heads can be told apart: it goes neither through "
                "transformers' attention interface nor from a softmax straight to an output projection"
            )
        recipe = read_recipe(self.base.config)
        weights = dict(self.base.named_parameters(remove_duplicate=False))
        found = {}
        for site, (module, heads, kv_heads, width) in self.readings.items():
            if site not in self.outputs:
                raise UnsupportedModelError(
                    f"site {site}: no linear layer reads the heads side by side and apart from each other, so none "
                    "can be narrowed"
                )
            original, total, total_kv = tuple(range(heads)), heads, kv_heads
            slices = tuple(self.slices[site])
            if recipe is not None and site in recipe.kept:
                first = recipe.sites[site]
                assert isinstance(first, AttentionSite)
                original, total, total_kv = recipe.kept[site], first.num_units, first.num_groups
                # What was seen when all heads were there: a lone head does not show what it owns of a table. Weights
                # that have something around them since then, such as an adapter, have other names, and more belongs
                # to a head.
                left = _slices_left(first, original)
                if all(piece.parameter in weights for piece in left):
                    slices = left
            if len(original) != heads:
                raise UnsupportedModelError(
                    f"site {site}: the config's recipe keeps {len(original)} heads but the model has {heads}"
                )
            found[site] = AttentionSite(
                name=site,
                num_units=heads,
                num_groups=kv_heads,
                width=width,
                slices=slices,
                attributes=_attributes(site, module, heads, kv_heads, width),
                output=self.outputs[site],
                units=original,
                original_num_units=total,
                original_num_groups=total_kv,
            )
        if recipe is not None:
            for site in recipe.bypassed:  # never asks for attention, but is still a site
                first = recipe.sites[site]
                assert isinstance(first, AttentionSite)
                found[site] = replace(first, num_units=0, num_groups=0, slices=(), attributes={}, units=())
        return found


def _slices_left(site: AttentionSite, heads: tuple[int, ...]) -> tuple[Slice, ...]:
    """Return what the original `heads` own after an unpruned `site` was cut to them, in their present numbering."""
    if not heads:
        return ()
    kept = torch.zeros(site.num_units, dtype=torch.bool)
    kept[list(heads)] = True
    stays = site.kept_indices(kept)
    slices = []
    for piece in site.slices:
        alive = site.kept_groups(kept) if piece.role in ("key", "value") else kept
        numbers = {old: new for new, old in enumerate(alive.nonzero().flatten().tolist())}
        indices = stays[piece.parameter, piece.axis].tolist()
        slices.append(replace(piece, owners=tuple(numbers.get(piece.owners[i], NOBODY) for i in indices)))
    return tuple(slices)


def _heads_of(reading: HeadReading) -> dict[str, list[Tensor]]:
    """Return by role what each head computed from weights of its own; nothing for a site without heads."""
    if not reading.outputs.shape[2]:
        return {}
    if reading.query is None or reading.key is None or reading.value is None:
        # The scores too: a softmax is blind to what it adds to a whole row, so the outputs do not show the key's bias.
        assert reading.scores is not None
        parts = zip(reading.scores.unbind(dim=1), reading.outputs.unbind(dim=2), strict=True)
        return {"head": [torch.cat([scores.flatten(), outputs.flatten()]) for scores, outputs in parts]}
    return {
        "query": list(reading.query.unbind(dim=1)),
        "key": list(reading.key.unbind(dim=1)),
        "value": list(reading.value.unbind(dim=1)),
    }


def _extras_of(reading: HeadReading) -> list[list[Tensor]]:
    """Return, head by head, what else the attention function was given for each: sinks `[heads]`, a learned bias."""
    found = []
    for tensor in reading.extras:
        axis = 0 if tensor.ndim == 1 else 1
        if tensor.shape[axis] == reading.outputs.shape[2] > 0:
            found.append(list(tensor.unbind(dim=axis)))
    return found


class _Hooks:
    """Pre-hooks on every layer with a weight matrix, removed on exit."""

    def __init__(self, finder: _Finder) -> None:
        self.finder = finder
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self.finder.base.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
                self.handles.append(module.register_forward_pre_hook(self._hook(name)))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                self.finder.read_linear(module, name, args[0])

        return hook

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()


def _attributes(site: str, module: nn.Module, heads: int, kv_heads: int, width: int) -> dict[str, str]:
    group = heads // kv_heads if kv_heads else 0
    values = {"heads": heads, "key_value_heads": kv_heads, "group": group, "width": heads * width}
    return {
        f"{site}.{name}": quantity
        for quantity, names in _ATTRIBUTES.items()
        for name in names
        if _is_count(getattr(module, name, None), values[quantity])
    } | {
        f"{site}.config.{name}": quantity
        for quantity, names in _ATTRIBUTES.items()
        for name in names
        if reads_config(module, name) and _is_count(getattr(module.config, name, None), values[quantity])
    }


def _is_count(value: Any, expected: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == expected
