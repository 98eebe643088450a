"""Heads, neurons and layers together: removal, reloading, selection, budgets, and the commands."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel

import secateur
from secateur.choosing.budget import BudgetedSelection
from secateur.errors import InvalidInputError
from secateur.measuring.cost import measure_cost
from secateur.measuring.unit_costs import UnitCosts
from secateur.models.inputs import example_inputs
from secateur.removal.proof import hidden_states, largest_difference
from secateur.removal.remove import gated, remove_
from secateur.removal.verify import verify_checkpoint
from secateur.report.pruned import pruning_view
from secateur.report.reading import pruning_data
from secateur.settings import Budget, Cut, budgets_of
from secateur.sites.finding import find_units
from secateur.sites.recipe import read_recipe
from secateur.units.masks import Mask
from secateur.units.scores import Scores
from secateur.units.select import select
from tests.support.pruned import assert_equal
from tests.support.tiny import tiny_classifier, tiny_model, tiny_texts, tiny_tokenizer
from tests.support.units import even_mask, ragged_mask, small_model


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "llama", "bart", "gated t5", "phi3", "gemma3", "opt"])
def test_all_three_kinds_go_at_once_and_come_back(kind, tmp_path):
    model = small_model(kind)
    inputs = example_inputs(model)
    sites = find_units(model)
    mask = ragged_mask(sites)
    with gated(model, mask):
        wanted = hidden_states(model, inputs)
    cost = UnitCosts(model, sites).after(mask)
    result = remove_(model, mask, sites=sites)
    assert result.mask == mask
    found = hidden_states(model, inputs)
    assert largest_difference(wanted, found) <= 1e-4
    assert measure_cost(model) == cost
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert_equal(again, model)
    assert largest_difference(found, hidden_states(again, inputs)) == 0
    recipe = read_recipe(again.config)
    assert {site.kind for site in recipe.sites.values()} == {"heads", "neurons", "layers"}


def test_a_second_removal_counts_as_the_original_did(tmp_path):
    model = tiny_model("bert")
    remove_(model, ragged_mask(find_units(model)))
    sites = find_units(model)
    first, second, layers = "encoder.layer.0.output.dense", "encoder.layer.1.output.dense", "encoder.layer"
    assert sites[layers].units == (1, 2)
    assert (sites[first].num_units, sites[first].original_num_units) == (35, 37)
    with pytest.raises(InvalidInputError, match="must be False for units that are already removed"):
        remove_(model, Mask({layers: torch.ones(3, dtype=torch.bool)}))
    stays = sites[second].units[-3:]
    rows = {layers: torch.tensor([False, False, True]), second: torch.zeros(37, dtype=torch.bool)}
    rows[second][list(stays)] = True
    result = remove_(model, Mask(rows))
    assert (result.mask.kept[layers], result.mask.kept[second]) == ([2], list(stays))
    recipe = read_recipe(model.config)
    assert (recipe.kept[layers], recipe.kept[first]) == ((2,), stays)  # what was the second layer is the first now
    assert second not in recipe.kept
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert_equal(again, model)
    assert find_units(again)[first].units == stays


@pytest.mark.parametrize("kind", ["bert", "gated t5"])
@pytest.mark.parametrize("restore", ["none", "reconstruct"])
def test_a_folder_without_layers_is_verified_against_the_original(kind, restore, tmp_path):
    """Its sites have other names than the original's."""
    model = small_model(kind)
    model.save_pretrained(tmp_path / "whole")
    scores = secateur.score(model, scorer="random", units=["heads", "neurons", "layers"])
    rows = {**ragged_mask(find_units(model)), **select(scores.only([s for s in scores if scores.kinds[s] == "layers"]))}
    if restore == "reconstruct":
        secateur.reconstruct_(model, Mask(rows), tiny_texts(16), tiny_tokenizer())
    remove_(model, Mask(rows), record={"reconstructed": restore == "reconstruct"})
    model.save_pretrained(tmp_path / "small")
    result = verify_checkpoint(tmp_path / "small", tmp_path / "whole")
    assert result["equal"], result


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("heads=0.75,neurons=0.5", ("heads", "neurons")),
        ("macs=0.5", ("heads", "neurons")),
        ("layers=0.5", ("layers",)),
        ("macs=0.5,layers=0.5", ("heads", "neurons", "layers")),
    ],
)
def test_a_budget_says_which_kinds_may_go(text, kinds):
    assert Cut(budget=text).kinds == kinds
    assert budgets_of(budgets_of(text)) == budgets_of(text)


