"""`Cut(plain=True)`: the best cut within a budget whose folder loads where secateur is not installed."""

import json
import math

import pytest
import torch
from transformers import AutoModel

import secateur
from secateur.choosing.allocation import SensitivitySelection
from secateur.choosing.plain_selection import PlainSelection
from secateur.cli import main
from secateur.errors import InvalidInputError, UnsupportedModelError
from secateur.removal.checkpoint import without_hook
from secateur.removal.plain import can_be_plain
from secateur.removal.remove import remove_
from secateur.settings import Budget, Cut, Reading
from secateur.sites.finding import find_units
from secateur.texts.calibration import PreparedModel
from secateur.units.masks import units_left
from tests.support.pruned import assert_equal
from tests.support.tiny import tiny_texts, tiny_tokenizer
from tests.support.units import ragged_mask, small_model

TEXTS = tiny_texts(16)
READING = Reading(batch_size=8, max_length=16, device="cpu")
ALL = ("heads", "neurons", "layers")


def selection_of(model, cut):
    return PlainSelection(PreparedModel(model, tiny_tokenizer(), READING), cut, TEXTS, READING)


def scores_of(selection):
    return secateur.score(selection.prepared, TEXTS, "random", units=selection.cut.kinds, reading=READING)


@pytest.mark.parametrize("kind", ["wide llama", "wide t5"])
def test_the_folder_loads_without_us(kind, tmp_path):
    model = small_model(kind)
    smaller, report = secateur.prune(
        model, TEXTS, budget="macs=0.6", cut=Cut(plain=True), tokenizer=tiny_tokenizer(), restore="none",
        reading=READING,
    )  # fmt: skip
    assert report.allocation == "sensitivity"
    assert report.budget[0].reached <= 0.6
    assert set(report.units) == set(ALL)
    smaller.save_pretrained(tmp_path)
    assert "head_pruning" not in json.loads((tmp_path / "config.json").read_text())
    with without_hook():
        assert_equal(AutoModel.from_pretrained(tmp_path), smaller)


def test_a_share_of_each_kind_is_that_of_every_site_and_each_keeps_its_best():
    """This config asks for a hidden size that its heads divide: of 8 heads 6 are none that divide 32."""
    selection = selection_of(small_model("wide llama"), Cut(0, budget="heads=0.75,neurons=0.5,layers=0.7", plain=True))
    scores = scores_of(selection)
    mask, _ = selection.select(scores)
    assert {kind: after for kind, (_, after) in units_left(selection.sites, mask).items()} == {
        "heads": 2 * 4, "neurons": 2 * 128, "layers": 2,
    }  # fmt: skip
    for name, row in mask.items():
        assert name == "layers" or scores[name][row].min() > scores[name][~row].max()
    shares = [outcome.reached for outcome in selection.outcomes(mask, selection.model)]
    assert shares == [0.5, 0.5, pytest.approx(2 / 3)]


def test_the_least_sum_of_errors_is_found():
    """Measured sizes are replaced by a made-up error; the choice is that of trying all by hand."""
    selection = selection_of(small_model("wide bert"), Cut(0, budget="macs=0.5", plain=True))
    scores = scores_of(selection)
    measured = selection.measure(scores)
    by_hand, tried = {}, []
    names = [name for name in measured if selection.sites[name].kind == "neurons"]
    for level in range(len(measured[names[0]])):
        for gone in ([], [0], [1], [2], [0, 1], [0, 2], [1, 2]):
            stays = [name for number, name in enumerate(names) if number not in gone]
            rows = {name: measured[name][level][1] for name in stays}
            rows["encoder.layer"] = torch.tensor([number not in gone for number in range(3)])
            error = sum(measured[name][level][0] for name in stays)
            error += sum(measured["encoder.layer"][number][0] for number in gone)
            tried.append(rows)
            if selection.share(secateur.Mask(rows)) <= 0.5:
                by_hand[error] = rows
    mask, error = selection.choose(scores, measured)
    assert error == pytest.approx(min(by_hand))
    wanted = by_hand[min(by_hand)]
    assert {name: row.tolist() for name, row in mask.items()} == {n: row.tolist() for n, row in wanted.items()}
    least = min(selection.share(secateur.Mask(rows)) for rows in tried)
    with pytest.raises(
        InvalidInputError, match=r"`budget` must be at least macs=(0\.\d+), the least that the"
    ) as caught:
        selection.at(Budget("macs", 0.1)).choose(scores, measured)
    assert f"macs={math.ceil(1000 * least) / 1000:g}," in str(caught.value)


