"""Reloading: after `import secateur`, `from_pretrained` rebuilds a pruned model before its weights are read.

`PreTrainedModel.post_init` runs at the end of every model's constructor, while the weights are still random or absent.
It is wrapped once: a model whose config carries a `head_pruning` recipe is narrowed there; any other goes through the
original function alone. Saving needs nothing, since the recipe is part of the config. The `pruned_heads` of a
transformers-4 config are turned into a recipe on the way.

`PreTrainedModel` gets a `__call__` of its own as well, which warns of `head_mask`: transformers 5 ignores it silently.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def install() -> None:
    """Wrap `PreTrainedModel.post_init` and `__call__`; a second call does nothing.

    This runs while transformers is being imported, so everything else is imported when the first recipe turns up.
    """
    from transformers.modeling_utils import PreTrainedModel

    original = PreTrainedModel.post_init
    if getattr(original, "_secateur", False):
        return

    @functools.wraps(original)
    def post_init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if getattr(self.config, "pruned_heads", None):
            from secateur.model.legacy import adopt_v4_

            adopt_v4_(self)
        if getattr(self.config, "head_pruning", None) is not None:
            _narrow(self)
        return result

    post_init._secateur = True  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init

    def __call__(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("head_mask") is not None:
            from secateur.model.legacy import warn_of_head_mask

            warn_of_head_mask(self)
        return super(PreTrainedModel, self).__call__(*args, **kwargs)

    PreTrainedModel.__call__ = __call__


@contextmanager
def without_hook() -> Iterator[None]:
    """Let transformers build models as if secateur were not there."""
    from transformers.modeling_utils import PreTrainedModel

    hooked = PreTrainedModel.post_init
    PreTrainedModel.post_init = getattr(hooked, "__wrapped__", hooked)
    try:
        yield
    finally:
        PreTrainedModel.post_init = hooked


def _narrow(model: PreTrainedModel) -> None:
    """Follow the recipe in the model's config, unless this is a part of a model that is still under construction.

    Constructors nest: the parts of an encoder-decoder share its config but hold only some of the sites, and wait for
    the whole; a task model finds its base model narrowed already.
    """
    from secateur.model.recipe import read_recipe
    from secateur.model.replay import missing_sites, rebuild_
    from secateur.model.state import base_of

    recipe = read_recipe(model.config)
    if recipe is not None and (_is_whole(model) or not missing_sites(base_of(model), recipe)):
        rebuild_(model)


def _is_whole(model: PreTrainedModel) -> bool:
    """Is this the model that was asked for, rather than a part of it under construction?"""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    whole = MODEL_MAPPING.get(type(model.config), None)
    classes = whole if isinstance(whole, tuple) else (whole,)
    return (
        model.base_model is not model
        or type(model) in classes
        or type(model).__name__ in (getattr(model.config, "architectures", None) or [])
    )
