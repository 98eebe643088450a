import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import InvalidInputError
from secateur.units.masks import Mask
from secateur.units.scores import Scores


def test_scores_round_trip_with_a_removed_head(tmp_path):
    scores = Scores({"a": torch.tensor([1.5, -math.inf, 0.25])}, {"a": 3}, "magnitude")
    scores.save(tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["scores"] == {"a": [1.5, None, 0.25]}
    again = Scores.load(tmp_path / "scores.json")
    assert again["a"].tolist() == [1.5, -math.inf, 0.25]
    assert again.scorer == "magnitude"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_must_be_finite(bad):
    with pytest.raises(InvalidInputError, match=r"`scores\['layer'\]` must be finite"):
        Scores({"layer": torch.tensor([1.0, bad])})


def test_key_value_heads_must_divide():
    with pytest.raises(InvalidInputError, match="divide the site's 3 units"):
        Scores({"a": torch.ones(3)}, {"a": 2})


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 2, dtype=torch.bool), torch.ones(0, dtype=torch.bool)])
def test_mask_must_be_boolean_vectors(bad):
    with pytest.raises(InvalidInputError, match="vector of booleans"):
        Mask({"a": bad})


@pytest.mark.parametrize("empty", [Mask, Scores])
def test_empty_is_refused(empty):
    with pytest.raises(InvalidInputError, match="at least one site"):
        empty({})


def test_mask_counts_by_hand():
    mask = Mask({"a": torch.tensor([True, False]), "b": torch.tensor([True, True])})
    assert (mask.num_units, mask.num_kept, mask.pruning_ratio) == (4, 3, 0.25)
    assert str(mask) == "kept 3 of 4 units (pruning ratio 0.25)"
    assert mask.kept == {"a": [0], "b": [0, 1]}


def test_scores_are_equal_where_all_that_is_known_is():
    one, other = (Scores({"a": [1.0, -math.inf], "b": [0.5]}, scorer="x") for _ in range(2))
    assert one == other
    assert one != Scores({"a": [1.0, -math.inf], "b": [0.25]}, scorer="x")
    assert one != Scores({"a": [1.0, -math.inf], "b": [0.5]}, scorer="y")
    assert one != {"a": [1.0]}


def test_equal_masks_hash_alike():
    a, b = torch.tensor([True, False]), torch.tensor([True, True])
    one, other = Mask({"a": a, "b": b}), Mask({"b": b, "a": a})
    assert one == other
    assert len({one, other}) == 1


@pytest.mark.parametrize("make", [torch.Tensor.numpy, lambda tensor: tensor], ids=["numpy", "torch"])
def test_what_is_written_later_into_the_callers_values_changes_nothing(make):
    row, matrix, kept = torch.ones(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64), torch.ones(2) > 0
    scores = Scores({"a": make(row)}, interactions={"a": make(matrix)})
    mask = Mask({"a": make(kept)})
    row[0], matrix[0, 0], kept[0] = math.nan, math.nan, False
    assert scores["a"].tolist() == [1, 1]
    assert scores.interactions["a"].tolist() == [[1, 0], [0, 1]]
    assert mask.kept == {"a": [0, 1]}


@given(st.dictionaries(st.text(min_size=1), st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=4))
def test_mask_round_trip(rows):
    mask = Mask({site: torch.tensor(row) for site, row in rows.items()})
    assert Mask.from_json(json.loads(json.dumps(mask.to_json()))) == mask


@pytest.mark.parametrize(
    "data",
    [
        None, [], {}, {"kind": "mask"}, {"kind": "mask", "mask": []}, {"kind": "mask", "mask": {"a": 1}},
        {"kind": "mask", "mask": {"a": [1]}}, {"kind": "mask", "mask": {"a": []}},
        {"kind": "mask", "mask": {}},
    ],
)  # fmt: skip
def test_damaged_mask_files(data):
    with pytest.raises(InvalidInputError):
        Mask.from_json(data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_scores_json_is_read_or_refused(data):
    with pytest.raises(InvalidInputError):
        Scores.from_json({"kind": "scores", "scores": data} if not isinstance(data, dict) else data)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(InvalidInputError, match="name a JSON file that exists"):
        Mask.load(tmp_path / "no.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InvalidInputError, match="is no JSON"):
        Mask.load(tmp_path / "broken.json")
