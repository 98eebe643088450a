"""The criteria of other papers, each against its formula worked out by other means."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, CLIPTextConfig

import secateur
from secateur.errors import InvalidInputError, UnsupportedModelError
from secateur.heads import HeadScores
from secateur.meta.objective import relations, represent
from secateur.model.classifier import with_new_head
from secateur.model.inputs import example_inputs
from secateur.model.probe import HeadReading, probe
from secateur.model.removal import remove_heads_
from secateur.model.sites import find_sites
from secateur.pruning import score_heads
from secateur.scorers import SCORERS, labelled, make_scorer, scorer_class
from secateur.scorers.labelled import text_losses
from secateur.scorers.relational_taylor import kl_sample
from secateur.selection import select_heads
from tests.test_scorers import condition
from tests.tiny import tiny_classifier, tiny_model, tiny_texts, tiny_tokenizer, uneven_mask

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
    scores = score_heads(model, texts, "confidence", tokenizer)
    total, words = torch.zeros(4), []
    with torch.no_grad(), probe(model, lambda r: words.append(r.weights[0]), weights=True):
        for text in texts:
            batch = tokenizer(text, return_tensors="pt")
            words.clear()
            model(**batch)
            total += words[0][:, 1:-1, 1:-1].amax(dim=-1).mean(dim=-1) / len(texts)
    torch.testing.assert_close(scores["encoder.layer.0.attention.self"], total.double(), atol=1e-6, rtol=0)

    batch = example_inputs(model, batch=3, length=8, padding=0)
    plain = score_heads(model, scorer="confidence", inputs=[batch])
    model.config.eos_token_id = [int(batch["input_ids"][0, 4]), 98]
    fewer = score_heads(model, scorer="confidence", inputs=[batch])
    assert all(not torch.equal(plain[s], fewer[s]) for s in plain)


def half_curvature(model, batch, site, heads):
    """KL of a slightly closed gate over the square of the step: central differences in double precision."""

    def log_probabilities(gate):
        with torch.no_grad(), probe(model, gates={site: gate}):
            return relations(represent(model, model(**batch), batch, is_pair=False))

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
        name: torch.ones(site.num_heads, dtype=torch.float64, requires_grad=True)
        for name, site in find_sites(model).items()
    }
    with probe(model, gates=gates):
        pairs = relations(represent(model, model(**batch), batch, is_pair=False))
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
    found = score_heads(model, scorer="relational_taylor", inputs=[batch], samples=400)[site]
    assert found.tolist() == pytest.approx(half_curvature(model.double(), batch, site, 4), rel=0.25)


def test_relational_taylor_bad_input():
    model = tiny_model("bert")
    with pytest.raises(InvalidInputError, match="`samples` must be a whole number from 1, got 0"):
        make_scorer("relational_taylor", samples=0)
    with pytest.raises(InvalidInputError, match="needs a batch of 2 texts or more"):
        score_heads(model, scorer="relational_taylor", inputs=[example_inputs(model, batch=1)])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_work_whatever_the_caller_switched_off(mode):
    model = tiny_model("bert")
    expected = score_heads(model, tiny_texts(4), "relational_taylor", tiny_tokenizer())
    with mode():
        found = score_heads(model, tiny_texts(4), "relational_taylor", tiny_tokenizer())
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
    taylor = score_heads(model, scorer="taylor", normalize=False, **given)
    normal = score_heads(model, scorer="taylor", **given)
    fisher = score_heads(model, scorer="fisher", **given)
    diagonal = score_heads(model, scorer="fisher", rearrange=False, **given)
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
    remove_heads_(model, uneven_mask(sites))
    scores = score_heads(model, scorer="fisher", inputs=inputs, labels=[0, 1, 2, 1])
    for site, matrix in scores.interactions.items():
        gone = scores[site] == -math.inf
        assert bool(gone.any()) == (site != list(sites)[1])
        assert not matrix[gone].any()
        assert not matrix[:, gone].any()
        torch.testing.assert_close(matrix.diagonal()[~gone], scores[site][~gone])
        mask = select_heads(scores, 0.5)
        assert not (mask[site] & gone).any()


def pairwise(*gradients):
    """Scores of one site from every head's gradients over two texts."""
    g = torch.tensor(gradients, dtype=torch.float64)
    matrix = g @ g.T / g.shape[1]
    return HeadScores({"a": matrix.diagonal()}, interactions={"a": matrix})


