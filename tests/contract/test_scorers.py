"""Every criterion keeps the contract; the formulas agree with examples done by hand."""

import math

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, EncoderDecoderModel

import secateur
from secateur.errors import CheckpointError, InvalidInputError
from secateur.models.inputs import example_inputs, forward_arguments
from secateur.pruners.writes import contribution_norms, gram_matrices, output_weights
from secateur.relations import relational_kl, represent
from secateur.removal.remove import gated, remove_
from secateur.scorers import SCORERS, make_scorer, scorer_class
from secateur.scorers.base import Scorer
from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.sites.gating import probe
from secateur.sites.layout import AttentionSite
from secateur.texts.tokenization import batches
from secateur.units.masks import Mask
from tests.support.scoring import LABELS, condition, inputs_of, model_for, options
from tests.support.tiny import CONFIGS, tiny_model, tiny_texts, tiny_tokenizer, uneven_mask

pytestmark = pytest.mark.usefixtures("one_thread")


def score_inputs(model, name, **chosen):
    return score(model, scorer=name, inputs=inputs_of(model), labels=LABELS, **chosen)


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("kind", ["bert", "albert", "vit", "gpt2", "llama", "bart"])
def test_every_scorer_scores_every_head_and_leaves_the_model_alone(name, kind):
    model = model_for(name, kind).train()
    model.get_input_embeddings().requires_grad_(False)
    chosen = options(name)
    before = condition(model)
    scores = score_inputs(model, name, **chosen)
    assert {s: v.numel() for s, v in scores.items()} == {s: x.num_units for s, x in find_sites(model).items()}
    assert all(bool(torch.isfinite(v).all()) for v in scores.values())
    assert all(len(set(v.tolist())) > 1 for v in scores.values())
    assert scores.scorer == name
    assert condition(model) == before
    again = score_inputs(model, name, **chosen)
    assert all(torch.equal(scores[s], again[s]) for s in scores)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", [name for name in SCORERS if scorer_class(name).needs_texts])
def test_every_scorer_leaves_the_model_alone_when_it_fails(name, bf16):
    model = model_for(name, "bert").train()
    chosen = options(name)
    before = condition(model)
    broken = inputs_of(model)
    broken[-1]["input_ids"][0, 0] = 99  # beyond the vocabulary
    with pytest.raises(IndexError):
        score(model, scorer=name, inputs=broken, labels=LABELS, reading=Reading(bf16=bf16), **chosen)
    assert condition(model) == before
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_passes_in_bfloat16_change_rounding_alone(name, kind):
    model, chosen = model_for(name, kind), options(name)
    before = condition(model)
    exact, rounded = (
        torch.cat(list(score_inputs(model, name, reading=Reading(bf16=bf16), **chosen).values()))
        for bf16 in (False, True)
    )
    assert condition(model) == before
    assert torch.equal(exact, rounded) != scorer_class(name).needs_texts
    assert float(torch.corrcoef(torch.stack([exact, rounded]))[0, 1]) > 0.999


def test_what_a_scorer_reads_is_summed_in_float32():
    model, seen = tiny_model("bert"), []

    class Watching(Scorer):
        def score(self, task):
            def keep(reading):
                seen.append((reading.outputs.dtype, torch.is_autocast_enabled("cpu")))
                assert (torch.eye(2) @ torch.eye(2)).dtype == torch.float32

            with probe(task.model, keep):
                out = task.model(**task.batches[0])
            seen.append((out.last_hidden_state.dtype, torch.is_autocast_enabled("cpu")))
            return {name: torch.arange(float(site.num_units)) for name, site in task.sites.items()}

    score(model, scorer=Watching(), inputs=[example_inputs(model)], reading=Reading(bf16=True))
    assert seen == [(torch.bfloat16, False)] * 3 + [(torch.float32, False)]


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_describes_itself(name):
    cls = scorer_class(name)
    assert issubclass(cls, Scorer)
    assert cls.description
    assert cls.source
    assert cls.passes
    assert cls.__doc__


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_pruned_model_is_scored_in_original_numbering(name, kind):
    model = model_for(name, kind)
    remove_(model, uneven_mask(find_sites(model), empty=True))
    scores = score_inputs(model, name, **options(name))
    for site, vector in scores.items():
        kept = model.config.head_pruning["kept_heads"][site]
        assert [h for h, x in enumerate(vector.tolist()) if x > -math.inf] == kept


