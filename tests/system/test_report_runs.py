"""From folders to the page: every kind of run, several on one page, the numbers of a comparison by hand, and plots."""

import json
import re
from itertools import pairwise

import pytest

from secateur import cli
from secateur.comparing.summary import summarise
from secateur.errors import InvalidInputError
from secateur.report import MAX_MAP_CHARACTERS, render_report
from secateur.report.agreement import agreement
from secateur.report.comparison import comparison_view
from secateur.report.curves import cost_charts, curves
from secateur.report.numbers import DASH
from secateur.report.pruned import pruning_view
from secateur.report.reading import read_runs
from secateur.units.scores import Scores
from tests.support.pruned import pruned
from tests.support.report_data import EVIL, Page, comparison_rows, maps_of, pruning_json, write_comparison, write_pruned


def write_distilled(folder, about):
    (write_pruned(folder) / "distillation.json").write_text(json.dumps(about))
    return folder


def test_a_pruned_folder(tmp_path):
    data = read_runs([write_pruned(tmp_path / "p")])
    page = Page(render_report(data))
    assert "Kept 6 of 12 heads (pruning ratio 0.50)" in page.text
    assert "4 exchanges of heads were tried" in page.text
    assert "2 of them lowered" in page.text
    assert "0.4000 after refinement 0.2000 change -50.0 %" in page.text
    assert "16 calibration texts, their first 6 tokens" in page.text
    assert [a["class"] for tag, a in page.tags if tag == "script" and "class" in a] == ["maps"]


def test_a_distilled_folder_says_what_it_gave(tmp_path):
    about = {"relational_kl": [0.25, 0.125], "texts": 1234, "steps": 300}
    folder = write_distilled(tmp_path / "p", about)
    text = Page(render_report(read_runs([folder]))).text
    assert "Kept 6 of 12 heads (pruning ratio 0.50)" in text
    assert "in 300 steps on 1,234 texts: relational KL on texts held out 0.2500 before, 0.1250 after." in text
    (folder / "distillation.json").write_text(json.dumps({**about, "relational_kl": [0.25, 0.25]}))
    text = Page(render_report(read_runs([folder]))).text
    assert "Distillation did not lower the relational KL, 0.2500" in text
    assert "texts held out" not in text


def test_a_comparison_says_what_was_done_before_fine_tuning(tmp_path):
    said = []
    for number, settings in enumerate(({}, {"restore": "reconstruct"}, {"restore": "distill", "steps": 40})):
        folder = write_comparison(tmp_path / str(number), **settings)
        said.append(dict(comparison_view(read_runs([folder])[0])["facts"]).get("Before fine-tuning"))
    assert said == [None, "output projections refitted", "output projections refitted, distilled in 40 steps"]


def test_without_maps_it_says_so(tmp_path):
    page = Page(render_report(read_runs([write_pruned(tmp_path / "p", maps=False)])))
    assert "No attention maps were stored." in page.text
    reason = {"kind": "attention_maps", "texts": 0, "tokens": 0, "reason": "site x computes none", "sites": {}}
    (tmp_path / "p" / "attention_maps.json").write_text(json.dumps(reason))
    page = Page(render_report(read_runs([tmp_path / "p"])))
    assert "site x computes none" in page.text


def test_scores_alone_have_no_verdict(tmp_path):
    Scores({"layer.0": [1.0, 2.0, float("-inf")], "layer.1": [3.0, 1.0, 2.0]}, scorer="entropy").save(
        tmp_path / "s.json"
    )
    page = Page(render_report(read_runs([tmp_path / "s.json"])))
    assert "Scores of 5 heads" in page.text
    assert page.facts("layer.0", 1) == "layer 0, head 1: score 2, rank 1 of 2 in its site"
    assert page.facts("layer.0", 2) == "layer 0, head 2: removed by an earlier pruning"
    assert "Kept" not in page.text


