"""Output projections refitted so that the heads that stay make up for those that go."""

import copy
import itertools
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

import secateur
from secateur.choosing import moments as second_moments
from secateur.choosing.mask_loss import MaskLoss
from secateur.choosing.moments import Fit, Moments
from secateur.cli import main
from secateur.errors import InvalidInputError, SecateurWarning
from secateur.models.inputs import forward_arguments
from secateur.removal.proof import hidden_states, largest_difference
from secateur.removal.remove import gated, remove_
from secateur.removal.verify import verify_checkpoint
from secateur.restoring.reconstruction import reconstruct_
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.units.masks import Mask
from tests.support.memory import full_above, poisoned
from tests.support.tiny import CONFIGS, tiny_model, tiny_texts, tiny_tokenizer, uneven_mask

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = tiny_texts(64)
OTHERS = tiny_texts(64, seed=1)


def first_half(model):
    return Mask({name: torch.arange(s.num_units) < s.num_units // 2 for name, s in find_sites(model).items()})


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, weights):
    return all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_inputs_that_hardly_vary_are_made_up_for_by_their_mean():
    """Of what lies below the rounding of its own sums no regression tells, and the bias takes what was written."""
    torch.manual_seed(0)
    inputs = 10 * torch.randn(1, 40) + 1e-4 * torch.randn(400, 40)
    rows, stays = torch.randn(40, 8).double(), torch.arange(40) < 30
    fit = Fit(Moments(inputs.T @ inputs, inputs.sum(dim=0), len(inputs)), stays, rows[30:], with_bias=True)
    change = fit.change(1e-2)
    assert not change.any()
    assert torch.allclose(fit.shift(change), (inputs.double() @ rows - inputs[:, :30].double() @ rows[:30]).mean(dim=0))


def test_ridge_regression_by_hand():
    """Two inputs, [1, 2], [3, 4] and [5, 6] on three tokens; the second, which writes 10 times itself, goes.

    G = [[35, 44], [44, 56]]. Without a ridge the first writes 440 / 35 of itself for it, with one of 9 440 / 44 = 10.
    What is lost is 100 · 56 without a change, and with 10: 100 · ((2 - 1)² + (4 - 3)² + (6 - 5)²) = 300.
    """
    inputs = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    moments = Moments(inputs.T @ inputs, inputs.sum(dim=0), 3)
    fit = Fit(moments, torch.tensor([True, False]), torch.tensor([[10.0]]).double(), with_bias=False)
    assert fit.lost == 5600
    assert fit.change(0.0).item() == pytest.approx(440 / 35)
    assert fit.change(9.0 / fit.unit).item() == pytest.approx(10)
    assert fit.error(torch.tensor([[10.0]]).double()) == pytest.approx(300)
    assert fit.shift(torch.tensor([[10.0]])) is None


def test_a_bias_takes_over_what_is_constant_by_hand():
    """The same, where the second input is the first and 1: with a bias of 10 nothing is lost."""
    inputs = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    moments = Moments(inputs.T @ inputs, inputs.sum(dim=0), 3)
    fit = Fit(moments, torch.tensor([True, False]), torch.tensor([[10.0]]).double(), with_bias=True)
    change = fit.change(0.0)
    assert change.item() == pytest.approx(10)
    assert fit.shift(change).item() == pytest.approx(10)
    assert fit.error(change) == pytest.approx(0, abs=1e-9)
    assert fit.lost == 5600


@pytest.mark.parametrize("with_bias", [True, False])
def test_fits_to_two_parts_add_up_to_the_fit_to_all(with_bias):
    torch.manual_seed(0)
    inputs, rows, stays = torch.randn(60, 12).double() + 1, torch.randn(12, 5).double(), torch.arange(12) % 3 > 0
    parts, whole = [inputs[:20], inputs[20:]], Moments.over(inputs)
    whole.add(inputs)
    one, other = (
        Fit(Moments(part.T @ part, part.sum(dim=0), len(part)), stays, rows[~stays], with_bias=with_bias)
        for part in parts
    )
    one += other
    fit = Fit(whole, stays, rows[~stays], with_bias=with_bias)
    change = fit.change(0.1)
    torch.testing.assert_close(one.change(0.1), change, rtol=1e-5, atol=1e-6)
    assert (one.lost, one.unit) == pytest.approx((fit.lost, fit.unit), rel=1e-5)
    assert one.error(change) == pytest.approx(fit.error(change), rel=1e-5)
    assert one.shift(change) is None or torch.allclose(one.shift(change), fit.shift(change), atol=1e-5)


def test_second_moments_are_of_real_tokens():
    given = torch.arange(12.0).view(3, 2, 2)
    linear = torch.nn.Linear(2, 1)
    projection = SimpleNamespace(module=linear, channels=-1)
    for mask, rows in (
        (torch.tensor([[1, 1], [1, 0], [0, 1]]), [[0, 1], [2, 3], [4, 5], [10, 11]]),
        (None, given.flatten(0, 1).tolist()),
    ):
        with second_moments._reading(projection, {"attention_mask": mask}, ends=False) as found:
            linear(given)
            linear(input=given)  # of a site that runs twice
        expected = torch.tensor(rows, dtype=torch.float)
        moments = Moments.over(expected)
        for one in found:
            moments.add(one)
        assert torch.equal(moments.gram, 2 * expected.T @ expected)
        assert torch.equal(moments.total, 2 * expected.sum(dim=0))
        assert moments.count == 2 * len(rows)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "albert"])
