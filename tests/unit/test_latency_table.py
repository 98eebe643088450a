"""What the table of latencies says of layers, by a clock that counts what a pass computes."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import secateur
from secateur import cli
from secateur.choosing.allocation import SensitivitySelection
from secateur.choosing.budget import BudgetedSelection
from secateur.errors import InvalidInputError
from secateur.measuring.latency_table import LatencyTable, measure_latency
from secateur.measuring.unit_costs import UnitCosts
from secateur.removal.remove import remove_
from secateur.scorers.score import score
from secateur.settings import Cut, Reading, Shape
from secateur.sites.finding import find_units
from secateur.texts.calibration import PreparedModel
from secateur.units.masks import Mask
from secateur.units.scores import Scores
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer
from tests.support.units import small_model

WHOLE = {"units": 4, "saved_macs": 0, "seconds": [1]}
ALL = ("heads", "neurons", "layers")
READING = Reading(batch_size=8, device="cpu")


def work_of(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    """Seconds are what a pass computes, and as much again as one dense layer for what lies around the layers."""

    def in_turn(runs, rounds, **others):
        work = {name: work_of(run) for name, run in runs.items()}
        around = work[str((-1, 0))] / 3
        return {name: [one + around] * rounds for name, one in work.items()}

    monkeypatch.setattr("secateur.measuring.latency_table.time_in_turn", in_turn)
    monkeypatch.setattr("secateur.measuring.latency_table.MOST_LEVELS", 3)


@pytest.mark.parametrize(("kind", "layers"), [("bert", "encoder.layer"), ("llama", "layers"), ("gpt2", "h")])
def test_the_table_knows_what_a_missing_layer_saves(kind, layers):
    model = small_model(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sites = find_units(model, ["heads", "layers"])
    table = measure_latency(model, UnitCosts(model, sites), Shape(2, 12), rounds=2)
    (found,) = [one for one in table.kinds if one.sites == (layers,)]
    assert [level.units for level in found.levels] == [3, 2]
    one_layer = found.levels[1].saved_macs
    assert found.saved(one_layer) == pytest.approx(1 / 4, abs=2e-3)  # three layers, and as much as one around
    assert found.saved_by_layer(one_layer / 2) == found.saved(one_layer) / 2
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {site for one in table.kinds for site in one.sites} == set(sites)


def test_layers_go_as_a_budget_of_time_says():
    model = small_model("wide bert")
    scores = Scores({"encoder.layer": [0.3, 0.1, 0.2]}, kinds={"encoder.layer": "layers"})
    for limit, kept in ((0.76, [0, 2]), (0.74, [0]), (0.51, [0])):
        within = BudgetedSelection(model, Cut(budget=f"latency={limit}@2x16", units=["layers"]))
        mask, _ = within.select(scores)
        assert mask.kept == {"encoder.layer": kept}
        assert within.share(mask) == pytest.approx(1 - (3 - len(kept)) / 4, abs=1e-3)
    with pytest.raises(secateur.InvalidInputError, match=r"be at least latency=0\.5"):
        BudgetedSelection(model, Cut(budget="latency=0.4@2x16", units=["layers"]))


def test_what_lies_in_a_layer_that_goes_saves_no_time_twice():
    model = small_model("wide bert")
    within = BudgetedSelection(model, Cut(budget="latency=0.9@2x16", units=["heads", "layers"]))
    layer = {"encoder.layer": torch.tensor([True, False, True])}
    heads = {"encoder.layer.1.attention.self": torch.tensor([True, False, False, False])}
    assert within.share(Mask({**layer, **heads})) == within.share(Mask(layer)) < within.share(Mask(heads)) < 1


def test_heads_neurons_and_layers_count_together_by_time():
    prepared = PreparedModel(tiny_model("bert"), tiny_tokenizer(), READING)
    cut = Cut(0, "sensitivity", budget="latency=0.6@2x16", units=ALL, multiple=1)
    texts = tiny_texts(24)
    selection = SensitivitySelection(prepared, cut, texts, READING)
    mask, _ = selection.select(score(prepared, texts, "random", units=ALL, reading=READING))
    assert 0.5 < selection.share(mask) <= 0.6
    model = prepared.model
    inputs = {"input_ids": torch.ones(2, 16, dtype=torch.long)}
    before = work_of(lambda: model(**inputs))
    remove_(model, mask)
    after = work_of(lambda: model(**inputs))
    assert (after + before / 3) / (before + before / 3) == pytest.approx(selection.share(mask), abs=0.02)


def test_a_table_is_obeyed_where_it_was_not_measured(tmp_path, capsys):
    model, file = small_model("bert"), tmp_path / "table.json"
    model.save_pretrained(tmp_path / "model")
    assert cli.main(["bench", str(tmp_path / "model"), "--table", str(file), "--shape", "2x8", "--device", "cpu"]) == 0
    assert "sites cost at 2x8 in pytorch" in capsys.readouterr().out
    table = LatencyTable.load(file)
    assert table.to_json().items() <= json.loads(file.read_text()).items()
    assert {table.kinds[0].levels[0].units, *(kind.levels[-1].units for kind in table.kinds)} == {4, 1, 2}
    cut = Cut(budget="latency=0.8x@2x8", latency_table=file, allocation="uniform")
    outcome = secateur.prune(model, restore="none", scorer="magnitude", cut=cut)[1].budget[0]
    assert outcome.reached == outcome.expected <= 0.8
    assert outcome.table == table
    assert "as the table says" in str(outcome)
    assert outcome.to_json()["is_measured"] is False


def test_a_table_of_something_else_is_refused(tmp_path):
    model, file = small_model("bert"), tmp_path / "table.json"
    table = measure_latency(model, UnitCosts(model, find_units(model, ALL), 2, 8), Shape(2, 8), rounds=1).to_json()
    wrong = {
        "`budget` must be of 4x8, as the latency table is, got '2x8'": {"shape": "4x8"},
        "`latency_table` must be what `secateur bench --table` writes": {"kinds": []},
        "`latency_table` must be what": {"kinds": [{"sites": ["a"], "levels": [{**WHOLE, "seconds": [0]}]}]},
        "must be what": {"runtime": None},
        "must be of this model, whose site": {"kinds": [{"sites": ["a"], "levels": [WHOLE]}]},
    }
    for message, change in wrong.items():
        file.write_text(json.dumps({**table, **change}))
        with pytest.raises(InvalidInputError, match=message):
            BudgetedSelection(model, Cut(budget="latency=0.8x@2x8", latency_table=file))
    with pytest.raises(InvalidInputError, match="`budget` must be of latency with a latency table"):
        Cut(budget="macs=0.5", latency_table=file)