@pytest.mark.parametrize("text", ["heads=0.5,heads=0.4", "macs=0.5,params=0.5", "heads=0.5,", "", ()])
def test_budgets_that_do_not_go_together_are_refused(text):
    with pytest.raises(InvalidInputError, match="`budget` must "):
        budgets_of(text)


def test_a_budget_names_kinds_that_may_go():
    with pytest.raises(InvalidInputError, match="`units` must hold what the budget names, neurons"):
        Cut(budget="neurons=0.5", units=("heads",))


def test_each_kind_keeps_within_its_budget():
    _, report = secateur.prune(small_model("wide bert"), scorer="magnitude", budget="heads=0.75,neurons=0.5")
    assert report.units == {"heads": (12, 9), "neurons": (768, 384)}
    assert [(str(one.budget), one.reached) for one in report.budget] == [("heads=0.75", 0.75), ("neurons=0.5", 0.5)]
    assert str(report) == (
        "kept 9 of 12 heads, 384 of 768 neurons, heads 0.750 of what they were (budget heads=0.75), "
        "neurons 0.500 of what they were (budget neurons=0.5)"
    )
    data = json.loads(json.dumps(report.to_json()))
    assert data["kept_neurons"].keys() == {f"encoder.layer.{n}.output.dense" for n in range(3)}
    assert data["kept_heads"].keys() == data["scores"].keys() == {f"encoder.layer.{n}.attention.self" for n in range(3)}


@pytest.mark.parametrize("allocation", ["uniform", "ranking"])
@pytest.mark.parametrize("budget", ["macs=0.6@2x16", "params=0.7", "macs=0.5@2x16,heads=0.5"])
def test_what_a_budget_of_several_kinds_expects_is_what_is_measured(budget, allocation):
    model = small_model("wide bert")
    smaller, report = secateur.prune(model, scorer="magnitude", budget=budget, cut=Cut(allocation=allocation))
    for outcome in report.budget:
        assert outcome.reached == outcome.expected <= outcome.budget.limit + 1e-9
    assert (report.after.parameters, report.after.heads) == (
        measure_cost(smaller).parameters, report.units["heads"][1],
    )  # fmt: skip
    assert secateur.allocate(model, report.scores, budget=budget, allocation=allocation) == report.mask


def test_layers_go_as_a_budget_says():
    scores = Scores({"encoder.layer": [0.3, 0.1, 0.2]}, kinds={"encoder.layer": "layers"})
    within = BudgetedSelection(tiny_model("bert"), Cut(budget="layers=0.7"))
    assert within.select(scores)[0].kept == {"encoder.layer": [0, 2]}
    macs = BudgetedSelection(tiny_model("bert"), Cut(budget=[Budget("macs", 0.5)], units=["layers"]))
    mask, ratio = macs.select(scores)
    assert (mask.kept, ratio) == ({"encoder.layer": [0]}, pytest.approx(2 / 3))


def test_excluded_sites_stay_whole():
    model = small_model("wide bert")
    smaller, report = secateur.prune(
        model, scorer="random", budget="heads=0.7,neurons=0.84",
        cut=Cut(exclude=["encoder.layer.0.*", "*.2.output.dense"]),
    )  # fmt: skip
    assert [layer.output.dense.in_features for layer in smaller.encoder.layer] == [256, 128, 256]
    assert [layer.attention.self.num_attention_heads for layer in smaller.encoder.layer] == [4, 2, 2]
    with pytest.raises(InvalidInputError, match=r"`exclude` must .*each pattern match one.*'nowhere\.\*'"):
        secateur.prune(model, scorer="random", cut=Cut(exclude=["encoder.layer.0.*", "nowhere.*"]))
    cut = Cut(units=["heads", "layers"], exclude=["encoder.layer.0.*", "encoder.layer"])
    smaller, _ = secateur.prune(model, scorer="random", cut=cut)
    assert len(smaller.encoder.layer) == len(model.encoder.layer)
    assert report.units["neurons"] == (768, 640)


