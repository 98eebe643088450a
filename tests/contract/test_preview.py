"""What budgets would leave, before anything is cut."""

import json

import pytest
import torch

import secateur
from secateur.choosing.allocation import SensitivitySelection
from secateur.cli import main
from secateur.errors import InvalidInputError
from secateur.measuring.latency_table import Kind, LatencyTable, Level
from secateur.settings import Cut, Reading, Shape
from tests.support.tiny import tiny_texts, tiny_tokenizer
from tests.support.units import small_model

TEXTS = tiny_texts(16)
GIVEN = {
    "tokenizer": tiny_tokenizer(),
    "scorer": "random",
    "reading": Reading(batch_size=8, max_length=16, device="cpu"),
}


def test_it_says_what_prune_leaves_and_measures_once(monkeypatch):
    measured = []
    measure = SensitivitySelection.measure
    monkeypatch.setattr(SensitivitySelection, "measure", lambda self, *a: measured.append(1) or measure(self, *a))
    model = small_model("wide bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = secateur.preview(model, TEXTS, ["macs=0.5", "macs=0.8", "macs=0.01"], **GIVEN)
    assert measured == [1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [str(row.budget) for row in found.rows] == ["macs=0.8@1x128", "macs=0.5@1x128"]
    assert 0 < found.rows[0].change < found.rows[1].change
    assert found.num_texts == 16
    _, report = secateur.prune(model, TEXTS, budget="macs=0.5", cut=Cut(allocation="sensitivity"), **GIVEN)
    assert found.rows[1].mask == report.mask
    assert found.rows[1].macs == report.budget[0].reached
    assert found.rows[1].units == report.units
    assert str(found).splitlines()[1].startswith("macs=0.5@1x128: macs 0.4")


def test_the_change_is_the_sum_of_what_the_sites_change(monkeypatch):
    made_up = {}

    def measure(self, scores):
        for name in scores:
            whole = torch.ones(len(scores[name]), dtype=torch.bool)
            small = torch.arange(len(whole)) < len(whole) // 4
            made_up[name] = [(0.0, whole), (0.25, small)]
        return made_up

    monkeypatch.setattr(SensitivitySelection, "measure", measure)
    row = secateur.preview(small_model("wide bert"), TEXTS, ["macs=0.4"], **GIVEN).rows[0]
    smaller = sum(not kept.all() for kept in row.mask.values())
    assert smaller > 1
    assert row.change == 0.25 * smaller


def test_latency_is_predicted_where_it_is_asked_for(monkeypatch):
    def measure_latency(base, costs, shape, **others):
        def kind(name):
            macs = costs.saved_macs(name, torch.zeros(costs.sites[name].num_units, dtype=torch.bool))
            return Kind((name,), (Level(costs.sites[name].num_units, 0.0, [1.0]), Level(0, macs, [0.9])))

        return LatencyTable(Shape(1, 16), tuple(map(kind, costs.sites)))

    monkeypatch.setattr("secateur.choosing.budget.measure_latency", measure_latency)
    row = secateur.preview(small_model("wide bert"), TEXTS, ["latency=0.8x@1x16"], **GIVEN).rows[0]
    assert 0.6 < row.latency <= 0.8
    assert row.macs < row.latency


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([], "`budgets` must be a list of budgets that count all units"),
        ("macs=0.5", "`budgets` must be a list of budgets that count all units"),
        (["macs=0.5", "params=0.5"], "`budgets` must be a list of budgets that count all units, of one quantity"),
        (["heads=0.5"], "`budgets` must be a list of budgets that count all units"),
        (["macs=0.01"], "`budget` must be at least macs=0"),
    ],
)
def test_budgets_that_do_not_go_together_are_refused(budgets, message):
    with pytest.raises(InvalidInputError, match=message):
        secateur.preview(small_model("wide bert"), TEXTS, budgets, **GIVEN)


def test_a_cut_means_what_it_means_to_prune():
    model, cut = small_model("wide bert"), Cut(0.9, budget="heads=0.1", floor=2, exclude=["encoder.layer.0.*"])
    row = secateur.preview(model, TEXTS, ["macs=0.7"], cut=cut, **GIVEN).rows[0]
    _, report = secateur.prune(model, TEXTS, budget="macs=0.7", cut=cut, **GIVEN)
    may_go = {name: kept for name, kept in report.mask.kept.items() if not name.startswith("encoder.layer.0.")}
    assert row.mask.kept == may_go
    assert row.units == report.units
    assert min(map(len, may_go.values())) == 2
    with pytest.raises(InvalidInputError, match="`allocation` must be None or 'sensitivity' in a preview, got 'unif"):
        secateur.preview(model, TEXTS, cut=Cut(allocation="uniform"), **GIVEN)


@pytest.fixture
def command(tmp_path):
    small_model("wide bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.csv").write_text("\n".join(["sentence", *TEXTS]))
    return ["prune", str(tmp_path / "model"), "--data", str(tmp_path / "texts.csv"), "--max-length", "16"]


def test_the_command_prints_a_table_and_writes_nothing(command, tmp_path, capsys):
    there = sorted(tmp_path.rglob("*"))
    assert main([*command, "--dry-run", "--budget", "macs=0.6"]) == 0
    out = capsys.readouterr().out
    assert "change: at the end of the model before teaching, as a share of its variance" in out
    assert [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")] == [
        f"macs={share}@1x128" for share in ("0.9", "0.75", "0.6", "0.5", "0.33", "0.25")
    ]
    assert "latency" not in out
    assert main([*command, "--dry-run", "--json", "--plain"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert (rows[0]["budget"], rows[0]["latency"]) == ("macs=0.9@1x128", None)
    assert set(rows[0]["units"]) == {"heads", "neurons", "layers"}
    assert rows[0]["units"]["heads"][1] == 4 * rows[0]["units"]["layers"][1]
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Missing option '--out'"),
        (["--dry-run", "--allocation", "uniform"], "`allocation` must be left out or sensitivity with `--dry-run`"),
        (
            ["--dry-run", "--budget", "heads=0.5"],
            "`budget` must be of macs, params, latency with `--dry-run`, got 'heads=0.5'",
        ),
    ],
)
def test_what_a_command_cannot_do_is_refused(command, options, message, capsys):
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err
