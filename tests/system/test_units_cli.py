"""The commands, for neurons and layers as for heads."""

import json

import pytest
from transformers import AutoModel

from secateur import cli
from tests.support.tiny import tiny_texts, tiny_tokenizer
from tests.support.units import small_model


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a small model and a few texts."""
    folder = tmp_path_factory.mktemp("work")
    small_model("wide bert").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "texts.csv").write_text("sentence\n" + "\n".join(tiny_texts(8)))
    return folder


def run(work, command, *options):
    return cli.main([command, str(work / "model"), "--data", str(work / "texts.csv"), *options])


def test_half_of_the_work_goes(work, tmp_path, capsys):
    assert run(work, "prune", "--budget", "macs=0.5", "--no-maps", "--out", str(tmp_path / "small")) == 0
    out = capsys.readouterr().out
    assert "scored by heads=matching,neurons=contribution" in out
    assert "of 12 heads, " in out
    assert "of 768 neurons, macs 0." in out
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    assert report["budget"][0]["reached"] <= 0.5
    assert set(report["units"]) == {"heads", "neurons"}
    page = (tmp_path / "small" / "report.html").read_text()
    assert "macs=0.5@1x128, reached 0." in page
    assert "neurons" in page
    AutoModel.from_pretrained(tmp_path / "small")


def test_a_criterion_for_each_kind_and_sites_that_stay(work, tmp_path, capsys):
    given = ["--scorer", "heads=magnitude,neurons=random,layers=block_influence", "--units", "heads,neurons,layers"]
    given += ["--ratio", "0.4", "--exclude", "encoder.layer.0.*", "--exclude", "encoder.layer.1.*", "--json"]
    assert run(work, "prune", *given, "--no-maps", "--out", str(tmp_path / "shorter")) == 0
    assert json.loads(capsys.readouterr().out)["kept_layers"] == {"encoder.layer": [0, 1]}
    given += ["--exclude", "encoder.layer"]
    assert run(work, "prune", *given, "--no-maps", "--out", str(tmp_path / "small")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["scorer"] == "heads=magnitude,neurons=random,layers=block_influence"
    assert [len(kept) for kept in report["kept_heads"].values()] == [4, 4, 3]
    assert list(report["kept_neurons"].values())[:2] == ["0:256", "0:256"]
    assert [len(kept) for kept in report["kept_layers"].values()] == [3]
    assert len(AutoModel.from_pretrained(tmp_path / "small").encoder.layer) == 3


def test_scores_of_all_kinds(work, tmp_path, capsys):
    out = tmp_path / "scores.json"
    given = ["--units", "heads,neurons,layers", "--scorer", "random"]
    assert run(work, "score", *given, "--out", str(out)) == 0
    assert run(work, "score", *given) == 0
    text = capsys.readouterr().out
    for word in ("encoder.layer.1.attention.self", "encoder.layer.1.output.dense", "encoder.layer ", "median", "256"):
        assert word in text
    kinds = json.loads(out.read_text())["kinds"]
    assert sorted(kinds.values()) == ["layers", "neurons", "neurons", "neurons"]


def test_info_counts_all_kinds(work, capsys):
    assert cli.main(["info", str(work / "model")]) == 0
    text = capsys.readouterr().out
    assert "neurons: 3 sites of 256" in text
    assert "layers: encoder.layer has 3" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--units", "heads,words"], "`units` must be some of heads, neurons, layers, with commas, got heads,words"),
        (["--units", "heads,heads"], "`units` must be some of heads, neurons, layers, with commas, got heads,heads"),
        (["--scorer", "heads=best"], "`scorer` must be one of block_influence, "),
        (["--scorer", "words=random"], "`scorer` must name each of heads, neurons, layers once at most"),
        (["--scorer", "heads=random,heads=random"], "`scorer` must name each of heads, neurons, layers once at most"),
        (["--scorer", "neurons=random"], "`scorer` must name kinds among the `units` that are scored, heads"),
        (["--units", "layers", "--scorer", "magnitude"], "`scorer` must score layers, got 'magnitude'"),
        (["--units", "neurons", "--scorer", "entropy"], "`scorer` must score neurons, got 'entropy'"),
        (["--scorer", "heads=l0", "--option", "steps=3"], "`option` goes with one `--scorer` alone"),
        (["--budget", "macs=0.5,params=0.5"], "`budget` must name each of heads, neurons, layers once at most"),
        (["--budget", "neurons=0.5", "--units", "heads"], "`units` must hold what the budget names, neurons"),
        (["--budget", "macs=0.01"], "`budget` must be at least macs=0."),
        (["--exclude", "nowhere.*"], "`exclude` must leave some sites, and each pattern match one"),
        (["--exclude", "*"], "`exclude` must leave some sites"),
        (["--refine", "2", "--budget", "macs=0.9"], "`refine` must be 0 where heads, neurons go"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(work, options, message, tmp_path, capsys):
    assert run(work, "prune", *options, "--no-maps", "--out", str(tmp_path / "no")) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "secateur: error:" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "no").exists()