def test_a_head_that_another_repeats_costs_nothing(kind):
    """Heads come in twins that compute the same; one of each goes, and the other takes over what it wrote."""
    model = tiny_model(kind)
    sites = find_sites(model)
    for site in sites.values():
        for piece in site.slices:
            if piece.role == "output":
                continue
            owners = torch.tensor(piece.owners)
            rows = model.get_parameter(piece.parameter).data.movedim(piece.axis, 0)
            for one in range(0, int(owners.max()) + 1, 2):
                rows[owners == one + 1] = rows[owners == one]
    mask = Mask({name: torch.arange(site.num_units) % 2 == 0 for name, site in sites.items()})
    dense = copy.deepcopy(model)
    without, after = reconstruct_(model, mask, TEXTS, tiny_tokenizer(), reading=Reading(batch_size=8))
    assert without > 1e-2
    assert after < without / 50
    remove_(model, mask)
    inputs = forward_arguments(dense, [dict(tiny_tokenizer()(OTHERS[:4], padding=True, return_tensors="pt"))])[0]
    with gated(dense, mask):
        preview = hidden_states(dense, inputs)
    whole = hidden_states(dense, inputs)
    assert largest_difference(whole, hidden_states(model, inputs)) < largest_difference(whole, preview) / 10


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "vit"])
def test_every_kind_loses_less_and_what_is_kept_is_what_was_proved(kind):
    model = tiny_model(kind)
    mask = uneven_mask(find_sites(model))
    weights = state(model)
    without, after = reconstruct_(model, mask, TEXTS, tiny_tokenizer(), reading=Reading(batch_size=16))
    assert 0 <= after <= without
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    outputs = {p.parameter for s in find_sites(model).values() for p in s.slices_of("output")}
    assert changed <= outputs | {name.removesuffix("weight") + "bias" for name in outputs}
    assert bool(changed) == (after < without)
    assert remove_(model, mask).max_difference <= 1e-4


def test_rows_of_heads_that_go_and_sites_that_stay_whole_do_not_change():
    model = tiny_model("bert")
    sites = find_sites(model)
    mask = uneven_mask(sites, empty=True)
    weights = state(model)
    without, after = reconstruct_(model, mask, TEXTS, tiny_tokenizer())
    assert after < without
    for name, site in sites.items():
        (piece,) = (p for p in site.slices_of("output") if p.parameter.endswith("weight"))
        now, was = model.state_dict()[piece.parameter], weights[piece.parameter]
        kept = mask[name][torch.tensor(piece.owners)]
        assert torch.equal(now[:, ~kept], was[:, ~kept])
        assert torch.equal(now, was) == bool(kept.all() or not kept.any())


