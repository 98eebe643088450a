"""Finding attention sites: where they are, what their heads own, and what reads them.

No table of model names: one forward pass is watched, and what it computes is asked (attention_finder.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from secateur.errors import UnsupportedModelError
from secateur.models.base_model import base_of
from secateur.models.fetched import gradients_within
from secateur.models.finite import check_weights
from secateur.models.inputs import example_inputs
from secateur.models.offload import check_loaded, is_offloaded, is_too_large_to_widen
from secateur.models.state import evaluation_mode, gradients_for_all, held, in_float32, without_autocast
from secateur.sites.attention_finder import AttentionFinder
from secateur.sites.gating import count_heads, prepare, probe
from secateur.sites.layout import AttentionSite
from secateur.support.checks import check_mapping
from secateur.support.interrupts import interruptible


@interruptible
def find_sites(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> dict[str, AttentionSite]:
    """Return every attention site that a forward pass of `model` reaches, in the order of the pass.

    Args:
        model: a transformers model with floating-point weights.
        inputs: keyword arguments of the base model's forward; example inputs where absent.

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
    finder = AttentionFinder(base)
    if inputs is not None and not is_offloaded(base):
        with in_float32(base):
            prepare(base, inputs)
    inputs = example_inputs(base) if inputs is None else inputs
    try:
        if is_too_large_to_widen(base):
            _run_block_by_block(base, finder, inputs)
        else:
            _run_whole(base, finder, inputs)
        return finder.sites()
    except UnsupportedModelError:
        if not is_offloaded(base):
            check_weights(base)  # NaN has no gradient to tell heads apart by
        raise


def _run_whole(base: PreTrainedModel, finder: AttentionFinder, inputs: Mapping[str, Any]) -> None:
    """Run the model in float32, and let gradients flow everywhere."""
    with (
        held(base), in_float32(base), without_autocast(base.device), evaluation_mode(base), gradients_for_all(base),
        probe(base, finder.see_attention), finder.watching(),
    ):  # fmt: skip
        base(**inputs)


def _run_block_by_block(base: PreTrainedModel, finder: AttentionFinder, inputs: Mapping[str, Any]) -> None:
    """Run the model in the precision of its weights, and let gradients flow within one block at a time."""
    # The block around a site holds its projections too, also where the output projection is a neighbour.
    names = [site.rpartition(".")[0] for site in count_heads(base, inputs)]
    blocks = [base.get_submodule(name) for name in dict.fromkeys(names)]
    with (
        held(base), evaluation_mode(base), gradients_for_all(base), probe(base, finder.see_attention),
        finder.watching(), gradients_within(base, blocks),
    ):  # fmt: skip
        base(**inputs)
    if not finder.blocks:
        check_loaded(base, "finding heads past transformers' attention interface")