def test_rearrangement_by_hand():
    """Heads 0 and 2 cancel: together they cost nothing, though 1 is the second cheapest alone."""
    scores = pairwise((1.0, 0.0), (1.0, 0.1), (-1.1, 0.0), (3.0, 3.0))
    alone = HeadScores(dict(scores))
    assert select_heads(alone, 0.5).kept_heads == {"a": [2, 3]}
    assert select_heads(scores, 0.5).kept_heads == {"a": [1, 3]}
    assert select_heads(scores, 0.5, scope="global").kept_heads == {"a": [1, 3]}
    assert select_heads(scores, 0.25).kept_heads == {"a": [1, 2, 3]}
    assert select_heads(scores, 0).kept_heads == {"a": [0, 1, 2, 3]}
    assert select_heads(HeadScores.from_json(scores.to_json()), 0.5).kept_heads == {"a": [1, 3]}


@pytest.mark.parametrize("seed", range(5))
def test_rearrangement_is_the_papers_greedy_swap(seed):
    """Against the cost of whole sets of heads, written down from the gradients."""
    gradients = torch.randn(9, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def cost(heads):
        return float(gradients[sorted(heads)].sum(dim=0).square().mean())

    scores = pairwise(*gradients.tolist())
    order = sorted(range(9), key=lambda h: cost({h}))
    dropped = set(order[:4])
    for head in order[4:]:
        options = [(dropped - {d}) | {head} for d in dropped]
        dropped = min([dropped, *options], key=cost)
    mask = select_heads(scores, 4 / 9)["a"]
    assert set((~mask).nonzero().flatten().tolist()) == dropped
    assert cost(dropped) < cost(order[:4])  # each of these seeds has something to gain


def test_grouped_heads_are_not_rearranged():
    scores = pairwise((1.0, 0.0), (1.0, 0.1), (-1.1, 0.0), (3.0, 3.0))
    grouped = HeadScores(dict(scores), {"a": 2}, interactions=scores.interactions)
    assert select_heads(grouped, 0.5) == select_heads(HeadScores(dict(scores), {"a": 2}), 0.5)


def test_bad_interactions():
    ones = {"a": torch.ones(2)}
    for matrix in (torch.ones(2), torch.ones(3, 3), torch.full((2, 2), math.nan)):
        with pytest.raises(InvalidInputError, match=r"`interactions\['a'\]` must be finite numbers \[2, 2\]"):
            HeadScores(ones, interactions={"a": matrix})
    with pytest.raises(InvalidInputError, match="`interactions` must name sites that have scores, got 'b'"):
        HeadScores(ones, interactions={"b": torch.ones(2, 2)})
    data = HeadScores(ones).to_json()
    for wrong in ([1], {"a": "x"}, {"a": [[1], [1, 2]]}, None):
        with pytest.raises(InvalidInputError, match="`interactions` must map each site to rows of numbers"):
            HeadScores.from_json({**data, "interactions": wrong})


LABELLED = [name for name in SCORERS if scorer_class(name).needs_labels]
TEXTS = [f"{word} {filler}" for filler in ("film", "plot", "actor", "scene") for word in ("good", "bad")]


@pytest.mark.parametrize("name", LABELLED)
def test_a_base_model_gets_a_head_on_a_copy(name):
    model, scores = tiny_model("bert").train(), []
    given = {"labels": [1, 0] * 4, "max_length": 16, "batch_size": 4}
    for seed in (0, 0, 1):
        torch.rand(1)  # the seed alone decides, not torch's state
        before = condition(model)
        scores.append(score_heads(model, TEXTS, name, tiny_tokenizer(), seed=seed, warmup_epochs=1, **given))
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
    score_heads(tiny_model("bert"), TEXTS * 4, scorer, tiny_tokenizer(), labels=[1, 0] * 16, batch_size=8)
    assert float(torch.cat(seen).mean()) > 0.9


def test_a_pruned_base_model_gets_a_head_too():
    model = tiny_model("bert")
    remove_heads_(model, uneven_mask(find_sites(model)))
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
    scores = score_heads(model, TEXTS, "taylor", tokenizer, labels=[1, 0] * 4, max_length=16)
    assert model.config.pad_token_id is None
    assert all(float(v.norm()) == pytest.approx(1) for v in scores.values())


def test_labels_that_do_not_fit():
    model, tokenizer = tiny_classifier("bert", 2), tiny_tokenizer()
    with pytest.raises(InvalidInputError, match="scorer taylor needs `labels`, one for each text"):
        score_heads(model, TEXTS, "taylor", tokenizer)
    with pytest.raises(InvalidInputError, match="`labels` must hold one label for each of the 8 texts, got 3"):
        score_heads(model, TEXTS, "taylor", tokenizer, labels=[0, 1, 0])
    with pytest.raises(InvalidInputError, match="`model` must have 3 outputs or more"):
        score_heads(model, TEXTS, "fisher", tokenizer, labels=[0, 1, 2, 0, 1, 2, 0, 1])
    with pytest.raises(InvalidInputError, match="`inputs` hold no texts to fine-tune a classification head on"):
        score_heads(tiny_model("bert"), scorer="taylor", inputs=[example_inputs(model)], labels=[0, 1])
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
