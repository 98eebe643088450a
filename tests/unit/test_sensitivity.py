"""Where units go by need: the cheapest choice, what a site costs the end of the model, and what both are built on."""

import itertools
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.choosing.allocation import SensitivitySelection
from secateur.choosing.moments import Projection, moments_of
from secateur.choosing.prefix import Prefix, layer_of
from secateur.choosing.sensitivity import EndError, Option, cheapest, options_of_sites
from secateur.errors import InvalidInputError
from secateur.models.state import evaluation_mode
from secateur.scorers.score import score
from secateur.settings import Cut, Reading
from secateur.sites.finding import find_layers
from secateur.texts.calibration import PreparedModel
from secateur.units.masks import units_left
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer

READING = Reading(batch_size=8, device="cpu")
TEXTS = tiny_texts(32)
ALL = ("heads", "neurons", "layers")


def prepared_model(kind):
    return PreparedModel(tiny_model(kind), tiny_tokenizer(), READING)


@contextmanager
def still(model):
    with evaluation_mode(model), torch.no_grad():
        yield


def scores_of(prepared, units):
    return score(prepared, TEXTS, "random", units=units, reading=READING)


def with_an_empty_layer(kind):
    """A model with norms before each block, whose second layer adds nothing to the residual stream."""
    prepared = prepared_model(kind)
    for site in prepared.sites_of(("heads", "neurons")).values():
        if ".1." in site.name:
            prepared.base.get_submodule(site.output).weight.data.zero_()
    return prepared


def test_the_cheapest_choice_by_hand():
    """Half of a model of two parts: the two small cuts together cost less than either large one."""
    one = [Option(0.0, 0.0, {}), Option(0.25, 0.1, {}), Option(0.5, 0.9, {})]
    other = [Option(0.0, 0.0, {}), Option(0.25, 0.2, {}), Option(0.5, 0.4, {})]
    assert cheapest([one, other], 0.5) == [one[1], other[1]]
    assert cheapest([one, other], 0.25) == [one[1], other[0]]
    assert cheapest([one, other], 0.0) == [one[0], other[0]]
    assert cheapest([one, other], 0.6) == [one[1], other[2]]
    assert cheapest([one, other], 1.0) == [one[2], other[2]]
    assert cheapest([one, other[:2]], 0.8) is None


