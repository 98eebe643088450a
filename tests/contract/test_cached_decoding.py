"""A pruned model that decodes with a cache computes what it computes without one, also where layers hold no heads."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    StaticCache,
)

from secateur.errors import RemovalError
from secateur.models.inputs import example_inputs
from secateur.removal import emptied as emptied_blocks
from secateur.removal.proof import cached_step
from secateur.removal.remove import remove_
from secateur.sites.attention import find_sites
from secateur.sites.finding import find_units
from secateur.units.masks import Mask
from tests.support.tiny import CONFIGS, tiny_model
from tests.support.units import ragged_mask

DECODERS = ["gpt2", "llama", "qwen2", "gpt_neox", "opt", "phi3", "falcon", "bloom", "xglm"]
ENCODER_DECODERS = ["t5", "bart"]
EMPTIED = {"first": slice(0, 1), "all but the last": slice(0, -1), "all": slice(None)}


def language_model(kind):
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if kind in ENCODER_DECODERS else AutoModelForCausalLM
    model = auto.from_config(CONFIGS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def emptying(model, which):
    """Drop every head of the chosen sites, of encoder and decoder alike."""
    sites = find_sites(model)
    stacks = {}
    for name in sites:
        stacks.setdefault((name.partition(".")[0], name.rpartition(".")[2]), []).append(name)
    bare = {name for names in stacks.values() for name in names[EMPTIED[which]]}
    return Mask({name: torch.full((site.num_units,), name not in bare) for name, site in sites.items()})


def emptied(kind, which):
    model = language_model(kind)
    assert remove_(model, emptying(model, which)).max_difference <= 1e-4
    return model


def arguments(kind, tokens, texts):
    """Keyword arguments for decoding `tokens`; an encoder reads the same text at every step."""
    if kind in ENCODER_DECODERS:
        return {"input_ids": texts, "decoder_input_ids": tokens}
    return {"input_ids": tokens}


@torch.no_grad()
def largest_difference_of_a_cached_step(model, kind, cache=None):
    """Of the logits of three steps with a cache (five tokens, one, two), to those of all tokens at once."""
    torch.manual_seed(1)
    tokens, texts = torch.randint(4, 99, (2, 8)), torch.randint(4, 99, (2, 6))
    wanted = model(**arguments(kind, tokens, texts), use_cache=False).logits
    logits = []
    for start, end in ((0, 5), (5, 6), (6, 8)):
        step = model(**arguments(kind, tokens[:, start:end], texts), use_cache=True, past_key_values=cache)
        cache = step.past_key_values
        logits.append(step.logits)
    assert int(cache.get_seq_length()) == 8
    return float((torch.cat(logits, dim=1) - wanted).abs().max()), cache


@pytest.mark.parametrize(
    ("kind", "which"),
    [
        *((kind, "all") for kind in (*DECODERS, *ENCODER_DECODERS)),
        *((kind, which) for kind in ("gpt2", "llama", "bloom", "t5") for which in ("first", "all but the last")),
    ],
)
def test_a_cached_step_is_that_of_all_tokens(kind, which, tmp_path):
    model = emptied(kind, which)
    assert largest_difference_of_a_cached_step(model, kind)[0] <= 1e-4
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert largest_difference_of_a_cached_step(again, kind)[0] <= 1e-4


@pytest.mark.parametrize("which", EMPTIED)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_a_step_with_a_static_cache_is_that_of_all_tokens(kind, which):
    model = emptied(kind, which)
    cache = StaticCache(config=model.config, max_cache_len=12)
    assert largest_difference_of_a_cached_step(model, kind, cache)[0] <= 1e-4


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODER_DECODERS])
def test_every_cache_and_beam_search_generate_the_same(kind):
    model = emptied(kind, "first")
    start = torch.tensor([[5, 6, 7], [8, 9, 10]])

    def run(beams, **cache):
        made = model.generate(
            start, max_new_tokens=6, min_new_tokens=6, num_beams=beams, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True, **cache,
        )  # fmt: skip
        return made.sequences, torch.stack(made.logits)

    for beams in (1, 3):
        tokens, logits = run(beams, use_cache=False)
        for cache in ({"use_cache": True}, *([] if kind == "bloom" else [{"cache_implementation": "static"}])):
            cached_tokens, cached_logits = run(beams, **cache)
            assert torch.equal(cached_tokens, tokens)
            assert float((cached_logits - logits).abs().max()) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_cache_of_an_emptied_layer_is_cropped_and_reordered_like_any_other(kind):
    model = emptied(kind, "first")
    tokens = torch.randint(4, 99, (3, 8), generator=torch.Generator().manual_seed(2))
    wanted = model(tokens, use_cache=False).logits
    cache = model(tokens[:, :7], use_cache=True).past_key_values
    cache.crop(-2)
    assert cache.get_seq_length() == 5
    order = torch.tensor([2, 0])
    cache.batch_select_indices(order)
    step = model(tokens[order, 5:], past_key_values=cache, use_cache=True).logits
    assert float((step - wanted[order, 5:]).abs().max()) <= 1e-4
    cache.reorder_cache(torch.tensor([1, 0]))
    numbers = sum(layer.keys[0].numel() for layer in cache.layers[:1])
    assert numbers == 8  # one a token


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODER_DECODERS])
def test_a_removal_that_is_wrong_with_a_cache_alone_is_refused(kind, monkeypatch):
    monkeypatch.setattr(emptied_blocks, "_update", lambda update, *args: update(*args))
    model = language_model(kind)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RemovalError, match=r"differs from the gated model|does not run with fewer units"):
        remove_(model, emptying(model, "first"))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_cached_step_is_compared_where_there_is_a_cache(kind):
    model = tiny_model(kind)
    step = cached_step(model, example_inputs(model))
    if kind in (*DECODERS, *ENCODER_DECODERS, "qwen3_next"):
        assert step[0].shape[1] == 11
    else:
        assert step is None


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODER_DECODERS])
def test_a_cached_step_without_neurons_and_the_first_layer(kind):
    model = language_model(kind)
    remove_(model, ragged_mask(find_units(model, ["neurons", "layers"])))
    assert largest_difference_of_a_cached_step(model, kind)[0] <= 1e-4