def test_a_demo_folder(tmp_path):
    write_pruned(tmp_path / "d" / "pruned")
    rows = [
        {"name": name, "dense": 2.0, "pruned": 1.0, "unit": unit}
        for name, unit in (("accuracy", ""), ("latency, 8 x 128", "s"), ("fine-tuning", "s"))
    ]
    steps = {"prune": 1.0, "fine-tune dense": 3.0}
    result = {"pruning": pruning_json(), "rows": rows, "seed": 3, "step_seconds": steps, "model": "a real one"}
    (tmp_path / "d" / "result.json").write_text(json.dumps({**result, "command": "secateur demo --out d"}))
    page = Page(render_report(read_runs([tmp_path / "d"])))
    for words in (
        "secateur demo",
        "a real one",
        "one seed (3)",
        "latency, 8 x 128",
        "fine-tune dense 3.00 s",
        "--out d",
    ):
        assert words in page.text
    assert [tag for tag, a in page.tags if a.get("class") == "maps"] == ["script"]


def test_several_runs_make_one_page_with_one_outline(tmp_path):
    paths = [write_pruned(tmp_path / "one"), write_comparison(tmp_path / "two"), write_pruned(tmp_path / "three")]
    html = render_report(read_runs(paths))
    page = Page(html)
    assert "3 runs" in page.text
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    references = [name for _, a in page.tags for name in a.get("aria-labelledby", "").split()]
    references += [a["href"].removeprefix("#") for tag, a in page.tags if tag == "a"]
    assert set(references) <= set(ids)
    assert set(re.findall(r"url\(#([\w-]+)\)", html)) <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_curves_by_hand():
    rows = comparison_rows()
    charts = {chart.title: chart for chart in curves(rows, summarise(rows))}
    assert set(charts) == {"a", "b", "mean retention"}
    lines = {series.name: series for series in charts["a"].series}
    assert [p.x for p in lines["random"].points] == [0, 0.25, 0.5]
    assert [p.y for p in lines["random"].points] == pytest.approx([0.805, 0.695, 0.48])
    assert lines["random"].points[2].spread == pytest.approx(0.04 / 2**0.5)  # 0.50 and 0.46
    retention = {series.name: series.points for series in charts["mean retention"].series}["contribution"]
    by_seed = [(0.78 / 0.80 + 0.83 / 0.85) / 2, (0.78 / 0.81 + 0.83 / 0.86) / 2]
    assert retention[2].y == pytest.approx(sum(by_seed) / 2)
    assert retention[2].spread == pytest.approx(abs(by_seed[0] - by_seed[1]) / 2**0.5)
    costs = cost_charts(rows, summarise(rows))
    assert [chart.slug for chart in costs] == ["cost-0.25", "cost-0.5"]
    assert {s.name: s.points[0].x for s in costs[0].series} == {"random": 0.2, "contribution": 1.0, "smp": 3.3}


def test_curves_leave_out_tasks_whose_dense_model_learned_nothing():
    rows = [{**row, "constant": 0.9 if row["task"] == "b" else 0.5} for row in comparison_rows()]
    charts = {chart.title: chart for chart in curves(rows, summarise(rows))}
    retention = {series.name: series.points for series in charts["mean retention"].series}["contribution"]
    by_seed = [0.78 / 0.80, 0.78 / 0.81]
    assert retention[2].y == pytest.approx(sum(by_seed) / 2)
    assert retention[2].spread == pytest.approx(abs(by_seed[0] - by_seed[1]) / 2**0.5)
    nothing = [{**row, "constant": 0.9} for row in rows]
    assert "mean retention" not in {chart.title for chart in curves(nothing, summarise(nothing))}
    assert cost_charts(nothing, summarise(nothing)) == []


def test_agreement_by_hand(tmp_path):
    (run,) = read_runs([write_comparison(tmp_path / "c")])
    found = {matrix["slug"]: matrix for matrix in agreement(run["rows"], run["scores"])}
    assert set(found) == {"overlap-0.25", "overlap-0.5", "rank-correlation"}
    assert found["overlap-0.5"]["names"] == ["random", "contribution", "smp"]
    # [0, 1], [2, 3] and [1, 3]; orders 4321, 1234 and 1324: 1 - 6 * 2 / (4 * 15) = 0.8.
    assert found["overlap-0.5"]["values"] == [[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.5, 0.5, 1.0]]
    ranks = found["rank-correlation"]["values"]
    assert ranks[0] == pytest.approx([1.0, -1.0, -0.8])
    assert ranks[1] == pytest.approx([-1.0, 1.0, 0.8])