def test_a_layer_that_holds_an_excluded_site_stays():
    model = small_model("bert")
    spared = model.encoder.layer[1].attention.self.query.weight
    cut = Cut(units=["heads", "layers"], exclude=["encoder.layer.1.attention.*"])
    given = {"scorer": "random", "cut": cut}
    for wanted in ({"pruning_ratio": 0.67}, {"budget": "layers=0.4,heads=0.9"}, {"budget": "macs=0.4"}):
        smaller, report = secateur.prune(model, **given, **wanted)
        assert report.mask["encoder.layer"].tolist() == [False, True, False]
        assert torch.equal(smaller.encoder.layer[0].attention.self.query.weight, spared)
    with pytest.raises(InvalidInputError, match=r"`budget` must be at least layers=0\.334"):
        secateur.prune(model, **given, budget="layers=0.3")


def test_each_kind_may_have_a_criterion_of_its_own():
    model = tiny_model("bert")
    given = {"inputs": [example_inputs(model)], "units": ["heads", "neurons", "layers"]}
    scores = secateur.score(model, scorer={"heads": "magnitude", "neurons": "random"}, **given)
    assert scores.scorer == "heads=magnitude,neurons=random,layers=block_influence"
    assert [scores.kinds[name] for name in scores] == ["heads"] * 3 + ["neurons"] * 3 + ["layers"]
    assert Scores.from_json(json.loads(json.dumps(scores.to_json()))) == scores
    # A criterion that is named alone is for what it can score; the others take their default.
    alone = secateur.score(model, scorer="magnitude", **given)
    assert alone.scorer == "heads=magnitude,neurons=magnitude,layers=block_influence"


@pytest.mark.parametrize(
    ("scorer", "units", "message"),
    [
        ("entropy", ["neurons"], "`scorer` must score neurons, got 'entropy'"),
        ("block_influence", ["heads"], "`scorer` must score heads, got 'block_influence'"),
        ({"layers": "magnitude"}, ["layers"], "`scorer` must score layers, got 'magnitude'"),
        ({"neurons": "random"}, ["heads"], "`scorer` must name kinds among the `units` that are scored, heads, got"),
    ],
)
def test_a_criterion_that_cannot_score_a_kind_is_refused_by_name(scorer, units, message):
    with pytest.raises(InvalidInputError, match=message):
        secateur.score(tiny_model("bert"), scorer=scorer, units=units)


@pytest.mark.parametrize("name", ["random", "taylor", "fisher"])
def test_criteria_of_layers(name):
    model = tiny_classifier("bert")
    inputs = [example_inputs(model, batch=4, length=10)]
    scores = secateur.score(model, scorer=name, inputs=inputs, labels=[0, 1, 2, 1], units=["layers"])
    assert {site: len(row) for site, row in scores.items()} == {"encoder.layer": 3}


def test_prune_removes_layers():
    model = tiny_model("bert")
    smaller, report = secateur.prune(model, scorer="random", pruning_ratio=0.4, cut=Cut(units=["layers"]))
    assert (len(model.encoder.layer), len(smaller.encoder.layer), report.units) == (3, 2, {"layers": (3, 2)})
    assert report.to_json()["kept_layers"] == report.mask.kept
    assert not hasattr(smaller.config, "head_pruning")


def test_a_report_says_that_layers_which_went_kept_nothing():
    _, report = secateur.prune(
        tiny_model("bert"),
        scorer="random",
        pruning_ratio=0.4,
        cut=Cut(allocation="ranking", units=["heads", "neurons", "layers"]),
    )
    data = report.to_json()
    (stays,) = data["kept_layers"].values()
    (gone,) = {0, 1, 2} - {*stays}
    kept = data["kept_heads"] | {name: block["kept"] for name, block in data["blocks"].items()}
    assert {name for name, units in kept.items() if not units} == {name for name in kept if f"layer.{gone}." in name}
    counts = [sum(map(len, data["kept_heads"].values())), report.after.heads, data["units"]["heads"][1]]
    assert len({*counts}) == 1
    view = pruning_view(pruning_data(data))
    assert view["headline"].startswith(f"Kept {counts[0]} of 12 heads, ")
    assert view["headline"].endswith(" neurons, 2 of 3 layers")