def test_the_relational_kl_is_that_of_texts_that_were_not_fitted_on(monkeypatch):
    """Four calls: each half as it was, then each half by the fit on the other; what stays is fitted on both."""
    model = tiny_model("bert")
    mask = first_half(model)
    seen, inner = [], MaskLoss.__call__
    name = "encoder.layer.0.attention.output.dense.weight"
    before = model.state_dict()[name].clone()

    def watched(self, mask):
        used = []
        module = model.get_submodule(name.removesuffix(".weight"))
        handle = module.register_forward_pre_hook(lambda module, *_: used.append(module.weight.clone()))
        loss = inner(self, mask)
        handle.remove()
        assert all(torch.equal(weight, used[0]) for weight in used)
        seen.append((self.batches, used[0], loss))
        assert torch.equal(module.weight, before)  # only meanwhile
        return loss

    monkeypatch.setattr(MaskLoss, "__call__", watched)
    without, after = reconstruct_(model, mask, TEXTS, tiny_tokenizer(), reading=Reading(batch_size=20))
    halves = [[batch["input_ids"].shape[0] for batch in batches] for batches, _, _ in seen]
    assert halves == [[16, 16]] * 4
    assert [seen[number][0] is seen[other][0] for number, other in ((0, 3), (1, 2), (0, 1))] == [True, True, False]
    assert torch.equal(seen[0][1], seen[1][1])
    different = [seen[0][1], seen[2][1], seen[3][1], model.state_dict()[name]]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(different, 2))
    assert without == pytest.approx((seen[0][2] + seen[1][2]) / 2)
    assert after == pytest.approx((seen[2][2] + seen[3][2]) / 2)


def test_it_helps_on_texts_that_it_was_not_fitted_on():
    model = tiny_model("bert")
    mask = first_half(model)
    made = forward_arguments(model, [dict(tiny_tokenizer()(OTHERS, padding=True, return_tensors="pt"))])
    loss = MaskLoss(model, made, False)
    without = loss(mask)
    reconstruct_(model, mask, TEXTS, tiny_tokenizer())
    assert loss(mask) < without


def test_where_the_relational_kl_does_not_fall_the_weights_stay(monkeypatch):
    model = tiny_model("bert")
    weights, losses = state(model), iter([0.4, 0.6, 0.5, 0.6])
    monkeypatch.setattr(MaskLoss, "__call__", lambda self, mask: next(losses))
    assert reconstruct_(model, first_half(model), TEXTS, tiny_tokenizer()) == (0.5, 0.5)
    assert same(model, weights)


