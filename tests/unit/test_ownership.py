"""Owners read from binary codes: by hand, and against asking unit by unit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import UnsupportedModelError
from secateur.sites.binary_codes import owners_along, sets_of_units
from secateur.sites.layout import NOBODY
from secateur.sites.ownership import Ownership, Part, only

EVERYONE = set(range(12))


@pytest.mark.parametrize(
    ("num_units", "sets"),
    [
        (1, [{0}, set()]),
        (2, [{0}, {1}]),
        (3, [{0, 2}, {1}, {0, 1}, {2}]),
        (5, [{0, 2, 4}, {1, 3}, {0, 1, 4}, {2, 3}, {0, 1, 2, 3}, {4}]),
    ],
)
def test_sets_of_units_by_hand(num_units, sets):
    assert [set(chosen.nonzero().flatten().tolist()) for chosen in sets_of_units(num_units)] == sets


@pytest.mark.parametrize(("num_units", "passes"), [(2, 2), (3, 4), (4, 4), (5, 6), (12, 8), (32, 10), (3072, 24)])
def test_as_many_sets_as_twice_the_bits(num_units, passes):
    sets = sets_of_units(num_units)
    assert sets.shape == (passes, num_units)
    assert torch.equal(sets[0::2], ~sets[1::2])
    assert bool(sets.any(dim=1).all())


@pytest.mark.parametrize(
    ("num_units", "users", "owners"),
    [
        (1, [{0}, set()], (0, NOBODY)),
        (2, [{1}, {0}, set()], (1, 0, NOBODY)),
        (3, [{0}, {2}, {1}, set(), {2}], (0, 2, 1, NOBODY, 2)),
        (5, [{4}, {3}, {2}, {1}, {0}], (4, 3, 2, 1, 0)),
        (12, [{11}, set(), {0}, {7}, {8}], (11, NOBODY, 0, 7, 8)),
        (12, [{unit} for unit in EVERYONE], tuple(EVERYONE)),
        # Not divided: nobody uses it, or all do wherever anybody does.
        (3, [set(), set()], None),
        (2, [{0, 1}, {0, 1}], None),
        (12, [EVERYONE, set(), EVERYONE], None),
        # An index of one's own beside a shared one, and what some share.
        (3, [{0}, {0, 1, 2}], "mixed"),
        (3, [{0}, {1, 2}, {2}], "mixed"),
        (4, [{0, 1}, {2, 3}], "mixed"),
        (4, [{0, 2}, {1, 3}], "mixed"),
        (12, [{0, 1, 2, 3, 4, 5}, {6, 7, 8, 9, 10, 11}], "mixed"),
        (12, [EVERYONE, {3}], "mixed"),
        (12, [EVERYONE, {4, 6}], "mixed"),
        # Every bit varies between 0 and 3: this cannot be told from all four.
        (4, [{0, 3}, set()], None),
    ],
)
def test_owners_by_hand(num_units, users, owners):
    sets = [set(chosen.nonzero().flatten().tolist()) for chosen in sets_of_units(num_units)]
    reached = torch.tensor([[bool(some & chosen) for some in users] for chosen in sets])
    assert owners_along(reached) == owners


def test_an_index_reached_in_some_bits_alone_cannot_be_told():
    assert owners_along(torch.tensor([[True, True], [False, False], [True, False], [False, False]])) == "mixed"


def test_only_the_chosen_units_are_left():
    tensor = torch.arange(6.0).view(2, 3)
    assert only(torch.tensor([True, False, True]), tensor, axis=1).tolist() == [[0, 0, 2], [3, 0, 5]]
    assert only(torch.tensor([False, True]), tensor, axis=0).tolist() == [[0, 0, 0], [3, 4, 5]]


class Block(nn.Module):
    """A linear layer, each row of which serves the units in its entry of `users`."""

    def __init__(self, users, num_units, columns=3):
        super().__init__()
        torch.manual_seed(len(users))
        self.linear = nn.Linear(columns, len(users))
        self.serves = torch.tensor([[float(unit in some) for some in users] for unit in range(num_units)])

    def part(self, role="query"):
        rows = self.linear(torch.randn(2, self.linear.in_features))
        return Part.along_first_axis(role, rows * self.serves[:, None])  # [units, texts, rows]


def slices_of(block, part):
    ownership = Ownership(block, "neurons")
    ownership.look_up_names()
    return {(piece.parameter, piece.axis): piece.owners for piece in ownership.slices("here", block, part)}


def users_found_unit_by_unit(block, part):
    """The units that reach each index, asked of one unit after the other: parameter and axis → a set an index."""
    users = {("linear.weight", 0): [], ("linear.weight", 1): [], ("linear.bias", 0): []}
    for unit in range(part.num_units):
        alone = part.computed_by(torch.arange(part.num_units) == unit)[0].sum()
        weight, bias = torch.autograd.grad(alone, [block.linear.weight, block.linear.bias], retain_graph=True)
        for key, hits in zip(users, ((weight != 0).any(dim=1), (weight != 0).any(dim=0), bias != 0), strict=True):
            users[key].append(hits)
    return {
        key: [set(column.nonzero().flatten().tolist()) for column in torch.stack(hits).T] for key, hits in users.items()
    }


def owners_of(users, num_units):
    """The rule, said of sets of users; "looks shared" = "mixed", but every bit varies among all that share."""
    if not any(users) or (num_units > 1 and all(len(some) in (0, num_units) for some in users)):
        return None
    if any(len(some) > 1 for some in users):
        bits = range((num_units - 1).bit_length())
        varies = all(len({unit >> bit & 1 for unit in some}) == 2 for some in users if some for bit in bits)
        return "looks shared" if varies else "mixed"
    return tuple(min(some, default=NOBODY) for some in users)


@st.composite
def divided_rows(draw):
    num_units = draw(st.integers(1, 13))
    one = st.integers(0, num_units - 1)
    kinds = [st.just(set()), one.map(lambda unit: {unit}), one.map(lambda unit: {unit})]
    if draw(st.booleans()):
        kinds += [st.just(set(range(num_units))), st.sets(one, min_size=min(2, num_units))]
    return num_units, draw(st.lists(st.one_of(kinds), min_size=1, max_size=20))


@settings(max_examples=150, deadline=None)
@given(divided_rows())
def test_codes_and_asking_unit_by_unit_agree(drawn):
    num_units, users = drawn
    block = Block(users, num_units)
    part = block.part()
    expected = {key: owners_of(some, num_units) for key, some in users_found_unit_by_unit(block, part).items()}
    if num_units == 1:
        del expected["linear.weight", 1]  # the lone unit's are the rows, by the layer's kind
    if "mixed" in expected.values():
        with pytest.raises(UnsupportedModelError, match=r"of linear\.\w+ is used by several neurons but not by all"):
            slices_of(block, part)
    else:
        assert slices_of(block, part) == {k: owners for k, owners in expected.items() if isinstance(owners, tuple)}


def test_a_lone_unit_owns_what_its_layer_writes_or_what_the_output_reads():
    block = Block([{0}, {0}], 1)
    assert slices_of(block, block.part("query")) == {("linear.weight", 0): (0, 0), ("linear.bias", 0): (0, 0)}
    assert slices_of(block, block.part("output")) == {("linear.weight", 1): (0, 0, 0)}


def test_passes_backward_grow_with_the_bits(monkeypatch):
    block = Block([{unit} for unit in range(32)], 32)
    honest, passes = torch.autograd.grad, []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or honest(*a, **k))
    assert slices_of(block, block.part())["linear.weight", 0] == tuple(range(32))
    assert len(passes) == 10


def test_parameters_that_nothing_reaches_or_that_are_left_out_have_no_owners():
    block = Block([{0}, {1}], 2)
    ownership = Ownership(block, "neurons")
    assert ownership.slices("here", block, block.part()) == []  # no names looked up yet
    ownership.look_up_names()
    assert ownership.slices("here", block, Part.along_first_axis("query", torch.ones(2, 4))) == []
    found = ownership.slices("here", block, block.part(), leave_out={"linear.weight"})
    assert [piece.parameter for piece in found] == ["linear.bias"]
