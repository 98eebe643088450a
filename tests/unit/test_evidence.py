"""Evidence of heads: the long way, by hand, and that neither width, padding, order nor batches change it."""

import itertools
import math

import pytest
import torch

from secateur.errors import InvalidInputError
from secateur.models.inputs import example_inputs, forward_arguments
from secateur.pruners.features import FEATURES, MAP_FEATURES
from secateur.pruners.kernels import second_moments, unbiased_hsic
from secateur.pruners.map_statistics import map_statistics
from secateur.pruners.writes import output_weights
from secateur.sites.attention import find_sites
from secateur.sites.gating import probe
from tests.support.joint import batches_of, column, evidence_of
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 30, 32])
def test_second_moments_in_blocks_are_those_of_the_whole(width):
    rows = torch.randn(20, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    torch.testing.assert_close(second_moments(rows), rows.T @ rows)


def contributions(model, batch):
    """What every head adds to the residual stream, `[heads, texts, tokens, model width]`, made the long way."""
    sites, found = find_sites(model), []
    with (
        torch.no_grad(),
        probe(
            model,
            lambda r: found.append(torch.einsum("bthi,hid->hbtd", r.outputs, output_weights(model, sites[r.site]))),
        ),
    ):
        model(**batch)
    return found


def hsic(first, second):
    """The unbiased estimate as a U-statistic: all (i, j, q, r) that differ, one by one."""
    total, count, n = torch.zeros(()), 0, len(first)
    for i, j, q, r in itertools.permutations(range(n), 4):
        total = total + first[i, j] * (second[i, j] + second[q, r] - 2 * second[i, q])
        count += 1
    return total / count


def test_hsic_does_not_depend_on_the_number_of_texts():
    random = torch.Generator().manual_seed(0)
    first, second = torch.randn(6, 3, generator=random), torch.randn(6, 3, generator=random)
    kernels = first @ first.T, second @ second.T
    torch.testing.assert_close(unbiased_hsic(*kernels), hsic(*kernels), atol=1e-4, rtol=1e-4)
    means = []
    for texts in (6, 40):
        x = torch.randn(2000, texts, 3, generator=random)
        y = x[..., :1] + torch.randn(2000, texts, 1, generator=random)
        means.append(float(unbiased_hsic(x @ x.mT, y @ y.mT).mean()))
    assert means[0] == pytest.approx(means[1], rel=0.1)
    assert means[1] == pytest.approx(1, rel=0.1)  # the squared covariance of x's first number with y


def test_sizes_directions_and_redundancy_by_the_long_way():
    model = tiny_model("bert")
    (batch,) = batches_of(model, 6, 6)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    evidence = evidence_of(model, [batch])
    with torch.no_grad():
        targets = model(**batch).last_hidden_state.mean(dim=1)
    targets = torch.nn.functional.normalize(targets - targets.mean(dim=0), dim=1)
    target = targets @ targets.T
    for number, written in enumerate(contributions(model, batch)):
        rows = slice(4 * number, 4 * number + 4)

        def check(name, expected, rows=rows):
            torch.testing.assert_close(column(evidence, name)[rows], expected, atol=2e-4, rtol=2e-4)

        size = written.norm(dim=-1).mean(dim=(1, 2)).log()
        check("size", size - size.mean())
        texts = written.mean(dim=2)
        texts = texts - texts.mean(dim=1, keepdim=True)
        variation = texts.norm(dim=-1).square().mean(dim=1).log() / 2
        check("variation", variation - variation.mean())
        common = torch.stack([hsic(t @ t.T, target) for t in texts])
        relevance = (common / hsic(target, target).sqrt()).clamp(min=0)
        relevance = relevance.clamp(min=1e-2 * float(relevance.mean())).log() / 2
        check("relevance", relevance - relevance.mean())
        own = torch.stack([hsic(t @ t.T, t @ t.T).sqrt() for t in texts])
        check("alignment", (common / (own * hsic(target, target).sqrt())).clamp(-1, 1))
        total = written.sum(dim=0)
        inner = (written * total).sum(dim=(1, 2, 3))
        check("cosine with site", inner / (written.flatten(1).norm(dim=1) * total.norm()))
        check("share of site", 4 * inner / total.square().sum())
        flat = torch.nn.functional.normalize(written.flatten(1), dim=1)
        likeness = flat @ flat.T
        torch.testing.assert_close(evidence.likeness[rows, rows], likeness, atol=1e-4, rtol=1e-4)
        check("nearest head", (likeness - 2 * torch.eye(4)).amax(dim=1))
    assert bool((evidence.likeness[:4, 4:] == 0).all())


def test_a_copied_head_is_explained_by_the_other():
    model = tiny_model("bert")
    attention = model.encoder.layer[1].attention
    with torch.no_grad():
        for linear in (attention.self.query, attention.self.key, attention.self.value):
            linear.weight[8:16] = linear.weight[:8]
            linear.bias[8:16] = linear.bias[:8]
        attention.output.dense.weight[:, 8:16] = attention.output.dense.weight[:, :8]
    evidence = evidence_of(model)
    unexplained = column(evidence, "unexplained")
    assert float(unexplained[4:6].max()) < -4
    assert float(unexplained[6:8].min()) > -4
    assert column(evidence, "nearest head")[4] == pytest.approx(1, abs=1e-4)
    assert evidence.likeness[4, 5] == pytest.approx(1, abs=1e-4)


def test_what_maps_look_like_by_hand():
    weights = torch.tensor([[[[1.0, 0, 0], [0.5, 0.5, 0], [0, 0.25, 0.75]]]])
    found = dict(zip(MAP_FEATURES, map_statistics(weights, torch.ones(1, 3))[0, 0].tolist(), strict=True))
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert found["entropy"] == pytest.approx((0 + math.log(2) + quarter) / 3 / math.log(3))
    assert found["confidence"] == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert found["to first"] == pytest.approx(1.5 / 3)
    assert found["to last"] == pytest.approx(0.75 / 3)
    assert found["to self"] == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert found["to previous"] == pytest.approx((0.5 + 0.25) / 3)
    assert found["to next"] == pytest.approx(0)


@pytest.mark.parametrize("kind", ["bert", "albert", "vit", "gpt2", "llama", "bart"])
def test_evidence_is_finite_for_every_kind(kind):
    model = tiny_model(kind)
    inputs = forward_arguments(
        model, [example_inputs(model, batch=4, length=10), example_inputs(model, batch=2, length=7)]
    )
    evidence = evidence_of(model, inputs)
    assert evidence.features.shape == (sum(s.num_units for s in find_sites(model).values()), len(FEATURES))
    assert bool(evidence.features.isfinite().all())
    assert float(evidence.likeness.abs().max()) <= 1


def test_padding_and_batching_and_order_change_nothing():
    model = tiny_model("bert")
    (whole,) = batches_of(model, 8, 8)
    parts = batches_of(model, 8, 2)
    one = evidence_of(model, [whole])
    for inputs in (parts, parts[::-1]):
        other = evidence_of(model, inputs)
        torch.testing.assert_close(other.features, one.features, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(other.likeness, one.likeness, atol=1e-4, rtol=1e-4)
    wider = {k: torch.nn.functional.pad(v, (0, 5)) if isinstance(v, torch.Tensor) else v for k, v in whole.items()}
    torch.testing.assert_close(evidence_of(model, [wider]).features, one.features, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("is_pair", [False, True])
def test_the_side_of_the_padding_changes_nothing(is_pair):
    from secateur.texts.tokenization import batches

    model, tokenizer, found = tiny_model("llama"), tiny_tokenizer(), []
    for side in ("right", "left"):
        tokenizer.padding_side = side
        inputs = forward_arguments(model, batches(tokenizer, tiny_texts(8, 0, is_pair), 8, 32))
        found.append(evidence_of(model, inputs, is_pair))
    torch.testing.assert_close(found[1].features, found[0].features, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[1].likeness, found[0].likeness, atol=1e-4, rtol=1e-4)


def test_three_texts_are_too_few():
    model = tiny_model("bert")
    with pytest.raises(InvalidInputError, match=r"`texts` must be at least 4, .* got 3"):
        evidence_of(model, batches_of(model, 3, 3))
