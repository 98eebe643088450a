"""Reloading: after `import secateur`, `from_pretrained` rebuilds a pruned model before its weights are read.

`PreTrainedModel.post_init` runs at the end of every model's constructor, while the weights are still random or absent.
It is wrapped once: a model whose config carries a `head_pruning` recipe is narrowed there; any other goes through the
original function alone. Constructors note what they build (construction.py), as it may be a part of another model. The
`pruned_heads` of a transformers-4 config are turned into a recipe on the way. `save_pretrained` is wrapped too: it sees
to it that what a folder's recipe says is what the model is (saving.py), also where heads went from a model inside it,
and writes the tokenizer that `prune` read texts with, and digests, which reading looks at (digest.py).

`PreTrainedModel` gets a `__call__` of its own as well, which warns of `head_mask`: transformers 5 ignores it silently.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from secateur.support.interrupts import undoing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def install() -> None:
    """Wrap `PreTrainedModel.post_init`, `save_pretrained` and `__call__`, and note constructors; once is enough.

    This runs while transformers is being imported, so everything else is imported when the first recipe turns up.
    """
    from transformers import modeling_utils
    from transformers.modeling_utils import PreTrainedModel

    from secateur.removal import construction, digest

    original = PreTrainedModel.post_init
    if getattr(original, "_secateur", False):
        return
    construction.install(PreTrainedModel)
    digest.install(modeling_utils)

    @functools.wraps(original)
    def post_init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if getattr(self.config, "pruned_heads", None):
            from secateur.removal.legacy import adopt_v4_

            adopt_v4_(self)
        if getattr(self.config, "head_pruning", None) is not None:
            _narrow(self)
        return result

    post_init._secateur = True  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init

    save = PreTrainedModel.save_pretrained

    @functools.wraps(save)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        adapter_alone = self._hf_peft_config_loaded  # then no config is written
        if not adapter_alone and any(_is_cut(module) for module in self.modules()):
            _complete_config_(self)
            if _saves_itself(self, inspect.signature(save).bind(self, *args, **kwargs).arguments):
                from secateur.removal.saving import prepare_to_save_

                prepare_to_save_(self)
        result = save(self, *args, **kwargs)
        if not adapter_alone:
            from secateur.models.tokenizer_saving import save_noted_tokenizer

            save_noted_tokenizer(self, *args, **kwargs)
        return result

    PreTrainedModel.save_pretrained = save_pretrained

    def __call__(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("head_mask") is not None:
            from secateur.removal.legacy import warn_of_head_mask

            warn_of_head_mask(self)
        return super(PreTrainedModel, self).__call__(*args, **kwargs)

    PreTrainedModel.__call__ = __call__


@undoing
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
    the whole; a task model finds its base model narrowed already. A model of the user's own may hold transformers'
    models as parts, in a row or beside its base model, with recipes that name their sites as its own.
    """
    from secateur.models.base_model import base_of
    from secateur.removal.replay import missing_sites, rebuild_
    from secateur.removal.saving import held_part
    from secateur.sites.recipe import KEY, read_recipe

    recipe = read_recipe(model.config)
    if recipe is None:
        return
    builder = _builder(model)
    if builder is not None and builder.base_model is not builder and type(model) is type(builder.base_model):
        return  # another beside its base model, whose recipe it is; one of another class takes that one's place
    base, is_part = base_of(model), builder is None and not _is_what_was_saved(model)
    part = held_part(base, recipe) if is_part else None
    if part is not None:  # the class is a part of what was saved, such as its encoder
        from secateur.removal.digest import note_recipes_
        from secateur.removal.telling import give_own_configs_

        note_recipes_(model)
        give_own_configs_(model)
        for config in (model.config, base.config):
            setattr(config, KEY, part.to_json())
    if part is not None or (builder is None and _is_whole(model)) or not missing_sites(base, recipe):
        rebuild_(model)


def _builder(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return the model with the same recipe in its config whose constructor builds `model` as a part of it, if any."""
    from secateur.removal.construction import under_construction

    for outer in reversed(under_construction()):
        config = getattr(outer, "config", None)  # none yet, where the part is built first of all
        if outer is not model and getattr(config, "head_pruning", None) == model.config.head_pruning:
            return outer
    return None


def _is_whole(model: PreTrainedModel) -> bool:
    """Is this the model that was asked for, rather than a part of it, such as the encoder alone?"""
    return model.base_model is not model or _is_what_was_saved(model)


def _is_what_was_saved(model: PreTrainedModel) -> bool:
    """Is this of the class that a config names, or its base model of the one that holds all there is by the config?"""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    whole = MODEL_MAPPING.get(type(model.config), None)
    classes = whole if isinstance(whole, tuple) else (whole,)
    named = getattr(model.config, "architectures", None) or []
    return type(model.base_model) in classes or type(model).__name__ in named


def _saves_itself(model: PreTrainedModel, arguments: Mapping[str, Any]) -> bool:
    """Does `save_pretrained` write the weights that the model holds, rather than others, or packed ones?"""
    return arguments.get("state_dict") is None and getattr(model, "hf_quantizer", None) is None


def _is_cut(module: Any) -> bool:
    """Is it a model, or a part of one, that lost units as far as its config or a removal in this process says?"""
    has_recipe = getattr(getattr(module, "config", None), "head_pruning", None) is not None
    return has_recipe or "_secateur_removed" in vars(module)


def _complete_config_(model: PreTrainedModel) -> None:
    """Let the config of a model that is about to be saved tell of the units that were removed inside the model.

    What the config of the base model alone tells is carried over. What that of any other part tells is not, as the
    sites that a recipe names there are not the model's: where the config does not have it in another place a
    `SecateurWarning` is issued.
    """
    from secateur.errors import SecateurWarning
    from secateur.models.base_model import base_of
    from secateur.removal.telling import carry_over_, is_told
    from secateur.sites.recipe import REMOVED

    base = base_of(model)
    carry_over_(base, model)
    for name, part in model.named_modules():
        if part is not base and REMOVED in vars(part) and not is_told(part, model.config):
            warnings.warn(
                f"units were removed from `{name}` of this {type(model).__name__} alone, which its config does not "
                "have, so that the folder may not load; remove them from the whole model, or save the part",
                SecateurWarning,
                stacklevel=3,
            )
