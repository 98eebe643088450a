"""The grid of units as a figure for papers."""

import sys

import pytest
import torch

from secateur import InvalidInputError, Mask, Scores

HEADS = [f"encoder.layer.{n}.attention.self" for n in range(2)]
MASK = Mask({HEADS[0]: [True, False, True], HEADS[1]: [False, True, True]})
SCORES = Scores({HEADS[0]: [0.5, 2.5, float("-inf")], HEADS[1]: [7.0, 1.0, 3.0]}, scorer="matching")


@pytest.fixture
def pyplot():
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib import pyplot

    return pyplot


def cells(axes):
    """The values that an axes shows, by rows; None where it is blank."""
    (image,) = axes.images
    return image.get_array().tolist()


def crosses(axes):
    return {(int(line.get_ydata()[0]), int(line.get_xdata()[0])) for line in axes.lines}


def labels(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_a_mask_is_drawn_heads_by_site(pyplot, tmp_path):
    figure = MASK.plot()
    (axes,) = figure.axes  # no scale, as there are no scores
    assert labels(axes) == ["layer 0", "layer 1"]
    assert cells(axes) == [[1, 0, 1], [0, 1, 1]]
    assert crosses(axes) == {(0, 1), (1, 0)}
    assert not pyplot.get_fignums()  # a notebook would show it twice, and a loop would fill the memory
    figure.savefig(tmp_path / "mask.pdf")
    assert (tmp_path / "mask.pdf").read_bytes().startswith(b"%PDF")


def test_scores_are_drawn_with_their_scale(pyplot):
    axes, scale = SCORES.plot().axes
    assert cells(axes) == [[0.5, 2.5, None], [7, 1, 3]]
    assert not crosses(axes)
    assert axes.get_xlabel() == "head"
    assert scale.get_ylabel() == "importance score"


def test_each_kind_of_units_has_a_scale_of_its_own(pyplot):
    sites = {"layer.0.output": torch.arange(90.0), "layer.0.attention": [1.0, 2.0], "layer.1.attention": [3.0, 4.0]}
    axes = Scores(sites, kinds={"layer.0.output": "neurons"}).plot().axes
    assert [one.get_xlabel() for one in axes if one.get_xlabel()] == ["neuron", "head"]
    limits = [one.images[0].get_clim() for one in axes if one.get_xlabel()]
    assert limits == [(0, 89), (1, 4)]


def test_many_units_are_no_wider_than_a_page_and_have_no_crosses(pyplot):
    many = torch.arange(3072) % 2 == 0
    figure = Mask({"layer.0.output": many, "layer.0.attention": [True, False]}).plot()
    assert 5 < figure.get_size_inches()[0] < 10
    neurons, heads = figure.axes
    assert cells(neurons) == [many.float().tolist()]
    assert (crosses(neurons), crosses(heads)) == (set(), {(0, 1)})


@pytest.mark.parametrize("value", [MASK, SCORES], ids=["mask", "scores"])
def test_without_matplotlib_the_error_names_the_extra(value, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidInputError, match=r"pip install 'secateur\[plots\]'"):
        value.plot()