@pytest.mark.parametrize("name", ["confidence", "contribution", "entropy", "matching", "smp"])
def test_padding_does_not_change_a_score(name):
    model = tiny_model("bert")
    batch = example_inputs(model, batch=2, length=8, padding=0)
    wider = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5), value=0),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5), value=0),
    }
    one, other = (score(model, scorer=name, inputs=[b], **options(name)) for b in (batch, wider))
    for site in one:
        torch.testing.assert_close(one[site], other[site], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in SCORERS if scorer_class(name).texts_apart])
def test_texts_of_like_length_share_a_batch_where_each_is_read_by_itself(name):
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()
    texts = ["good bad film", "good", "plot film plot good bad film plot", "bad", "film film film film", "plot"]
    seen = []
    hook = model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True)
    together = score(model, texts, name, tokenizer, reading=Reading(batch_size=2), **options(name))
    hook.remove()
    words = sorted((len(tokenizer(text)["input_ids"]) for text in texts), reverse=True)
    assert [tuple(shape) for shape in seen[-3:]] == [(2, words[0]), (2, words[2]), (2, words[4])]
    ready = batches(tokenizer, texts, 2)
    for site, row in score(model, None, name, tokenizer, inputs=ready, **options(name)).items():
        torch.testing.assert_close(together[site], row, atol=1e-5, rtol=0)


def test_random_depends_on_the_seed_alone():
    model = tiny_model("bert")
    draws = [score(model, scorer="random", reading=Reading(seed=seed)) for seed in (0, 0, 1)]
    site = next(iter(draws[0]))
    assert torch.equal(draws[0][site], draws[1][site])
    assert not torch.equal(draws[0][site], draws[2][site])


def test_magnitude_by_hand():
    model = tiny_model("bert")
    attention = model.encoder.layer[0].attention
    with torch.no_grad():
        attention.self.value.weight.zero_()
        attention.output.dense.weight.zero_()
        attention.self.value.weight[8:10, 0] = torch.tensor([3.0, 4.0])  # head 1: norm 5
        attention.output.dense.weight[0, 8] = 2.0  # head 1: norm 2
        attention.self.value.weight[16, 0] = 7.0  # head 2 writes nothing
    scores = score(model, scorer="magnitude")["encoder.layer.0.attention.self"]
    torch.testing.assert_close(scores, torch.tensor([0.0, 10.0, 0.0, 0.0], dtype=torch.float64))


# Qwen3-Next multiplies every head by a gate between attention and projection, which the norm does not see.
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "qwen3_next"])
def test_contributions_add_up_to_what_the_site_writes(kind):
    """The sum of all heads' vectors is the output projection's result, less its bias."""
    model = tiny_model(kind)
    sites = find_sites(model)
    inputs = example_inputs(model)
    outputs, written = {}, {}
    handles = [
        model.get_submodule(site.output).register_forward_hook(
            lambda module, args, result, name=name: written.setdefault(name, result.detach())
        )
        for name, site in sites.items()
    ]
    with torch.no_grad(), secateur.sites.gating.probe(model, lambda r: outputs.setdefault(r.site, r.outputs)):
        model(**inputs)
    for handle in handles:
        handle.remove()
    for name, site in sites.items():
        weights = output_weights(model, site)
        vectors = torch.einsum("bthi,hij->bthj", outputs[name], weights)
        bias = getattr(model.get_submodule(site.output), "bias", None)
        whole = vectors.sum(dim=2) + (0 if bias is None else bias)
        torch.testing.assert_close(whole, written[name].reshape(whole.shape), atol=1e-4, rtol=1e-4)
        norms = contribution_norms(outputs[name], gram_matrices(model, site))
        torch.testing.assert_close(norms, vectors.norm(dim=-1), atol=1e-4, rtol=1e-4)


def test_leave_one_out_is_the_kl_of_a_gated_head():
    model = tiny_model("bert")
    batch = example_inputs(model, batch=6, length=10)
    scores = score(model, scorer="leave_one_out", inputs=[batch])
    site = "encoder.layer.2.attention.self"
    with torch.no_grad():
        dense = represent(model, model(**batch), batch, False)
        with gated(model, Mask({site: torch.tensor([True, True, False, True])})):
            preview = represent(model, model(**batch), batch, False)
    assert float(scores[site][2]) == pytest.approx(float(relational_kl(dense, preview)), rel=1e-3)
    assert float(scores[site][2]) > 0


