import json
import re
from itertools import pairwise

import pytest

from secateur.errors import InvalidInputError
from secateur.report import render_report, write_report
from secateur.report.pruned import pruning_view
from tests.support.report_data import Page

EVIL = "<script>alert('x')</script>\"'&"


def minimal(sites=None):
    return {"sites": sites or [{"name": "layer.0.attn", "scores": [1.0, 3.0, 2.0], "kept": [False, True, True]}]}


def full():
    sites = [
        {"name": f"encoder.layer.{i}.attention.self", "scores": [0.1 * i + 0.01 * h for h in range(4)]}
        for i in range(3)
    ]
    for site in sites:
        site["kept"] = [False, False, True, True]
    return {
        "title": "secateur demo",
        "model": "all-MiniLM-L6-v2",
        "created": "2026-01-02 03:04",
        "scorer": "contribution",
        "pruning_ratio": 0.5,
        "requested_ratio": 0.55,
        "allocation": "uniform",
        "kept": 6,
        "heads": 12,
        "sites": sites,
        "cost": [
            {"name": "parameters", "dense": 22713216, "pruned": 20352000, "unit": ""},
            {"name": "multiply-accumulates", "dense": 2e9, "pruned": 1.5e9, "unit": "", "note": "1 x 128 tokens"},
            {"name": "latency", "dense": 0.05, "pruned": 0.04, "unit": "s"},
        ],
        "quality": [{"name": "accuracy", "dense": 0.855, "pruned": 0.845, "note": "on 200 texts"}],
        "times": [{"name": "scoring", "seconds": 3.2}],
        "proof": {"max_difference": 2.3e-7, "tolerance": 1e-4, "probe": "2 x 12 random tokens"},
        "command": "secateur demo --out demo",
        "environment": {"torch": "2.6.0"},
        "notes": ["A note."],
    }


def test_full_report_states_every_part():
    page = Page(render_report([json.loads(json.dumps(full()))]))
    for words in (
        "Kept 6 of 12 heads (pruning ratio 0.50)",
        "all-MiniLM-L6-v2",
        "Requested ratio 0.55",
        "20.4 M from 22.7 M (-10.4 %)",
        "22,713,216 20,352,000 -10.4 % 0.896",
        "1 x 128 tokens 2,000,000,000 1,500,000,000 -25.0 % 0.750",
        "50.0 ms 40.0 ms -20.0 % 0.800",
        "0.855 0.845 -0.010",
        "scoring 3.20 s",
        "2.3e-7",
        "equal within the tolerance",
        "2 x 12 random tokens",
        "secateur demo --out demo",
        "torch 2.6.0",
        "A note.",
        "Made by secateur 0.1.0",
    ):
        assert words in page.text
    assert ("html", {"lang": "en"}) in page.tags


def test_key_figures_name_quality_and_latency():
    data = full()
    quality = {"name": "relational KL", "dense": 0.0, "pruned": 0.01, "note": "48 texts held out"}
    view = pruning_view({**data, "quality": [*data["quality"], quality]})
    assert [tile["name"] for tile in view["tiles"]] == [
        "attention heads", "parameters", "multiply-accumulates", "latency", "accuracy", "relational KL"
    ]  # fmt: skip
    assert view["tiles"][-1]["note"] == "from 0.000 (+0.010), 48 texts held out"
    blocks = [{"name": "layer 0: neurons", "dense": 64, "pruned": 32}]
    view = pruning_view({"units": {"neurons": [64, 32]}, "blocks": blocks, "quality": [quality]})
    assert [tile["name"] for tile in view["tiles"]] == ["relational KL"]  # also where no head could go


@pytest.mark.parametrize("needs", [True, False])
def test_it_tells_how_to_load(needs):
    loading = {"code": "model = X.from_pretrained('<FOLDER>')", "needs_secateur": needs}
    page = Page(render_report([{**minimal(), "loading": loading}]))
    assert "How to load model = X.from_pretrained('<FOLDER>')" in page.text
    assert ("ignore_mismatched_sizes" in page.text) is needs
    assert ("Nothing else is needed" in page.text) is not needs


