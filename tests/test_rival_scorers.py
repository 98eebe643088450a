"""The criteria of other papers, each against its formula worked out by other means."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from secateur.errors import InvalidInputError
from secateur.meta.objective import relations, represent
from secateur.model.inputs import example_inputs
from secateur.model.probe import HeadReading, probe
from secateur.model.sites import find_sites
from secateur.pruning import score_heads
from secateur.scorers import make_scorer
from secateur.scorers.relational_taylor import kl_sample
from tests.tiny import tiny_model, tiny_texts, tiny_tokenizer

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