def test_widths_between_those_measured_are_chosen_too():
    cut = Cut(0, budget="macs=0.9", units=("neurons",), plain=True, multiple=4)
    selection = selection_of(small_model("wide bert"), cut)
    mask, error = selection.choose(scores := scores_of(selection), selection.measure(scores))
    assert 0.88 < selection.share(mask) <= 0.9
    count = int(next(iter(mask.values())).sum())
    assert count % 32
    coarse = SensitivitySelection.measure(selection, scores)
    sums = {int(rows[0][1].sum()): sum(error for error, _ in rows) for rows in zip(*coarse.values(), strict=True)}
    below, above = (max(n for n in sums if n < count), min(n for n in sums if n > count))
    part = (count - below) / (above - below)
    assert error == pytest.approx(part * sums[above] + (1 - part) * sums[below])


def test_a_site_that_stays_whole_keeps_its_stack_whole():
    cut = Cut(0, budget="macs=0.7", plain=True, exclude=["encoder.layer.0.output.dense"])
    selection = selection_of(small_model("wide bert"), cut)
    mask, _ = selection.select(scores_of(selection))
    assert list(mask) == ["encoder.layer"]
    assert mask["encoder.layer"][0]


SAYS = "`budget` must be about units whose number the config of BertModel can"


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("wide bert", {"budget": "heads=0.5"}, SAYS),
        ("wide bert", {"pruning_ratio": 0.5}, SAYS),
        ("wide bert", {"budget": "macs=0.5", "allocation": "uniform"}, "`allocation` must be 'sensitivity' with"),
    ],
)
def test_what_no_config_says_is_refused(kind, given, message):
    with pytest.raises(InvalidInputError, match=message):
        secateur.prune(
            small_model(kind), TEXTS, cut=Cut(**given, plain=True), tokenizer=tiny_tokenizer(), restore="none",
            reading=READING,
        )  # fmt: skip


def test_the_size_of_a_head_is_no_number_of_heads():
    """Both are 4 here: three key-value heads of the size 4 have as many weights as four of the size 3."""
    model = small_model("llama")
    sites = find_units(model, ["heads"])
    mask = secateur.Mask({name: torch.arange(8) < 6 for name in sites})
    assert not can_be_plain(model, sites, mask)
    remove_(model, mask)
    assert model.config.head_dim == 4
    assert model.config.head_pruning


def test_a_model_that_has_a_recipe_already_is_refused_where_it_stays():
    model = small_model("bert")
    remove_(model, ragged_mask(find_units(model, ["heads"])))
    cut = Cut(budget="layers=0.7", plain=True)
    with pytest.raises(
        UnsupportedModelError, match="the config of BertModel cannot say by its own numbers what is left"
    ):
        secateur.prune(model, TEXTS, cut=cut, tokenizer=tiny_tokenizer(), restore="none")


def test_the_command(tmp_path, capsys):
    small_model("wide bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.csv").write_text("\n".join(["sentence", *TEXTS]))
    words = ["prune", tmp_path / "model", "--data", tmp_path / "texts.csv", "--max-length", 16, "--restore", "none"]
    words += ["--budget", "macs=0.6", "--plain", "--no-maps", "--out", tmp_path / "small"]
    assert main([*map(str, words)]) == 0
    assert "loads where secateur is not installed" in capsys.readouterr().out
    assert "head_pruning" not in (tmp_path / "small" / "config.json").read_text()
    with without_hook():
        AutoModel.from_pretrained(tmp_path / "small")
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    assert (report["allocation"], report["units"]["heads"][0]) == ("sensitivity", 12)