def test_headings_go_down_one_level_at_a_time():
    levels = [int(tag[1]) for tag, _ in Page(render_report([full()])).tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_every_head_appears_once_with_its_verdict():
    data = full()
    page = Page(render_report([data]))
    expected = {(s["name"], h): "kept" if k else "removed" for s in data["sites"] for h, k in enumerate(s["kept"])}
    assert len(page.heads) == 12
    assert page.verdicts() == expected
    for head in page.heads:
        assert head["data-verdict"] in head["aria-label"]
        assert head["data-verdict"] in head["class"].split()


def test_head_facts():
    page = Page(render_report([minimal()]))
    assert page.facts("layer.0.attn", 0) == "layer 0, head 0: removed, score 1, rank 3 of 3 in its site"
    assert page.facts("layer.0.attn", 1) == "layer 0, head 1: kept, score 3, rank 1 of 3 in its site"


def test_colour_is_within_the_model_and_within_the_site():
    sites = [{"name": f"layer.{i}", "scores": [2.0 * i, 2.0 * i + 1], "kept": [True, True]} for i in range(3)]
    styles = [head["style"] for head in Page(render_report([minimal(sites)])).heads]
    assert styles[2:4] == ["--m:0.400;--s:0.000", "--m:0.600;--s:1.000"]


def test_uneven_sites():
    sites = [
        {"name": "layer.0", "scores": [0.5], "kept": [True]},
        {"name": "layer.1", "scores": [0.1, 0.2, 0.3], "kept": [False, True, True]},
    ]
    page = Page(render_report([minimal(sites)]))
    assert [(a["data-site"], a["data-head"]) for a in page.heads] == [
        ("layer.0", "0"),
        ("layer.1", "0"),
        ("layer.1", "1"),
        ("layer.1", "2"),
    ]
    assert ("td", {"colspan": "2"}) in page.tags
    assert "1 of 1" in page.text
    assert "2 of 3" in page.text


def test_null_scores():
    sites = [
        {"name": "layer.0", "scores": [None, 0.2, None], "kept": [False, True, True]},
        {"name": "layer.1", "scores": None, "kept": [True, False, True]},
    ]
    page = Page(render_report([minimal(sites)]))
    assert page.facts("layer.0", 0) == "layer 0, head 0: removed by an earlier pruning"
    assert page.facts("layer.0", 1) == "layer 0, head 1: kept, score 0.2, rank 1 of 1 in its site"
    assert page.facts("layer.0", 2) == "layer 0, head 2: kept, no score"
    assert page.facts("layer.1", 1) == "layer 1, head 1: removed, no score"


def test_without_any_scores_there_is_no_scale_and_no_histogram():
    page = Page(render_report([minimal([{"name": "layer.0", "kept": [True, False]}])]))
    assert len(page.heads) == 2
    assert "No scores are recorded" in page.text
    assert not [tag for tag, _ in page.tags if tag in ("svg", "input")]


@pytest.mark.parametrize(
    "scores",
    [[0.0, 0.0], [-1e308, 1e308], [5e-324, 0.0], [1.0, 1.0000000000000002], [-3, 7], [1e6, 1e6 + 1e-3]],
)
def test_extreme_scores(scores):
    html = render_report([minimal([{"name": "layer.0", "scores": scores, "kept": [True, False]}])])
    assert "nan" not in html
    assert "inf" not in html.replace("info", "")
    places = [float(x) for x in re.findall(r' x1?="([\d.-]+)%"', html)]
    assert all(0 <= place <= 100 for place in places)


@pytest.mark.parametrize(
    "section", ["cost", "quality", "times", "proof", "command", "environment", "notes", "requested_ratio", "kept"]
)
@pytest.mark.parametrize("value", ["absent", None])
def test_optional_sections_may_be_absent(section, value):
    data = full()
    if value is None:
        data[section] = None
    else:
        del data[section]
    page = Page(render_report([data]))
    assert len(page.heads) == 12
    heading = {"cost": "run1-cost", "quality": "run1-quality", "times": "run1-times", "proof": "run1-proof"}.get(
        section
    )
    ids = {attrs.get("id") for _, attrs in page.tags}
    assert heading is None or heading not in ids
    assert "None" not in page.text


def test_sites_alone_are_enough():
    page = Page(render_report([minimal()]))
    assert "Kept 2 of 3 heads (pruning ratio 0.33)" in page.text
    assert [attrs["id"] for tag, attrs in page.tags if tag == "h2"] == ["run1-map", "run1-scores"]


def test_unknown_numbers_and_zero_become_a_dash():
    data = minimal()
    data["cost"] = [{"name": "a", "dense": 0, "pruned": 1}, {"name": "b", "dense": None, "pruned": 2.5}]
    data["quality"] = [{"name": "c", "dense": 0.5, "pruned": None}, {"name": "d", "dense": 0.5, "pruned": 0.5}]
    text = Page(render_report([data])).text
    assert "a 0 1 ~ ~ b ~ 2.5 ~ ~" in text
    assert "c 0.500 ~ ~ d 0.500 0.500 0.000" in text


def test_a_failed_proof_says_so():
    data = full()
    data["proof"]["max_difference"] = 0.1
    text = Page(render_report([data])).text
    assert "outside the tolerance" in text
    assert "equal within" not in text


def test_everything_from_outside_is_escaped():
    data = full()
    for key in ("title", "model", "created", "scorer", "allocation", "command"):
        data[key] = EVIL
    data["sites"][0]["name"] = EVIL
    data["environment"] = {EVIL: EVIL}
    data["notes"] = [EVIL]
    for section in ("cost", "quality", "times"):
        for row in data[section]:
            row.update(name=EVIL, note=EVIL, unit=EVIL)
    data["proof"]["probe"] = EVIL
    html = render_report([data])
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "<script>alert" not in html
    assert page.heads[0]["data-site"] == EVIL
    assert len(page.heads) == 12
    assert page.text.count("<script>alert('x')</script>") > 15


def test_the_page_refers_to_nothing_outside():
    html = render_report([full()])
    assert not re.search(r"https?://", html.replace('xmlns="http://www.w3.org/2000/svg"', ""))
    assert not re.search(r"@import|url\((?!#)|\bfetch\(|XMLHttpRequest", html)
    for tag, attrs in Page(html).tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attrs.get(name) in (None, "data:,"), (tag, name)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"], ["layer 0", "layer 1"]),
        (["block.0.layer.0.SelfAttention", "block.1.layer.0.SelfAttention"], ["layer 0", "layer 1"]),
        (["layers.0.blocks.0.attn", "layers.0.blocks.1.attn", "layers.1.blocks.0.attn"], ["0.0", "0.1", "1.0"]),
        (
            ["m.encoder.layers.0.self_attn", "m.decoder.layers.0.self_attn", "m.decoder.layers.0.encoder_attn"],
            ["encoder 0 self_attn", "decoder 0 self_attn", "decoder 0 encoder_attn"],
        ),
        (["h.0.a.x", "h.0.b.x"], ["a 0 x", "b 0 x"]),
        (["h.0.a", "h.0.a.b.a"], ["h.0.a", "h.0.a.b.a"]),
        (["attention", "other"], ["attention", "other"]),
        (["0", "1"], ["layer 0", "layer 1"]),
    ],
)
def test_short_labels(names, labels):
    html = render_report([minimal([{"name": name, "scores": None, "kept": [True]} for name in names])])
    shown = re.findall(r'<th scope="row" class="site" title="[^"]*">([^<]*)</th>', html)
    assert [text.removeprefix("layer ") if labels[0] == "0.0" else text for text in shown] == labels


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"sites": None}, "sites"),
        ({"sites": []}, "sites"),
        ({"sites": {"a": [True]}}, "sites"),
        ({"sites": ["a"]}, "sites[0]"),
        ({"sites": [{"name": "", "kept": [True]}]}, "sites[0]"),
        ({"sites": [{"name": "a"}]}, "sites[0].kept"),
        ({"sites": [{"name": "a", "kept": []}]}, "sites[0].kept"),
        ({"sites": [{"name": "a", "kept": [1, 0]}]}, "sites[0].kept"),
        ({"sites": [{"name": "a", "kept": [True, True], "scores": [1.0]}]}, "sites[0].scores"),
        ({"sites": [{"name": "a", "kept": [True], "scores": [float("nan")]}]}, "sites[0].scores"),
        ({"sites": [{"name": "a", "kept": [True], "scores": ["1"]}]}, "sites[0].scores"),
        ({"sites": [{"name": "a", "kept": [True]}, {"name": "a", "kept": [True]}]}, "sites[1].name"),
        ({"kept": 7}, "kept"),
        ({"heads": 13}, "heads"),
        ({"pruning_ratio": 0.6}, "pruning_ratio"),
        ({"requested_ratio": "half"}, "requested_ratio"),
        ({"cost": {"parameters": 1}}, "cost"),
        ({"cost": [{"dense": 1, "pruned": 1}]}, "cost[0]"),
        ({"cost": [{"name": "a", "dense": 1}]}, "cost[0].pruned"),
        ({"quality": [{"name": "a", "dense": "1", "pruned": 1}]}, "quality[0].dense"),
        ({"times": [{"name": "a", "seconds": float("inf")}]}, "times[0].seconds"),
        ({"proof": {"max_difference": 1.0}}, "proof"),
        ({"environment": ["torch"]}, "environment"),
        ({"notes": "one"}, "notes"),
        ({"loading": {"code": 3, "needs_secateur": True}}, "loading"),
    ],
)
def test_bad_input_names_the_part(change, name):
    with pytest.raises(InvalidInputError, match=re.escape(f"`{name}` must ") + ".*, got "):
        render_report([{**full(), **change}])


def test_bad_input_leaves_no_file(tmp_path):
    with pytest.raises(InvalidInputError, match="`runs` must"):
        write_report([], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_write_report(tmp_path):
    write_report([full()], tmp_path / "new" / "report.html")
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8") == render_report([full()])