def test_the_table_says_what_is_noise(tmp_path):
    losses = {("random", 0.5): (0.30, 0.3001), ("contribution", 0.5): (0.02, -0.03)}
    write_comparison(tmp_path / "c", comparison_rows(("a",), losses))
    view = comparison_view(read_runs([tmp_path / "c"])[0])
    cells = {row["scorer"]: row["cells"][0] for row in view["table"]["rows"]}
    assert cells["random"]["verdict"] == "lower"
    assert cells["contribution"]["verdict"] == "noise"
    assert cells["dense"]["difference"] is None
    one = comparison_view({**read_runs([tmp_path / "c"])[0], "rows": comparison_rows(("a",), losses)[:3]})
    assert {row["cells"][0].get("verdict") for row in one["table"]["rows"][1:]} == {"unknown"}
    assert view["tiles"][1]["value"] == "100.6%"  # contribution: 0.78 / 0.80 and 0.84 / 0.81
    assert view["tiles"][2]["note"] == "random, 50% removed"


def test_no_retention_over_fewer_tasks_than_the_others(tmp_path):
    rows = [row for row in comparison_rows() if (row["scorer"], row["task"]) != ("smp", "b")]
    view = comparison_view(read_runs([write_comparison(tmp_path / "c", rows)])[0])
    retention = {row["scorer"]: row["retention"] for row in view["table"]["rows"] if row["ratio"] == "50%"}
    assert retention["smp"] == DASH
    assert retention["random"].endswith("%")


def test_scores_of_each_ratio_go_with_the_heads_kept_at_it(tmp_path):
    folder = write_comparison(tmp_path / "c", comparison_rows(("a",)))
    for seed in (0, 1):
        (folder / "scores" / f"a-smp-{seed}.json").unlink()
        for ratio, scores in ((0.25, [9.0, 0.0, 8.0, 1.0]), (0.5, [0.0, 1.0, 0.0, 1.0])):
            data = {"kind": "scores", "scores": {"layer.0": scores}}
            (folder / "scores" / f"a-smp-{ratio:g}-{seed}.json").write_text(json.dumps(data))
    found = {h["name"]: h for h in comparison_view(read_runs([folder])[0])["histograms"]}
    places = {(bar["side"], bar["x"]) for bar in found["smp"]["bars"]}
    assert places == {("kept", 100 * 31 / 32), ("removed", 0.0)}  # heads 1 and 3 are kept


def test_heads_of_an_earlier_pruning_do_not_count(tmp_path):
    names = [f"encoder.layer.{i}.attention.self" for i in range(2)]
    scores, kept = {name: [None, None, 0.1, 0.2] for name in names}, {name: [3] for name in names}
    view = pruning_view(read_runs([write_pruned(tmp_path / "p", False, scores=scores, kept_heads=kept)])[0])
    assert view["headline"] == "Kept 2 of 4 heads (pruning ratio 0.50)"


def test_comparisons_of_the_same_settings_are_joined(tmp_path):
    rows = comparison_rows()
    some = [row for row in rows if row["scorer"] != "smp"]
    rest = [row for row in rows if row["scorer"] in ("smp", "dense")]
    one, two = write_comparison(tmp_path / "one", some), write_comparison(tmp_path / "two", rest)
    (joined,) = read_runs([one, two])
    assert sorted(map(str, joined["rows"])) == sorted(map(str, rows))
    assert {name.rsplit("-", 2)[1] for name in joined["scores"]} == {"random", "contribution", "smp"}
    other = write_comparison(tmp_path / "other", rest, protocol="full")
    moved = write_comparison(tmp_path / "moved", [{**row, "data": "elsewhere"} for row in rest])
    halves = write_comparison(tmp_path / "halves", rest, bf16=True)
    assert len(read_runs([one, other])) == len(read_runs([one, moved])) == len(read_runs([one, halves])) == 2
    assert len(read_runs([one, write_comparison(tmp_path / "floats", rest, bf16=False)])) == 1