PART = st.lists(st.tuples(st.integers(0, 800), st.integers(0, 50)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(PART, min_size=1, max_size=4), needed=st.integers(0, 2000))
def test_the_cheapest_choice_is_that_of_trying_all(parts, needed):
    options = [[Option(saved / 2000, float(error), {}) for saved, error in part] for part in parts]
    fits = [
        choice for choice in itertools.product(*options) if round(2000 * sum(one.saved for one in choice)) >= needed
    ]
    found = cheapest(options, needed / 2000)
    if not fits:
        assert found is None
        return
    assert found is not None
    assert all(one in part for one, part in zip(found, options, strict=True))
    assert round(2000 * sum(one.saved for one in found)) >= needed
    assert sum(one.error for one in found) == min(sum(one.error for one in choice) for choice in fits)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_to_leave_out_the_layers_before_a_site_changes_no_error(kind):
    prepared = prepared_model(kind)
    lists, base = find_layers(prepared.model), prepared.base
    with still(base):
        batches = list(prepared.batches(TEXTS, 8))
        quick, whole = EndError(base, Prefix(base, batches, lists)), EndError(base, Prefix(base, batches))
        runs = []
        first = base.get_submodule(f"{next(iter(lists))}.0")
        handle = first.register_forward_hook(lambda *_: runs.append(1))
        for name, site in prepared.sites_of(ALL).items():
            gate = torch.ones(site.num_units)
            gate[: (site.num_units + 1) // 2] = 0
            error = quick({name: gate})
            before = len(runs)
            assert error == pytest.approx(whole({name: gate}), rel=1e-4)
            assert error > 1e-4
            assert len(runs) == before + len(batches)
        handle.remove()
    assert not any("forward" in vars(module) for module in base.modules())


def test_an_error_is_the_squared_difference_at_the_end_as_a_share_of_the_variance():
    prepared = prepared_model("bert")
    base, name = prepared.base, "encoder.layer.2.attention.self"
    with still(base):
        batches = list(prepared.batches(TEXTS, 8))

        def states():
            return torch.cat([base(**batch).last_hidden_state[batch["attention_mask"].bool()] for batch in batches])

        evaluator = EndError(base, Prefix(base, batches, prepared.lists))
        found = evaluator({name: torch.tensor([1.0, 0.0, 1.0, 1.0])})
        dense = states()
        base.get_submodule("encoder.layer.2.attention.output.dense").weight.data[:, 8:16] = 0  # the second head of 8
        wanted = (states() - dense).square().mean() / dense.var(dim=0).mean()
    assert found == pytest.approx(float(wanted), rel=1e-4)


def test_the_layer_of_a_site():
    lists = find_layers(tiny_model("bert"))
    assert layer_of("encoder.layer.2.attention.self", lists) == ("encoder.layer", 2)
    assert layer_of("encoder.layer", lists) is None
    assert layer_of("pooler.dense", lists) is None


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_every_size_is_tried_and_the_weights_stay(kind):
    prepared = prepared_model(kind)
    base = prepared.base
    sites, scores = prepared.sites_of(ALL), scores_of(prepared, ALL)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with still(base):
        batches = list(prepared.batches(TEXTS, 8))
        evaluator = EndError(base, Prefix(base, batches, prepared.lists))
        prefix = Prefix(base, batches, prepared.lists)
        found = options_of_sites(base, sites, scores, prefix, evaluator, Cut(0.5, multiple=1), READING)
        gated = {
            name: [evaluator({name: row[list(sites[name].units)].float()}) for _, row in rows[1:]]
            for name, rows in found.items()
        }
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())
    for name, rows in found.items():
        if sites[name].kind == "layers":
            assert [int((row == 0).sum()) for _, row in rows] == [1, 1, 1]
            continue
        sizes = [int(row.sum()) for _, row in rows]
        assert sizes == sorted(set(sizes), reverse=True)
        assert (rows[0][0], sizes[0], sizes[-1]) == (0.0, sites[name].num_units, 1)
    # What stays makes up for some of what goes, on the texts that both are measured on.
    pairs = [(one, other) for name in found for (one, _), other in zip(found[name][1:], gated[name], strict=False)]
    assert sum(one for one, _ in pairs) < 0.9 * sum(other for _, other in pairs)


@pytest.mark.parametrize(("kind", "runs"), [("bert", 1), ("llama", 1), ("gpt2", 1), ("t5", 1), ("albert", 3)])
def test_passes_that_end_with_the_layer_give_the_same_moments(kind, runs):
    """ALBERT's layers share one projection, which reads in each, so they are no list."""
    prepared = prepared_model(kind)
    base, sites = prepared.base, prepared.sites_of(("heads", "neurons"))
    with still(base):
        batches = list(prepared.batches(TEXTS, 8))
        prefix, ends = Prefix(base, batches, prepared.lists), []
        handle = base.register_forward_hook(lambda *_: ends.append(1))
        found = {name: moments_of(base, Projection(base, site), prefix, READING) for name, site in sites.items()}
        passes = len(ends)
        for name, site in sites.items():
            with mock.patch.object(Projection, "runs_once", return_value=False):
                wanted = moments_of(base, Projection(base, site), Prefix(base, batches), READING)
            assert torch.equal(found[name].gram, wanted.gram)
            assert torch.equal(found[name].total, wanted.total)
            assert found[name].count == wanted.count
        handle.remove()
    assert not any("forward" in vars(module) for module in base.modules())
    assert passes == (0 if runs == 1 else len(sites) * (1 + len(batches)))  # the first sees how often it runs
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert kind == "t5" or {moments.count for moments in found.values()} == {runs * tokens}  # T5's decoder reads others


def test_each_layer_runs_once_for_a_sweep_over_all_sites():
    prepared = prepared_model("bert")
    base, runs = prepared.base, Counter()
    with still(base):
        prefix = Prefix(base, list(prepared.batches(TEXTS, 8)), prepared.lists)
        sites = prepared.sites_of(("heads",)).values()
        for number, layer in enumerate(base.encoder.layer):
            layer.attention.register_forward_hook(lambda *_, number=number: runs.update([number]))
        for site in sites:
            moments_of(base, Projection(base, site), prefix, READING)
    # In its own turn, and once more for the layer after it.
    assert runs == {0: 2 * len(prefix.batches), 1: 2 * len(prefix.batches), 2: len(prefix.batches)}


class Skipping(torch.nn.Module):
    """A layer that also reads what another one wrote."""

    def __init__(self, layer, other):
        super().__init__()
        self.layer, self.other = layer, [other]

    def forward(self, hidden_states, *args, **kwargs):
        return self.layer(hidden_states + self.other[0].written, *args, **kwargs)


@pytest.mark.parametrize("reason", ["none", "skips", "memory"])
def test_all_layers_run_where_to_leave_them_out_changes_the_end_or_fills_memory(reason, monkeypatch):
    prepared = prepared_model("bert")
    base = prepared.base
    first, last = base.encoder.layer[0], base.encoder.layer[2]
    if reason == "skips":
        first.register_forward_hook(lambda module, args, output: setattr(module, "written", output))
        base.encoder.layer[2] = Skipping(last, first)
    elif reason == "memory":
        monkeypatch.setattr("secateur.choosing.prefix._MOST_BYTES", 100)
    site = prepared.sites["encoder.layer.1.attention.self"]
    with still(base):
        batches, runs = list(prepared.batches(TEXTS, 8)), []
        prefix = Prefix(base, batches, ["encoder.layer"])
        first.attention.register_forward_hook(lambda *_: runs.append(1))
        for _ in range(2):
            moments_of(base, Projection(base, site), prefix, READING)
    assert len(runs) == (1 if reason == "none" else 2) * len(batches)


@pytest.mark.parametrize(
    ("budget", "units"),
    [
        ("macs=0.7", ("heads", "neurons")),
        ("params=0.8", ALL),
        ("heads=0.5,neurons=0.75", None),
        ("layers=0.7", None),
        ("heads=0.75,macs=0.7", None),
        ("layers=0.7,macs=0.6", ALL),
        ("heads=0.5,macs=0.55", ALL),
    ],
)
def test_a_budget_is_kept(budget, units):
    prepared = prepared_model("bert")
    cut = Cut(0, "sensitivity", budget=budget, units=units, multiple=1)
    selection = SensitivitySelection(prepared, cut, TEXTS, READING)
    mask, _ = selection.select(scores_of(prepared, cut.kinds))
    kept = mask.present(prepared.sites_of(cut.kinds))
    assert all(row.any() for row in kept.values())
    left = {kind: after / before for kind, (before, after) in units_left(prepared.sites_of(cut.kinds), mask).items()}
    for one in cut.budgets:
        reached = left[one.quantity] if one.quantity in left else selection.share(mask)
        assert reached <= one.limit
    assert reached > one.limit - 0.1


def test_a_layer_that_does_nothing_goes():
    prepared = with_an_empty_layer("llama")
    cut = Cut(0, "sensitivity", budget="params=0.99", units=ALL, multiple=1)
    saved = SensitivitySelection(prepared, cut, TEXTS, READING).share_of_layer(cut.budgets[0], "layers.1")
    cut = replace(cut, budget=f"params={1.001 - saved}")
    mask, _ = SensitivitySelection(prepared, cut, TEXTS, READING).select(scores_of(prepared, ALL))
    assert mask["layers"].tolist() == [True, False, True]
    assert all(row.all() for name, row in mask.items() if name != "layers" and ".1." not in name)


@pytest.mark.parametrize("budget", ["params={}", "layers=0.7"])
def test_a_layer_that_holds_an_excluded_site_stays_though_it_does_nothing(budget):
    prepared = with_an_empty_layer("llama")
    cut = Cut(0, "sensitivity", budget="params=0.99", units=ALL, multiple=1, exclude=["layers.1.self_attn"])
    saved = SensitivitySelection(prepared, cut, TEXTS, READING).share_of_layer(cut.budgets[0], "layers.1")
    cut = replace(cut, budget=budget.format(1.001 - saved), units=ALL if "params" in budget else ("heads", "layers"))
    mask, _ = SensitivitySelection(prepared, cut, TEXTS, READING).select(scores_of(prepared, cut.kinds))
    assert mask.get("layers", torch.ones(3))[1]
    assert "layers.1.self_attn" not in mask
    assert "params" in budget or mask["layers"].sum() == 2


def test_what_cannot_be_measured_or_reached_is_refused():
    prepared = prepared_model("bert")
    with pytest.raises(InvalidInputError, match=r"`texts` must be at least 8 with allocation 'sensitivity', got 7"):
        SensitivitySelection(prepared, Cut(0, "sensitivity", budget="macs=0.5"), TEXTS[:7], READING)
    cut = Cut(0, "sensitivity", budget="macs=0.05")
    with pytest.raises(InvalidInputError, match=r"`budget` must be at least macs=0\."):
        SensitivitySelection(prepared, cut, TEXTS, READING).select(scores_of(prepared, cut.kinds))
