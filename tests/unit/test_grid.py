"""What a person sees of scores, masks and reports in a console or a notebook."""

import re
from html.parser import HTMLParser

import pytest
import torch

import secateur
from secateur import Mask, Scores
from secateur.units.grid import grid_html
from tests.support.units import small_model

CROSS = "\N{MULTIPLICATION SIGN}"


class Cells(HTMLParser):
    """The rows of a table: for each its name, and of each cell its shade, title and text."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.opened = [], []
        self.feed(text)
        assert not self.opened

    def handle_starttag(self, tag, attributes):
        self.opened.append(tag)
        known = dict(attributes)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            shade = re.search(r"rgba\(42,120,214,([0-9.]+)\)", known.get("style", ""))
            self.rows[-1].append([shade and float(shade[1]), known.get("title"), ""])

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag

    def handle_data(self, data):
        if self.opened[-1] in ("th", "td"):
            self.rows[-1][-1][2] += data


def rows_of(value):
    return Cells(value._repr_html_()).rows


def test_a_mask_has_a_cross_where_a_unit_goes():
    mask = Mask({"layer.0.attention": [True, False], "layer.1.attention": [False, True]})
    assert repr(mask) == "Mask(kept 2 of 4 units (pruning ratio 0.50), 2 sites)"
    assert [[text for *_, text in row] for row in rows_of(mask)] == [["layer 0", "", CROSS], ["layer 1", CROSS, ""]]
    assert [cell[1] for cell in rows_of(mask)[0]] == ["layer.0.attention", "0, kept", "1, removed"]
    assert rows_of(mask)[0][1][0] > rows_of(mask)[0][2][0] == 0


def test_scores_are_darker_the_higher_they_are_in_their_site():
    scores = Scores({"a.0": [0.5, 2.5, float("-inf")], "a.1": [7.0, 7.0]}, scorer="matching", num_texts=1200)
    assert repr(scores) == "Scores(5 heads at 2 sites by matching, 1,200 texts)"
    first, second = rows_of(scores)
    assert [cell[0] for cell in first[1:]] == [0.1, 0.8, 0.0]
    assert [cell[1] for cell in first[1:]] == ["0: score 0.5", "1: score 2.5", "2: removed before"]
    assert [cell[2] for cell in first[1:]] == ["", "", "·"]
    assert [cell[0] for cell in second[1:]] == [0.8, 0.8]


def test_many_units_are_counted():
    mask = Mask({"mlp": [True] * 700 + [False] * 500})
    assert [text for *_, text in rows_of(mask)[0]] == ["mlp", "700 of 1,200 kept"]
    assert rows_of(Scores({"mlp": torch.arange(1200.0)}, kinds={"mlp": "neurons"}))[0][1][2] == "1,200"


def test_names_from_outside_are_escaped():
    mask = Mask({'<script>"': [True]})
    assert "<script>" not in mask._repr_html_()
    assert rows_of(mask)[0][0][1:] == ['<script>"'] * 2
    assert "<b>" not in grid_html("<b>", mask, None)


@pytest.mark.parametrize("units", [["heads"], ["heads", "neurons", "layers"]])
def test_a_report_shows_scores_and_what_went(units):
    cut = secateur.Cut(0.4, units=units, allocation="ranking")
    _, report = secateur.prune(small_model("wide bert"), scorer="random", cut=cut)
    assert "\n" not in repr(report)
    assert repr(report) == f"PruningReport('BertModel': {report})"
    kept = report.to_json()["kept_heads"]
    shown = {row[0][1]: [unit for unit, cell in enumerate(row[1:]) if cell[2] != CROSS] for row in rows_of(report)}
    assert {site: shown[site] for site in kept} == kept
    assert shown.keys() == report.mask.keys()
    assert all("score" in cell[1] for row in rows_of(report) for cell in row[1:] if row[0][1] in kept)