def test_rows_alone_are_a_comparison(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in comparison_rows()))
    text = Page(render_report(read_runs([tmp_path / "rows.jsonl"]))).text
    assert "3 scorers compared on 2 tasks, 2 seeds" in text
    assert "rank correlation" not in text


def test_everything_from_outside_is_escaped(tmp_path):
    rows = [{**row, "task": EVIL, "metric": EVIL} for row in comparison_rows(("a",))]
    write_comparison(tmp_path / "c", rows, scores=False, model=EVIL)
    report = pruning_json(model=EVIL, command=EVIL)
    report["scores"] = {EVIL + name: row for name, row in report["scores"].items()}
    report["kept_heads"] = {EVIL + name: row for name, row in report["kept_heads"].items()}
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "pruning_report.json").write_text(json.dumps(report))
    maps_of(report).save(folder / "attention_maps.json")
    html = render_report(read_runs([folder, tmp_path / "c"]))
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 2  # the maps and the page's own
    assert "<script>alert" not in html
    stored = re.search(r'<script type="application/json" class="maps">(.*?)</script>', html, re.DOTALL)
    assert set(json.loads(stored[1])["sites"]) == set(report["scores"])


def test_many_heads_stay_small(tmp_path):
    """30 layers of 32 heads, 32 tokens: less than three million bytes, and a second such run goes without maps."""
    report = pruning_json(sites=30, heads=32)
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "pruning_report.json").write_text(json.dumps(report))
    maps_of(report, tokens=32).save(folder / "attention_maps.json")
    one = render_report(read_runs([folder]))
    assert 30 * 32 * 32 * 32 < len(one.encode()) < 3e6
    two = render_report(read_runs([folder, folder]))
    assert "left out to keep the page small" in two
    assert two.count('class="maps"') == 1
    assert len(two.encode()) - len(one.encode()) < 600_000 < MAX_MAP_CHARACTERS


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none", "there is no such file"),
        (lambda p: p, "be a pruned folder"),
        (lambda p: write_comparison(p / "c", []), "at least one finished run"),
        (lambda p: write_comparison(p / "c", [{"task": "a"}], scores=False), "has no data, scorer"),
        (lambda p: write_pruned(p / "x", before={}), "another form: KeyError"),
        (lambda p: write_pruned(p / "x", refinement=["a", "b"]), "`refinement` must"),
        (lambda p: write_distilled(p / "x", {"relational_kl": [1.0]}), "distillation.json has another form"),
        (lambda p: write_distilled(p / "x", [1.0, 0.5]), "distillation.json has another form"),
    ],
)
def test_bad_runs_are_one_line(make, message, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cli.main(["report", str(make(tmp_path)), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_a_model_without_its_report_is_told_where_that_comes_from(place, tmp_path, capsys):
    """As `prune` in Python and `save_pretrained` leave it, of sentence-transformers too; saved, the report is read."""
    folder = tmp_path / "small"
    pruned("bert").save_pretrained(folder / place)
    if place:
        (folder / "modules.json").write_text(
            json.dumps([{"name": "0", "path": place, "type": "sentence_transformers.models.Transformer"}])
        )
    words = ["report", str(folder), "--out", str(tmp_path / "page.html")]
    capsys.readouterr()  # transformers' own bars
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"`run` must hold pruning_report.json beside the model, got '{folder}'; " in line
    assert 'report.save(folder / "pruning_report.json")' in line
    (folder / "pruning_report.json").write_text(json.dumps(pruning_json()))
    assert cli.main(words) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": 3}, "`task` must be a text, got 3"),
        ({"value": float("nan")}, "`value` must be a finite number"),
        ({"ratio": 1.0}, r"`ratio` must be in \[0, 1\), got 1.0"),
        ({"cost": {"training_seconds": "long"}}, "`cost` must map names to numbers"),
        ({"kept_heads": {"layer.0": 3}}, "`kept_heads` must map sites to head numbers"),
        ({"environment": "today's"}, "`environment` must map names to values"),
    ],
)
def test_a_row_of_another_form_is_named(change, message, tmp_path):
    row, *others = comparison_rows()
    write_comparison(tmp_path / "c", [row, {**others[0], **change}], scores=False)
    with pytest.raises(InvalidInputError, match=f"c: row 2 of runs.jsonl: {message}"):
        read_runs([tmp_path / "c"])


def test_what_holds_no_run_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="`runs` must name at least one run"):
        read_runs([])
    write_comparison(tmp_path / "c", scores=False)
    (tmp_path / "c" / "settings.json").write_text("[]")
    with pytest.raises(InvalidInputError, match="`settings` must map names to values"):
        read_runs([tmp_path / "c"])
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "result.json").write_text("{}")
    with pytest.raises(InvalidInputError, match=r"result.json has another form: KeyError"):
        read_runs([tmp_path / "d"])