def test_refinement_exchanges_heads_alone():
    with pytest.raises(InvalidInputError, match="`refine` must be 0 where heads, neurons go, as it exchanges heads"):
        secateur.prune(tiny_model("bert"), ["a", "b"], budget="macs=0.9", cut=Cut(refine=2))


def test_a_budget_out_of_reach_says_what_all_kinds_reach():
    with pytest.raises(InvalidInputError, match=r"heads, neurons, layers together 0\.\d+ can be reached \(`units`\)"):
        secateur.prune(small_model("wide bert"), scorer="magnitude", budget="macs=0.1", cut=Cut(units=["heads"]))


def test_a_removal_that_drops_nothing_leaves_no_recipe(tmp_path):
    model = tiny_model("bert")
    sites = find_units(model, ["neurons"])
    remove_(model, Mask({name: torch.ones(37, dtype=torch.bool) for name in sites}))
    model.save_pretrained(tmp_path)
    assert_equal(AutoModel.from_pretrained(tmp_path), model)


@pytest.mark.real
def test_a_real_model_comes_back_in_another_process(minilm, tmp_path):
    """Uneven heads, uneven neurons and two layers gone."""
    sites = find_units(minilm)
    mask = Mask({**ragged_mask(sites), "encoder.layer": torch.tensor([True, False, True, True, False, True])})
    inputs = example_inputs(minilm, 2, 12)
    assert remove_(minilm, mask, sites=sites).max_difference <= 1e-4
    minilm.save_pretrained(tmp_path / "small")
    torch.save(hidden_states(minilm, inputs), tmp_path / "wanted.pt")
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import sys, torch, secateur\n"
        "from transformers import AutoModel\n"
        "from secateur.removal.proof import hidden_states\n"
        "torch.set_num_threads(1)\n"
        "model = AutoModel.from_pretrained(sys.argv[1] + '/small')\n"
        "found = hidden_states(model, torch.load(sys.argv[1] + '/inputs.pt'))\n"
        "wanted = torch.load(sys.argv[1] + '/wanted.pt')\n"
        "assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))\n"
        "print(len(model.encoder.layer), model.config.num_hidden_layers)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.split() == ["4", "4"], done.stderr


def test_even_cuts_are_selected_and_kept_apart_from_ragged_ones():
    """The same cut at every site needs no recipe; one neuron more at one site does."""
    model = tiny_model("bert")
    sites = find_units(model, ["neurons"])
    mask = even_mask(sites)
    uneven = {**mask}
    uneven["encoder.layer.1.output.dense"] = uneven["encoder.layer.1.output.dense"].clone()
    uneven["encoder.layer.1.output.dense"][1] = False
    other = tiny_model("bert")
    remove_(model, mask)
    remove_(other, Mask(uneven))
    assert (model.config.intermediate_size, hasattr(model.config, "head_pruning")) == (24, False)
    assert (other.config.intermediate_size, hasattr(other.config, "head_pruning")) == (37, True)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_block_that_loses_all_neurons_keeps_its_bias(kind, tmp_path):
    model = tiny_model(kind)
    sites = find_units(model, ["neurons"])
    first, second, third = sites
    none = {name: torch.zeros(sites[name].num_units, dtype=torch.bool) for name in (first, second)}
    inputs = example_inputs(model)
    with torch.no_grad(), secateur.gated(model, Mask(none)):
        wanted = model(**inputs).last_hidden_state
    remove_(model, Mask({first: none[first]}))
    assert remove_(copy.deepcopy(model), Mask(none)).units_after == sites[first].num_units
    remove_(model, Mask(none))
    model.save_pretrained(tmp_path)
    for one in (model, copy.deepcopy(model), AutoModel.from_pretrained(tmp_path)):
        with torch.no_grad():
            assert torch.allclose(one(**inputs).last_hidden_state, wanted, atol=1e-5)
        assert one.get_submodule(second).weight.numel() == 0
        left = {name: site.num_units for name, site in find_units(one, ["neurons"]).items()}
        assert left == {first: 0, second: 0, third: sites[third].num_units}