@pytest.mark.parametrize("pairs", [False, True])
def test_a_decoder_that_needs_tokens_of_its_own_reads_the_text_too(pairs):
    """T5 wants decoder inputs, which BART makes of its input by itself: both read the same."""
    model, texts, tokenizer = tiny_model("t5"), tiny_texts(8, 0, pairs), tiny_tokenizer()
    for scorer in ("contribution", "matching", "leave_one_out", "smp-plus"):
        scores = score(model, texts, scorer, tokenizer)
        assert all(len(set(row.tolist())) > 1 for row in scores.values()), scorer
    made = batches(tokenizer, texts)
    (given,), ids = forward_arguments(model, made), made[0]["input_ids"]
    assert given["decoder_input_ids"][:, 0].tolist() == [model.config.decoder_start_token_id] * 8
    assert torch.equal(given["decoder_input_ids"][:, 1:], ids[:, :-1])
    mine = {"input_ids": ids, "decoder_input_ids": ids[:, :3]}
    assert forward_arguments(model, [mine])[0]["decoder_input_ids"] is mine["decoder_input_ids"]
    assert "decoder_input_ids" not in forward_arguments(tiny_model("bart"), made)[0]
    joined = EncoderDecoderModel(encoder=tiny_model("bert"), decoder=BertLMHeadModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=99, is_decoder=True,
                   add_cross_attention=True)))  # fmt: skip
    joined.config.decoder_start_token_id = 2
    assert forward_arguments(joined, made)[0]["decoder_input_ids"][:, 0].tolist() == [2] * 8


def test_texts_for_a_model_of_images_are_refused():
    with pytest.raises(InvalidInputError, match="ViTModel takes `pixel_values` and no texts; give `inputs`"):
        score(tiny_model("vit"), ["a film"], "contribution", tiny_tokenizer())


def test_grouped_heads_share_the_norm_of_their_values():
    model = tiny_model("llama")
    site: AttentionSite = find_sites(model)["layers.0.self_attn"]
    values = model.layers[0].self_attn.v_proj.weight.view(4, -1).norm(dim=1).double()
    outputs = model.layers[0].self_attn.o_proj.weight.T.reshape(8, -1).norm(dim=1).double()
    expected = (values.repeat_interleave(2) * outputs).detach()
    torch.testing.assert_close(score(model, scorer="magnitude")[site.name], expected)


def test_bad_arguments():
    model = tiny_model("bert")
    with pytest.raises(InvalidInputError, match=r"`scorer` must be one of block_influence, confidence.*got 'best'"):
        score(model, [], scorer="best")
    with pytest.raises(InvalidInputError, match="scorer matching needs `texts`"):
        score(model)
    with pytest.raises(
        InvalidInputError, match="scorer random: `option` must not be given, as there are none, got 'speed'"
    ):
        make_scorer("random", speed=3)
    with pytest.raises(TypeError, match="must be a registered name or a Scorer"):
        score(model, scorer=3)
    with pytest.raises(InvalidInputError, match="`tokenizer` must be given"):
        score(model, ["a text"])
    with pytest.raises(InvalidInputError, match="`seed` must be a whole number"):
        score(model, scorer="random", reading=Reading(seed=0.5))
    with pytest.raises(CheckpointError, match="nowhere cannot be loaded as a MetaPruner"):
        score(model, scorer="smp", inputs=inputs_of(model), pruner="./nowhere")


def test_scores_that_are_not_finite_name_the_site():
    model = tiny_model("bert")
    with torch.no_grad():
        model.encoder.layer[2].attention.output.dense.weight[0, 0] = float("nan")
    with pytest.raises(InvalidInputError, match=r"the scores of site encoder\.layer\.2.* not finite"):
        score(model, inputs=inputs_of(model))


def test_a_scorer_of_ones_own():
    class Last(Scorer):
        description, source, passes, needs_texts = "keeps the last heads", "a test", "0", False

        def score(self, task):
            return {name: torch.arange(site.num_units) for name, site in task.sites.items()}

    scores = score(tiny_model("bert"), scorer=Last())
    mask = secateur.select(scores, 0.5)
    assert mask.kept["encoder.layer.0.attention.self"] == [2, 3]