@pytest.mark.parametrize("maps", [[], {"tokens": "6", "sites": {}}, {"tokens": 6, "sites": {"a": {"heads": 3}}}])
def test_maps_that_are_none_are_refused(maps, tmp_path):
    write_pruned(tmp_path / "p")
    (tmp_path / "p" / "attention_maps.json").write_text(json.dumps(maps))
    with pytest.raises(InvalidInputError, match=r"`attention_maps` must be what `AttentionMaps.to_json` returns"):
        render_report(read_runs([tmp_path / "p"]))


def test_maps_of_another_form_are_refused(tmp_path):
    write_pruned(tmp_path / "p")
    maps = json.loads((tmp_path / "p" / "attention_maps.json").read_text())
    next(iter(maps["sites"].values()))["levels"] = "AAAA"
    (tmp_path / "p" / "attention_maps.json").write_text(json.dumps(maps))
    with pytest.raises(InvalidInputError, match="`attention_maps` must hold 144 levels"):
        render_report(read_runs([tmp_path / "p"]))


def test_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [str(write_pruned(tmp_path / "p")), str(write_comparison(tmp_path / "c", comparison_rows(("$a_b", "a/b"))))]
    line = ["report", *runs, "--out", str(tmp_path / "r.html"), "--plots", str(tmp_path / "plots")]
    assert cli.main(line) == 0
    curves = ["curve-a_b", "curve-a-b", "curve-mean-retention"]
    others = ["cost-0.25", "cost-0.5", "overlap-0.25", "overlap-0.5", "rank-correlation"]
    stems = {"1-head-map", "1-scores", "1-refinement", *(f"2-{name}" for name in curves + others)}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"{stem}.svg" for stem in stems}
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(stems)
    assert "$a_b" in (tmp_path / "plots" / "2-curve-a_b.svg").read_text()


def test_plots_of_one_name_and_of_one_run(tmp_path):
    pytest.importorskip("matplotlib")
    from secateur.report.plots import write_plots

    losses = {("random", 0.5): (0.1, 0.2)}
    run = read_runs([write_comparison(tmp_path / "c", comparison_rows(("a/b", "a-b"), losses))])
    written = write_plots(run, tmp_path / "plots", "pdf")
    names = [path.name for path in written]
    assert names == ["curve-a-b.pdf", "curve-a-b-2.pdf", "curve-mean-retention.pdf", "cost-0.5.pdf"]
    before = [path.read_bytes() for path in written]
    assert all(content.startswith(b"%PDF") for content in before)
    assert [path.read_bytes() for path in write_plots(run, tmp_path / "plots", "pdf")] == before
    with pytest.raises(InvalidInputError, match="`plot_format` must be one of svg, pdf"):
        write_plots(run, tmp_path / "plots", "png")


def test_plots_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    out = tmp_path / "r.html"
    line = ["report", str(write_pruned(tmp_path / "p")), "--out", str(out), "--plots", str(tmp_path / "plots")]
    assert cli.main(line) == 2
    assert "pip install 'secateur[plots]'" in capsys.readouterr().err
    assert not out.exists()