@pytest.mark.parametrize("biased", [True, False])
def test_where_no_ridge_helps_the_weights_stay(biased):
    """Heads that write nothing that the others' outputs tell: here the kept heads always put out nothing.

    A bias can still make up for what they write on average.
    """
    model = tiny_model("bert")
    sites = find_sites(model)
    mask = first_half(model)
    for name, site in sites.items():
        for piece in site.slices_of("value"):
            kept = mask[name][torch.tensor(piece.owners)]
            model.get_parameter(piece.parameter).data.movedim(piece.axis, 0)[kept] = 0
        if not biased:
            model.get_submodule(site.output).bias = None
    weights = state(model)
    without, after = reconstruct_(model, mask, TEXTS, tiny_tokenizer())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert changed == ({f"{site.output}.bias" for site in sites.values()} if biased else set())
    assert (without > after > 0) if biased else (without == after > 0)


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("bert")
    weights, first = state(model), [0.5, 0.5, 0.4]

    def fail(self, mask):
        if not first:
            raise KeyboardInterrupt
        return first.pop()

    monkeypatch.setattr(MaskLoss, "__call__", fail)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_(model, first_half(model), TEXTS, tiny_tokenizer())
    assert same(model, weights)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_padding_and_the_order_of_texts_do_not_matter():
    """In reverse the two halves of the texts change places, and texts in their batch."""
    found = []
    for texts in (TEXTS, TEXTS[::-1]):
        model = tiny_model("bert")
        reconstruct_(model, first_half(model), texts, tiny_tokenizer(), reading=Reading(batch_size=4))
        found.append(model)
    for (name, one), other in zip(found[0].state_dict().items(), found[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4, msg=name)


def test_half_precision_stays_half_precision():
    model = tiny_model("bert").to(torch.bfloat16)
    without, after = reconstruct_(model, first_half(model), TEXTS, tiny_tokenizer())
    assert after < without
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_it_halves_batches_that_do_not_fit(outcome):
    expected, model = tiny_model("bert"), tiny_model("bert")
    mask = first_half(model)
    losses = reconstruct_(expected, mask, TEXTS, tiny_tokenizer(), reading=Reading(batch_size=8))
    full_above(model, 8)
    with pytest.warns(SecateurWarning, match="16 texts does not fit") as warned:
        assert reconstruct_(model, mask, TEXTS, tiny_tokenizer(), reading=Reading(batch_size=16)) == losses
    assert same(model, expected.state_dict())
    outcome("Out of memory", "a batch does not fit during reconstruction", warned[0].message)


def test_values_that_are_not_finite_are_named(outcome):
    model = poisoned(tiny_model("bert"))
    weights = state(model)
    with pytest.raises(InvalidInputError, match=r"first in encoder\.layer\.1\.attention\.self\.query") as caught:
        reconstruct_(model, first_half(model), TEXTS, tiny_tokenizer())
    assert same(model, weights)
    outcome("NaN and infinity", "the second layer computes nan, reconstruction", caught.value)


def test_what_cannot_be_reconstructed_is_refused(monkeypatch):
    model = tiny_model("bert")
    with pytest.raises(InvalidInputError, match=r"`texts` must be at least 6, 3 for each half .* got 5"):
        reconstruct_(model, first_half(model), TEXTS[:5], tiny_tokenizer())
    reconstruct_(model, first_half(model), TEXTS[:6], tiny_tokenizer())
    with pytest.raises(InvalidInputError, match="at least 3 a batch"):
        reconstruct_(model, first_half(model), TEXTS, tiny_tokenizer(), reading=Reading(batch_size=2))
    monkeypatch.setattr(second_moments, "_reading", lambda *_: nullcontext([]))
    with pytest.raises(InvalidInputError, match=r"do not reach the site 'encoder\.layer\.0\.attention\.self'"):
        reconstruct_(model, first_half(model), TEXTS, tiny_tokenizer())


def test_prune_reconstructs_reports_and_verifies(tmp_path, outcome):
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()
    weights = state(model)
    model.save_pretrained(tmp_path / "whole")
    common = {"scorer": "contribution", "tokenizer": tokenizer}
    smaller, report = secateur.prune(model, TEXTS, restore="reconstruct", **common)
    assert same(model, weights)
    without, after = report.reconstruction
    assert after < without
    assert report.to_json()["reconstruction"] == [without, after]
    assert smaller.config.head_pruning["reconstructed"] is True
    smaller.save_pretrained(tmp_path / "small")
    found = verify_checkpoint(tmp_path / "small", tmp_path / "whole")
    assert found["equal"]
    assert found["reconstructed"]
    plain, report = secateur.prune(model, TEXTS, restore="none", **common)
    assert report.reconstruction == ()
    assert "reconstructed" not in plain.config.head_pruning
    plain.save_pretrained(tmp_path / "plain")
    assert not verify_checkpoint(tmp_path / "plain", tmp_path / "whole")["reconstructed"]
    # Again, from what was pruned and reconstructed.
    smallest, report = secateur.prune(smaller, TEXTS, pruning_ratio=0.5, **common)
    smallest.save_pretrained(tmp_path / "smallest")
    assert verify_checkpoint(tmp_path / "smallest", tmp_path / "small")["equal"]
    with pytest.raises(InvalidInputError) as caught:
        secateur.prune(model, iter(TEXTS), restore="reconstruct", **common)
    outcome("Streams", "`reconstruct` with a stream", caught.value)


def test_a_model_that_is_not_the_original_does_not_verify(tmp_path, capsys):
    """As without reconstruction: it differs, or its sites are others, and one line says so."""
    smaller, _ = secateur.prune(
        tiny_model("bert"), TEXTS, scorer="contribution", tokenizer=tiny_tokenizer(), restore="reconstruct"
    )
    smaller.save_pretrained(tmp_path / "small")
    wide = BertModel(BertConfig.from_dict({**tiny_model("bert").config.to_dict(), "hidden_size": 64}))
    for model, code in ((tiny_model("bert", seed=1), 1), (wide, 1), (tiny_model("gpt2"), 2)):
        model.save_pretrained(tmp_path / f"{type(model).__name__}-{code}")
        capsys.readouterr()
        assert run("verify", tmp_path / "small", "--against", tmp_path / f"{type(model).__name__}-{code}") == code
        out, err = capsys.readouterr()
        assert ("DIFFERS from" in out) == (code == 1)
        assert ("`mask` must name sites" in err) == (code == 2)


def run(*arguments):
    return main(list(map(str, arguments)))


def test_the_command_says_what_it_did(tmp_path, capsys):
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.csv").write_text("\n".join(["sentence", *TEXTS]))
    arguments = [tmp_path / "model", "--data", tmp_path / "texts.csv", "--scorer", "contribution", "--no-maps"]
    assert run("prune", *arguments, "--restore", "reconstruct", "--out", tmp_path / "small") == 0
    assert "with reconstruction 0." in capsys.readouterr().out
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    without, after = report["reconstruction"]
    assert f"relational KL {without:.4f} without, {after:.4f} with" in (tmp_path / "small" / "report.html").read_text()
    assert run("verify", tmp_path / "small") == 0
    assert "heads gated and its output projections refitted" in capsys.readouterr().out
