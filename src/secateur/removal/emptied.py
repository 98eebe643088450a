"""Attention blocks without a head, for models whose own code cannot run one (GPT-2 splits, OPT reshapes)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.removal.adapted import Mixin, mix_in_
from secateur.sites.forward import own_forward
from secateur.sites.layout import Site

_CACHES = ("past_key_values", "layer_past")
_OTHER_KEYS = ("encoder_hidden_states", "key_value_states")  # of cross-attention, whose keys are no past of its own
_RESIDUAL = "residual"  # Bloom's attention adds it to what the heads write


class EmptiedAttention(Mixin):
    """Takes the place of an attention module's forward: no head writes, so only the output's bias is left.

    Where the output projection lies outside the module, it is handed the heads' outputs side by side: nothing. A cache
    still gets keys and values, of no heads, so that it knows how many tokens it has seen. Dropout on the output is left
    out: there is nothing to regularise in a constant.
    """

    secateur_emptied = True  # see `is_emptied`
    secateur_output: str
    secateur_head_dim: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the output projection's bias for every token, and no map."""
        assert isinstance(self, nn.Module)  # mixed into one
        given = inspect.signature(own_forward(self)).bind_partial(self, hidden_states, *args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        if cache is not None and all(given.get(name) is None for name in _OTHER_KEYS):
            nothing = hidden_states.new_zeros(hidden_states.shape[0], 0, hidden_states.shape[1], self.secateur_head_dim)
            getattr(cache, "self_attention_cache", cache).update(nothing, nothing, self.layer_idx)
        if not self.secateur_output:
            return hidden_states.new_zeros(*hidden_states.shape[:-1], 0), None
        projection: Any = self.get_submodule(self.secateur_output)
        width = max(projection.weight.shape)  # its other axis counts the heads' inputs, of which there are none
        written = hidden_states.new_zeros(*hidden_states.shape[:-1], width)
        if projection.bias is not None:
            written = written + projection.bias
        return (written + given[_RESIDUAL] if isinstance(given.get(_RESIDUAL), Tensor) else written), None


def bypass_(base: PreTrainedModel, site: Site, undo: list[Callable[[], None]] | None = None) -> None:
    """Let the emptied `site` skip its own code; `undo` collects what reverses that."""
    module: Any = base.get_submodule(site.name)
    before = type(module)
    if issubclass(before, EmptiedAttention):
        return
    mix_in_(module, EmptiedAttention)
    inside = site.output.startswith(site.name + ".")
    module.secateur_output = site.output.removeprefix(site.name + ".") if inside else ""
    module.secateur_head_dim = site.width
    if undo is not None:
        undo.append(lambda: _restore(module, before))


def _restore(module: Any, before: type) -> None:
    module.__class__ = before
    del module.secateur_output, module.secateur_head_dim
