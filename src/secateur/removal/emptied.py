"""Blocks without a unit: attention code that cannot run without heads (GPT-2 splits, OPT reshapes) is left out.

A cache asks its first layer how many tokens it has seen, and where that layer's keys hold no number the answer is none:
the next token would be placed and masked as if it were the first. So blocks without a head cache one number a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.removal.adapted import Mixin, mix_in_
from secateur.sites.forward import own_forward
from secateur.sites.layout import Site

_CACHES = ("past_key_values", "layer_past")
_OTHER_KEYS = ("encoder_hidden_states", "key_value_states")  # of cross-attention, whose keys are no past of its own
_RESIDUAL = "residual"  # Bloom's attention adds it to what the heads write


class EmptiedAttention(Mixin):
    """Takes the place of an attention module's forward: no head writes, so only the output's bias is left.

    Where the output projection lies outside the module, it is handed the heads' outputs side by side: nothing. A cache
    still gets a number for each token, so that it knows how many it has seen. Dropout on the output is left out: there
    is nothing to regularise in a constant.
    """

    secateur_emptied = True  # see `is_emptied`
    secateur_output: str

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the output projection's bias for every token, and no map."""
        assert isinstance(self, nn.Module)  # mixed into one
        given = inspect.signature(own_forward(self)).bind_partial(self, hidden_states, *args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        if cache is not None and all(given.get(name) is None for name in _OTHER_KEYS):
            nothing = hidden_states.new_zeros(hidden_states.shape[0], 0, hidden_states.shape[1], 0)
            _update(getattr(cache, "self_attention_cache", cache).update, nothing, nothing, self.layer_idx)
        if not self.secateur_output:
            return hidden_states.new_zeros(*hidden_states.shape[:-1], 0), None
        projection: Any = self.get_submodule(self.secateur_output)
        width = max(projection.weight.shape)  # its other axis counts the heads' inputs, of which there are none
        written = hidden_states.new_zeros(*hidden_states.shape[:-1], width)
        if projection.bias is not None:
            written = written + projection.bias
        return (written + given[_RESIDUAL] if isinstance(given.get(_RESIDUAL), Tensor) else written), None


class CountedAttention(Mixin):
    """Mixed into the class of an attention module without heads that runs its own code: what it caches counts tokens.

    Its self-attention only: the keys of cross-attention are no past of its own, and are read where they lie.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own code; a cache among its arguments gets numbers for the keys and values that have none.

        The cache's `update` is changed, not the cache that is handed on, since the code asks what kind of cache it has.
        """
        own: Any = super()
        caches = [given for given in (*args, *kwargs.values()) if isinstance(given, Cache)]
        cache: Any = getattr(caches[0], "self_attention_cache", caches[0]) if caches else None
        if cache is None or "update" in vars(cache):
            return own.forward(*args, **kwargs)
        cache.update = partial(_update, cache.update)
        try:
            return own.forward(*args, **kwargs)
        finally:
            del cache.update


def _update(
    update: Callable[..., tuple[Tensor, Tensor]], keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Cache one number a token in place of keys and values of no heads; return those of all tokens, of no heads again.

    The number is 1, since there are caches that count the keys that are not 0 (transformers 5.0).
    """
    pair = (keys, values)
    given = [x if x.numel() else x.new_ones(x.shape[0], 1, x.shape[-2], 1) for x in pair]
    cached = update(*given, *args, **kwargs)
    return tuple(
        all_ if x.numel() else x.new_empty(*x.shape[:-2], all_.shape[-2], x.shape[-1])
        for x, all_ in zip(pair, cached, strict=True)
    )


def count_tokens_(module: nn.Module, undo: list[Callable[[], None]]) -> None:
    """Let what a module without heads caches count tokens; `undo` collects what reverses that."""
    before = type(module)
    undo.append(lambda: setattr(module, "__class__", before))
    mix_in_(module, CountedAttention)


def bypass_(base: PreTrainedModel, site: Site, undo: list[Callable[[], None]] | None = None) -> None:
    """Let the emptied `site` skip its own code; `undo` collects what reverses that."""
    module: Any = base.get_submodule(site.name)
    before = type(module)
    if issubclass(before, EmptiedAttention):
        return
    mix_in_(module, EmptiedAttention)
    inside = site.output.startswith(site.name + ".")
    module.secateur_output = site.output.removeprefix(site.name + ".") if inside else ""
    if undo is not None:
        undo.append(lambda: _restore(module, before))


class EmptiedProjection(Mixin):
    """Mixed into a `Conv1D` that reads no channel: its code cannot tell of no numbers how many tokens they were.

    As in a linear layer, its bias alone is left.
    """

    nf: int
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return the bias for every token."""
        return x.new_zeros(*x.shape[:-1], self.nf) + self.bias


def keep_bias_(base: PreTrainedModel, site: Site, undo: list[Callable[[], None]]) -> None:
    """Let the last projection of a feed-forward block without neurons write its bias; `undo` collects what reverses it.

    Linear layers do so by themselves.
    """
    projection = base.get_submodule(site.output)
    before = type(projection)
    if isinstance(projection, Conv1D) and not issubclass(before, EmptiedProjection):
        undo.append(lambda: setattr(projection, "__class__", before))
        mix_in_(projection, EmptiedProjection)


def _restore(module: Any, before: type) -> None:
    module.__class__ = before
    del module.secateur_output
