"""Code that takes the width of all heads from what it is given, and where a removal fails, said in words."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModel, CodeGenConfig, NystromformerConfig, TimesformerConfig

from secateur.errors import CheckpointError, RemovalError
from secateur.models.failure import place_of, running_modules, site_of
from secateur.models.inputs import example_inputs
from secateur.removal.proof import TOLERANCE, hidden_states, largest_difference
from secateur.removal.remove import gated, remove_
from secateur.removal.reshaped import _FittingShapes
from secateur.sites.attention import find_sites
from secateur.sites.recipe import Recipe
from secateur.units.masks import Mask
from tests.support.tiny import _stirred, uneven_mask

_COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}


def tiny(config):
    torch.manual_seed(0)
    return _stirred(AutoModel.from_config(config))


def timesformer():
    return tiny(TimesformerConfig(**_COMMON, image_size=16, patch_size=8, num_frames=3))


@pytest.mark.parametrize(
    ("asked", "total", "fitted"),
    [
        ((2, 5, 32), 2 * 5 * 24, (2, 5, 24)),
        ((2, 5, 3, 3, 10), 2 * 5 * 3 * 3 * 8, (2, 5, 3, 3, 8)),
        ((3, 10, 32), 3 * 10 * 24, (3, 10, 24)),  # a batch of 3 and a length of 10 look like three heads of width 10
        ((2, 32, 32), 2 * 32 * 24, (2, 32, 24)),  # a length of 32: features come last
        ((2, 5, 32), 2 * 5 * 32, (2, 5, 32)),
        ((2, 5, -1), 2 * 5 * 24, (2, 5, -1)),
        ((2, 5, 31), 2 * 5 * 24, (2, 5, 31)),
    ],
)
def test_only_what_does_not_fit_is_corrected(asked, total, fitted):
    assert _FittingShapes(heads=3, width=8, full=32).fit(asked, total) == fitted


def test_a_module_that_asks_for_the_full_width_is_pruned_again_and_reloads(tmp_path):
    model = timesformer()
    site = next(iter(find_sites(model)))
    inputs = example_inputs(model)
    dense = hidden_states(model, inputs)
    for kept in ([True, False, True, True], [True, False, False, True], [True, False, False, False]):
        mask = Mask({site: torch.tensor(kept)})
        with gated(model, mask):
            preview = hidden_states(model, inputs)
        before = copy.deepcopy(model)
        remove_(model, mask)
        removed = hidden_states(model, inputs)
        assert largest_difference(removed, hidden_states(pickle.loads(pickle.dumps(model)), inputs)) == 0
        assert largest_difference(preview, removed) <= TOLERANCE
        assert largest_difference(dense, removed) > 1e-2
        assert find_sites(before)[site].num_units == find_sites(model)[site].num_units + 1
        assert model.config.head_pruning["reshaped"] == [site]
        model.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path).eval()
        assert largest_difference(removed, hidden_states(again, inputs)) == 0
        fresh = example_inputs(model, batch=3, seed=1)
        assert largest_difference(hidden_states(model, fresh), hidden_states(again, fresh)) == 0


def test_it_trains_and_compiles():
    model = timesformer()
    remove_(model, uneven_mask(find_sites(model)))
    inputs = example_inputs(model)
    model.train()(**inputs).last_hidden_state.square().mean().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    model.eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_a_convolution_with_a_filter_for_each_head_loses_filters():
    model = tiny(
        NystromformerConfig(**_COMMON, vocab_size=99, num_landmarks=12, segment_means_seq_len=12, conv_kernel_size=3)
    )
    remove_(model, uneven_mask(find_sites(model)))
    convolution = model.encoder.layer[0].attention.self.conv
    assert (convolution.groups, convolution.in_channels, convolution.out_channels) == (3, 3, 3)


def test_a_failure_names_site_and_line_and_what_works_instead():
    """CodeGen computes in four parts, so that its number of heads must stay a multiple of four."""
    model = tiny(
        CodeGenConfig(
            n_embd=32, n_layer=2, n_head=4, n_inner=37, vocab_size=99, rotary_dim=4, bos_token_id=1, eos_token_id=2
        )
    )
    sites = find_sites(model)
    mask = uneven_mask(sites)
    inputs = example_inputs(model)
    before = hidden_states(model, inputs)
    with pytest.raises(RemovalError) as caught:
        remove_(model, mask)
    message = str(caught.value)
    assert "CodeGenModel does not run with fewer units at site h.0.attn: its code counts on all of them" in message
    assert "CodeGenAttention._split_heads, `reshaped = x.reshape(" in message
    assert "gate its units with `secateur.gated`" in message
    assert type(model.h[0].attn).__mro__[1] is torch.nn.Module
    assert largest_difference(before, hidden_states(model, inputs)) == 0
    assert not hasattr(model.config, "head_pruning")
    with gated(model, mask):  # what the message says works
        assert largest_difference(before, hidden_states(model, inputs)) > 1e-3


def test_an_error_outside_the_model_has_no_site():
    model = timesformer()
    with running_modules(model) as running:
        pass
    assert site_of(running, ["encoder"]) is None
    assert place_of(ValueError("elsewhere"), model) == "TimesformerModel"


def test_the_modules_that_an_error_came_through_stay_noted_and_those_that_caught_one_do_not():
    model = timesformer()
    first, second = (layer.attention.attention for layer in model.encoder.layer)
    inputs = example_inputs(model)
    caught = first.forward

    def catching(*args, **kwargs):
        try:
            return model.encoder.layer[0].intermediate(None)
        except TypeError:
            return caught(*args, **kwargs)

    first.forward = catching
    second.forward = None
    with running_modules(model) as running, pytest.raises(TypeError):
        model(**inputs)
    layer = "encoder.layer.1"
    assert running == ["", "encoder", layer, f"{layer}.attention", f"{layer}.attention.attention"]
    sites = [f"encoder.layer.{number}.attention.attention" for number in (0, 1)]
    assert site_of(running, sites) == site_of(running[:-1], sites) == site_of(running[:-2], sites) == sites[1]
    assert site_of(running[:-3], sites) is site_of([*running[:-2], f"{layer}.output"], sites) is None
    assert not model.encoder._forward_hooks
    assert not model.encoder._forward_pre_hooks


def test_a_recipe_that_reshapes_an_unknown_site_is_refused():
    model = timesformer()
    remove_(model, uneven_mask(find_sites(model)))
    entry = copy.deepcopy(model.config.head_pruning)
    entry["reshaped"] = ["nowhere"]
    with pytest.raises(CheckpointError, match=r"reshaped` must name sites of the recipe, got 'nowhere'"):
        Recipe.from_json(entry)
