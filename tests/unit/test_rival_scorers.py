"""The criteria of other papers, each against its formula worked out by other means."""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel, CLIPTextConfig

import secateur
from secateur.errors import InvalidInputError, SecateurError, UnsupportedModelError
from secateur.models.classifier import with_new_head
from secateur.models.inputs import example_inputs
from secateur.relations import relations, represent
from secateur.removal.remove import remove_
from secateur.scorers import SCORERS, dsp, labelled, learned, make_scorer, scorer_class
from secateur.scorers.dsp import relaxed_top_k
from secateur.scorers.l0 import hard_concrete, open_probability
from secateur.scorers.labelled import text_losses
from secateur.scorers.relational_taylor import kl_sample
from secateur.scorers.score import score
from secateur.settings import Cut, Reading
from secateur.sites.attention import find_sites
from secateur.sites.gating import HeadReading, probe
from secateur.units.scores import Scores
from secateur.units.select import select
from tests.support.scoring import condition
from tests.support.tiny import tiny_classifier, tiny_model, tiny_texts, tiny_tokenizer, uneven_mask

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 99
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")

# One text of three tokens, [CLS] a [SEP] with the ids 2, 9, 3, then padding; two heads.
MAPS = torch.tensor(
    [
        [
            [[1.0, 0.0, 0.0, 0.0], [0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0], [0.3, 0.3, 0.4, 0.0]],
            [[0.0, 0.5, 0.5, 0.0], [0.0, 0.9, 0.1, 0.0], [0.5, 0.5, 0.0, 0.0], [0.9, 0.1, 0.0, 0.0]],
        ]
    ]
)
TEXT = {"input_ids": torch.tensor([[2, 9, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}


def read(name, special_ids=frozenset()):
    reading = HeadReading("site", None, None, None, None, MAPS, None)
    return make_scorer(name).read(reading, TEXT, SimpleNamespace(special_ids=special_ids))[0].tolist()


def test_entropy_by_hand():
    """Head 0: rows of 0, 1.5 log 2 and 0 nats; head 1: log 2, the entropy of (0.9, 0.1), log 2; padding is no row."""
    mixed = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    expected = [-1.5 * math.log(2) / 3, -(2 * math.log(2) + mixed) / 3]
    assert read("entropy") == pytest.approx(expected, rel=1e-5)


def test_confidence_by_hand():
    assert read("confidence") == pytest.approx([(1 + 0.5 + 1) / 3, (0.5 + 0.9 + 0.5) / 3])
    # Without [CLS] and [SEP] only token `a` looks, and only `a` is looked at.
    assert read("confidence", frozenset({0, 2, 3})) == pytest.approx([0.25, 0.9])
    # With [SEP] alone left out, as the paper leaves out the end of a sentence, rows 0 and 1 count over columns 0 and 1.
    assert read("confidence", frozenset({3})) == pytest.approx([(1 + 0.5) / 2, (0.5 + 0.9) / 2])


def test_confidence_takes_special_tokens_from_the_tokenizer_or_the_config():
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()
    texts = tiny_texts(6)
    scores = score(model, texts, "confidence", tokenizer)
    total, words = torch.zeros(4), []
    with torch.no_grad(), probe(model, lambda r: words.append(r.weights[0]), weights=True):
        for text in texts:
            batch = tokenizer(text, return_tensors="pt")
            words.clear()
            model(**batch)
            total += words[0][:, 1:-1, 1:-1].amax(dim=-1).mean(dim=-1) / len(texts)
    torch.testing.assert_close(scores["encoder.layer.0.attention.self"], total.double(), atol=1e-6, rtol=0)

    batch = example_inputs(model, batch=3, length=8, padding=0)
    plain = score(model, scorer="confidence", inputs=[batch])
    model.config.eos_token_id = [int(batch["input_ids"][0, 4]), 98]
    fewer = score(model, scorer="confidence", inputs=[batch])
    assert all(not torch.equal(plain[s], fewer[s]) for s in plain)


def half_curvature(model, batch, site, heads):
    """KL of a slightly closed gate over the square of the step: central differences in double precision."""

    def log_probabilities(gate):
        with torch.no_grad(), probe(model, gates={site: gate}):
            return relations(represent(model, model(**batch), batch, False))

    dense, step, found = log_probabilities(torch.ones(heads)), 1e-3, []
    for head in range(heads):
        total = 0.0
        for sign in (1, -1):
            gate = torch.ones(heads, dtype=torch.float64)
            gate[head] -= sign * step
            entries = dense.exp() * (dense - log_probabilities(gate))
            total += float(entries.mean()) / step**2 / 2
        found.append(total)
    return found


def test_relational_taylor_is_the_second_order_kl_exactly_in_the_mean_over_signs():
    model = tiny_model("bert").double()
    batch = example_inputs(model, batch=3, length=8)
    gates = {
        name: torch.ones(site.num_units, dtype=torch.float64, requires_grad=True)
        for name, site in find_sites(model).items()
    }
    with probe(model, gates=gates):
        pairs = relations(represent(model, model(**batch), batch, False))
    assert pairs.shape == (4, 2)
    draws = [kl_sample(pairs, gates, torch.tensor(s)) for s in itertools.product([1.0, -1.0], repeat=4)]
    for name in gates:
        mean = torch.stack([draw[name] for draw in draws]).mean(dim=0)
        assert mean.tolist() == pytest.approx(half_curvature(model, batch, name, 4), rel=1e-3)
        assert float(mean.max()) > 1e-6


def test_relational_taylor_comes_near_with_many_samples():
    model = tiny_model("bert")
    batch = example_inputs(model, batch=6, length=8)
    site = "encoder.layer.1.attention.self"
    found = score(model, scorer="relational_taylor", inputs=[batch], samples=400)[site]
    assert found.tolist() == pytest.approx(half_curvature(model.double(), batch, site, 4), rel=0.25)


def test_relational_taylor_bad_input():
    with pytest.raises(InvalidInputError, match="`samples` must be a whole number from 1, got 0"):
        make_scorer("relational_taylor", samples=0)


@pytest.mark.parametrize("name", ["leave_one_out", "relational_taylor"])
def test_texts_without_relations_are_refused(name):
    model = tiny_model("bert")
    with pytest.raises(InvalidInputError, match=r"`texts` must be at least 3 a batch.*got 2; give more texts"):
        score(model, scorer=name, inputs=[example_inputs(model, batch=2)])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_work_whatever_the_caller_switched_off(mode):
    model = tiny_model("bert")
    expected = score(model, tiny_texts(4), "relational_taylor", tiny_tokenizer())
    with mode():
        found = score(model, tiny_texts(4), "relational_taylor", tiny_tokenizer())
    assert all(torch.equal(found[s], expected[s]) for s in found)


def scaled_losses(model, batch, labels, layer, head, factor):
    """Each text's loss when one head's outputs are scaled: by a hook on BERT's own output projection, no probe."""
    width = 8

    def scale(module, args):
        outputs = args[0].clone()
        outputs[..., head * width : (head + 1) * width] *= factor
        return (outputs,)

    handle = model.bert.encoder.layer[layer].attention.output.dense.register_forward_pre_hook(scale)
    with torch.no_grad():
        logits = model(**batch).logits
    handle.remove()
    if model.config.num_labels == 1:
        return (logits[:, 0] - torch.tensor(labels)) ** 2
    return -logits.log_softmax(dim=1)[range(len(labels)), labels]


def finite_differences(model, batches, labels, layer):
    """∂L/∂gate of every text and head `[texts, heads]`, by central differences in double precision."""
    rows, model = [], model.double()
    for batch in batches:
        own, labels = labels[: len(batch["input_ids"])], labels[len(batch["input_ids"]) :]
        columns = []
        for head in range(4):
            more, less = (scaled_losses(model, batch, own, layer, head, 1 + step) for step in (1e-5, -1e-5))
            columns.append((more - less) / 2e-5)
        rows.append(torch.stack(columns, dim=1))
    return torch.cat(rows).double()


@pytest.mark.parametrize(("num_labels", "labels"), [(3, [2, 0, 1, 1, 0]), (1, [0.5, -1.0, 2.0, 0.0, 1.0])])
def test_taylor_and_fisher_are_means_over_texts_of_finite_differences(num_labels, labels):
    model = tiny_classifier("bert", num_labels)
    batches = [example_inputs(model, batch=3, length=8), example_inputs(model, batch=2, length=6)]
    given = {"inputs": batches, "labels": labels}
    taylor = score(model, scorer="taylor", normalize=False, **given)
    normal = score(model, scorer="taylor", **given)
    fisher = score(model, scorer="fisher", **given)
    diagonal = score(model, scorer="fisher", rearrange=False, **given)
    for layer, site in enumerate(taylor):
        rows = finite_differences(model, batches, labels, layer)
        close = {"rtol": 2e-3, "atol": 1e-7}
        torch.testing.assert_close(taylor[site], rows.abs().mean(dim=0), **close)
        torch.testing.assert_close(normal[site], taylor[site] / taylor[site].square().sum().sqrt())
        expected = sum(torch.outer(row, row) for row in rows) / len(rows)
        torch.testing.assert_close(fisher.interactions[site], expected, rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(fisher[site], expected.diagonal(), **close)
        torch.testing.assert_close(diagonal[site], fisher[site])
    assert not diagonal.interactions
    assert not taylor.interactions


def test_fisher_of_a_pruned_model_in_original_numbering():
    model = tiny_classifier("bert")
    inputs = [example_inputs(model, batch=4, length=8)]
    sites = find_sites(model)
    remove_(model, uneven_mask(sites))
    scores = score(model, scorer="fisher", inputs=inputs, labels=[0, 1, 2, 1])
    for site, matrix in scores.interactions.items():
        gone = scores[site] == -math.inf
        assert bool(gone.any()) == (site != list(sites)[1])
        assert not matrix[gone].any()
        assert not matrix[:, gone].any()
        torch.testing.assert_close(matrix.diagonal()[~gone], scores[site][~gone])
        mask = select(scores, 0.5)
        assert not (mask[site] & gone).any()


def test_bad_interactions():
    ones = {"a": torch.ones(2)}
    for matrix in (torch.ones(2), torch.ones(3, 3), torch.full((2, 2), math.nan)):
        with pytest.raises(InvalidInputError, match=r"`interactions\['a'\]` must be finite numbers \[2, 2\]"):
            Scores(ones, interactions={"a": matrix})
    with pytest.raises(InvalidInputError, match="`interactions` must name sites that have scores, got 'b'"):
        Scores(ones, interactions={"b": torch.ones(2, 2)})
    data = Scores(ones).to_json()
    for wrong in ([1], {"a": "x"}, {"a": [[1], [1, 2]]}, None):
        with pytest.raises(InvalidInputError, match="`interactions` must map each site to rows of numbers"):
            Scores.from_json({**data, "interactions": wrong})


LABELLED = [name for name in SCORERS if scorer_class(name).needs_labels]
TEXTS = [f"{word} {filler}" for filler in ("film", "plot", "actor", "scene") for word in ("good", "bad")]


@pytest.mark.parametrize("name", LABELLED)
def test_a_base_model_gets_a_head_on_a_copy(name):
    model, scores = tiny_model("bert").train(), []
    given = {"labels": [1, 0] * 4}
    for seed in (0, 0, 2**32 - 1):
        torch.rand(1), random.random(), np.random.rand()  # the seed alone decides, not the state of a generator
        before = condition(model)
        scores.append(
            score(model, TEXTS, name, tiny_tokenizer(), warmup_epochs=1, reading=Reading(4, 16, seed), **given)
        )
        assert condition(model) == before
    assert list(scores[0]) == list(find_sites(model))
    assert all(torch.equal(scores[0][s], scores[1][s]) for s in scores[0])
    assert any(not torch.equal(scores[0][s], scores[2][s]) for s in scores[0])


def test_the_fine_tuned_copy_has_learned_the_labels(monkeypatch):
    """What is scored is the loss of a head that tells the classes apart."""
    seen = []

    def remember(model, batch, labels, gates):
        seen.append((model(**batch).logits.argmax(dim=1) == labels).float())
        return text_losses(model, batch, labels, gates)

    monkeypatch.setattr(labelled, "text_losses", remember)
    scorer = make_scorer("taylor", warmup_epochs=12, warmup_learning_rate=3e-3)
    score(tiny_model("bert"), TEXTS * 4, scorer, tiny_tokenizer(), labels=[1, 0] * 16, reading=Reading(batch_size=8))
    assert float(torch.cat(seen).mean()) > 0.9


def test_a_pruned_base_model_gets_a_head_too():
    model = tiny_model("bert")
    remove_(model, uneven_mask(find_sites(model)))
    head = with_new_head(model, 2, False)
    batch = example_inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(head.bert(**batch).last_hidden_state, model(**batch).last_hidden_state)
    assert head.config.num_labels == 2
    assert model.config.num_labels == 2  # the default, so look at a number of labels that is not
    assert with_new_head(model, 5, False).config.num_labels == 5
    assert model.config.num_labels == 2


def test_a_decoder_without_padding_token_is_scored_on_texts():
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    scores = score(model, TEXTS, "taylor", tokenizer, labels=[1, 0] * 4, reading=Reading(max_length=16))
    assert model.config.pad_token_id is None
    assert all(float(v.norm()) == pytest.approx(1) for v in scores.values())


def test_labels_that_do_not_fit():
    model, tokenizer = tiny_classifier("bert", 2), tiny_tokenizer()
    with pytest.raises(InvalidInputError, match="scorer taylor needs `labels`, one for each text"):
        score(model, TEXTS, "taylor", tokenizer)
    with pytest.raises(InvalidInputError, match="`labels` must hold one label for each of the 8 texts, got 3"):
        score(model, TEXTS, "taylor", tokenizer, labels=[0, 1, 0])
    with pytest.raises(InvalidInputError, match="`model` must have 3 outputs or more"):
        score(model, TEXTS, "fisher", tokenizer, labels=[0, 1, 2, 0, 1, 2, 0, 1])
    with pytest.raises(InvalidInputError, match="`inputs` hold no texts to fine-tune a classification head on"):
        score(tiny_model("bert"), scorer="taylor", inputs=[example_inputs(model)], labels=[0, 1])
    with pytest.raises(InvalidInputError, match="`warmup_epochs` must be None or a number from 0, got -1"):
        make_scorer("taylor", warmup_epochs=-1)
    with pytest.raises(InvalidInputError, match="`warmup_learning_rate` must be a number above 0, got 0"):
        make_scorer("fisher", warmup_learning_rate=0)
    with pytest.raises(UnsupportedModelError, match="transformers puts no classification head on"):
        with_new_head(AutoModel.from_config(CLIPTextConfig(**SMALL)), 2, False)


def test_prune_with_labels():
    pruned, report = secateur.prune(
        tiny_model("bert"), TEXTS, 0.5, scorer="fisher", tokenizer=tiny_tokenizer(), labels=[1, 0] * 4, warmup_epochs=1
    )
    assert report.after.heads == 6
    assert report.scorer == "fisher"
    assert type(pruned).__name__ == "BertModel"


def test_hard_concrete_by_hand():
    """At log α = 0 and u = 0.5 half open; far out in u, and at odds of 1 to 8, the stretched gate is clipped."""
    found = hard_concrete(torch.zeros(4), torch.tensor([0.5, 0.001, 0.999, 1 / 9]))
    below = 1 / (1 + 8**1.5) * 1.2 - 0.1
    assert below < 0
    assert found.tolist() == pytest.approx([0.5, 0.0, 1.0, 0.0])
    found = hard_concrete(torch.tensor([math.log(2.0)]), torch.tensor([0.5]))
    assert float(found) == pytest.approx(2**1.5 / (1 + 2**1.5) * 1.2 - 0.1)


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 2.0])
def test_open_probability_is_the_share_of_gates_above_zero(log_alpha):
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    gates = hard_concrete(torch.full_like(uniform, log_alpha), uniform)
    assert float((gates > 0).double().mean()) == pytest.approx(
        float(open_probability(torch.tensor(log_alpha))), abs=1e-4
    )


def adam_by_hand(start, slope, rate, steps):
    """One number under Adam with the schedule of `finetune`: it rises over the first tenth, then falls to 0."""
    x, m, v, warmup = start, 0.0, 0.0, math.ceil(0.1 * steps)
    for t in range(1, steps + 1):
        g = slope(x)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        factor = (t - 1) / warmup if t - 1 < warmup else (steps - t + 1) / (steps - warmup)
        x -= rate * factor * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return x


def test_l0_heads_that_write_nothing_pay_the_penalty_alone():
    """Their log α follows from the penalty by hand; that of the heads which do write follows the loss too."""
    model = tiny_classifier("bert", 2)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.output.dense.weight[:, :24] = 0
    labels = [0, 1] * 4
    given = {"inputs": [example_inputs(model, batch=8, length=8)], "labels": labels, "learning_rate": 1e-12}

    def slope(x):
        p = 1 / (1 + math.exp(-(x + 2 / 3 * math.log(11))))
        return 0.02 * p * (1 - p)

    scores = score(model, scorer="l0", penalty=0.02, start=1.5, epochs=20, **given)
    expected = adam_by_hand(1.5, slope, 0.1, 20)
    assert expected < 1
    for vector in scores.values():
        assert vector[:3].tolist() == pytest.approx([expected] * 3, rel=1e-4)
        assert float(vector[3]) != pytest.approx(expected, rel=1e-2)
    free = score(model, scorer="l0", penalty=0, start=1.5, epochs=20, **given)
    for vector in free.values():
        assert vector[:3].tolist() == pytest.approx([1.5] * 3, abs=1e-4)
        assert float(vector[3]) != pytest.approx(1.5, rel=1e-2)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_relaxed_top_k_by_enumeration(k):
    """At temperature 1 the softmaxes are Plackett-Luce's first step, and the next ones fall by what was taken."""
    keys = torch.tensor([0.3, -1.2, 2.0, 0.9], dtype=torch.float64)
    weights, expected = keys.exp().tolist(), [0.0] * 4
    for _ in range(k):
        share = [w / sum(weights) for w in weights]
        expected = [e + s for e, s in zip(expected, share, strict=True)]
        weights = [w * (1 - s) for w, s in zip(weights, share, strict=True)]
    found = relaxed_top_k(keys, k, 1.0)
    assert found.tolist() == pytest.approx(expected)
    assert float(found.sum()) == pytest.approx(k)
    best = [0.0] * 4
    for i in (2, 3, 0)[:k]:
        best[i] = 1.0
    assert relaxed_top_k(keys, k, 0.01).tolist() == pytest.approx(best, abs=1e-6)


def test_straight_through_is_hard_forward_and_relaxed_backward():
    soft_keys = torch.tensor([0.3, -1.2, 2.0, 0.9], requires_grad=True)
    hard_keys = soft_keys.detach().clone().requires_grad_()
    direction = torch.tensor([1.0, 2.0, -1.0, 0.5])
    hard = relaxed_top_k(hard_keys, 2, 0.7, straight_through=True)
    assert hard.tolist() == pytest.approx([0, 0, 1, 1], abs=1e-6)
    (hard * direction).sum().backward()
    (relaxed_top_k(soft_keys, 2, 0.7) * direction).sum().backward()
    torch.testing.assert_close(hard_keys.grad, soft_keys.grad)
    step = torch.tensor([1e-3, 0, 0, 0])
    with torch.no_grad():
        more, less = (relaxed_top_k(soft_keys.double() + s * step, 2, 0.7) for s in (1, -1))
    slope = ((more - less) * direction).sum() / 2e-3
    assert float(soft_keys.grad[0]) == pytest.approx(float(slope), rel=1e-3)


def test_dsp_keeps_as_many_heads_as_the_ratio_leaves(monkeypatch):
    """Gumbel keys are the weights plus noise, the gates sum to k over the whole model, and the temperature falls."""
    seen = []

    def remember(keys, k, temperature, straight_through):
        seen.append((k, temperature, straight_through))
        return relaxed_top_k(keys, k, temperature, straight_through)

    def losses(model, batch, labels, gates):
        assert model.training  # with dropout, as one fine-tunes
        return text_losses(model, batch, labels, gates)

    monkeypatch.setattr(learned, "text_losses", losses)
    monkeypatch.setattr(dsp, "relaxed_top_k", remember)
    model = tiny_classifier("bert")
    given = {"labels": [0, 1, 2, 0], "reading": Reading(batch_size=2), "tokenizer": tiny_tokenizer()}
    score(model, tiny_texts(4), "dsp", final_temperature=0.04, epochs=1.5, cut=Cut(pruning_ratio=0.75), **given)
    assert [s[0] for s in seen] == [3] * 3
    assert [s[1] for s in seen] == pytest.approx([1.0, 0.2, 0.04])
    seen.clear()
    secateur.prune(model, tiny_texts(4), 0.25, scorer="dsp", straight_through=True, **given)
    assert {(k, hard) for k, _, hard in seen} == {(9, True)}


def test_gumbel_noise_has_its_mean_and_spread(monkeypatch):
    monkeypatch.setattr(dsp, "relaxed_top_k", lambda keys, *rest: keys)
    torch.manual_seed(0)
    keys = make_scorer("dsp").gates(torch.full((200_000,), 5.0), SimpleNamespace(cut=Cut()), 0.0)
    assert float(keys.mean()) == pytest.approx(5 + 0.5772, abs=0.02)  # Euler's constant
    assert float(keys.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)


@pytest.mark.parametrize("name", ["l0", "dsp"])
def test_the_head_that_the_classes_hang_on_is_learned(name):
    """Heads 0 to 2 write next to nothing; what tells the classes apart goes through head 3."""
    model = tiny_model("bert")
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.output.dense.weight[:, :24] *= 0.01
            layer.attention.output.dense.weight[:, 24:] *= 3
    scores = score(
        model, TEXTS * 4, name, tiny_tokenizer(), labels=[1, 0] * 16, epochs=10, learning_rate=3e-3, warmup_epochs=5,
        warmup_learning_rate=3e-3, reading=Reading(batch_size=8),
    )  # fmt: skip
    total = torch.stack(list(scores.values())).sum(dim=0)
    assert int(total.argmax()) == 3


def test_learning_that_diverges_names_the_remedy():
    model = tiny_model("bert").train()
    before = condition(model)
    with pytest.raises(SecateurError, match="the loss became nan; try a lower `learning_rate`"):
        score(model, TEXTS, "dsp", tiny_tokenizer(), labels=[1, 0] * 4, learning_rate=1e30)
    assert condition(model) == before


@pytest.mark.parametrize(
    ("name", "option", "value", "rule"),
    [
        ("l0", "epochs", 0, "be a number above 0"),
        ("l0", "penalty", -1, "be a number from 0"),
        ("l0", "start", math.inf, "be a finite number"),
        ("dsp", "learning_rate", "fast", "be a number above 0"),
        ("dsp", "gate_learning_rate", True, "be a number above 0"),
        ("dsp", "final_temperature", 0, "be a number above 0"),
    ],
)
def test_options_out_of_range(name, option, value, rule):
    with pytest.raises(InvalidInputError, match=f"`{option}` must {rule}, got {value!r}"):
        make_scorer(name, **{option: value})
    with pytest.raises(InvalidInputError, match=r"`pruning_ratio` must be in \[0, 1\), got 1"):
        score(tiny_model("bert"), scorer="random", cut=Cut(pruning_ratio=1))
