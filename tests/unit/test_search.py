"""The loss of a mask, exchanges, the search for a better mask, and refining."""

import pytest
import torch

import secateur
from secateur.choosing.mask_loss import MaskLoss
from secateur.choosing.refinement import refine_mask
from secateur.choosing.search import exchanges, search
from secateur.errors import InvalidInputError
from secateur.models.inputs import forward_arguments
from secateur.relations import gated_representations, relational_kl
from secateur.removal.remove import gated, remove_
from secateur.scorers.score import score
from secateur.settings import Cut
from secateur.sites.attention import find_sites
from secateur.units.masks import Mask
from tests.support.joint import batches_of
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer, uneven_mask


def test_the_loss_of_a_mask_is_the_objective():
    model = tiny_model("bert")
    inputs = batches_of(model)
    mask = uneven_mask(find_sites(model))
    gates = {site: row.float() for site, row in mask.items()}
    with torch.no_grad():
        expected = [
            float(
                relational_kl(gated_representations(model, b, {}, False), gated_representations(model, b, gates, False))
            )
            for b in inputs
        ]
    assert MaskLoss(model, inputs, False)(mask) == pytest.approx(sum(expected) / 2)
    with pytest.raises(InvalidInputError, match=r"`texts` must be at least 3 a batch.*got 2; give more texts"):
        MaskLoss(model, batches_of(model, 4, 2), False)


def after(start, moves):
    """What is kept after each of the exchanges, as text."""
    flat = torch.cat(list(start.values()))
    found = []
    for move in moves:
        changed = flat.clone()
        changed[list(move)] = ~changed[list(move)]
        rows = changed.split([len(row) for row in start.values()])
        found.append(Mask(dict(zip(start, rows, strict=True))))
    return found


def test_an_exchange_keeps_the_number_of_heads_and_of_groups():
    start = Mask({"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, False] * 2 + [False] * 2)})
    found = after(start, exchanges(start, {"a": 4, "b": 3}))
    # a: 2 x 2 swaps. b: a swap inside each of two groups, and the empty group's pattern with either of theirs.
    assert len(found) == len({str(mask.kept) for mask in found}) == 4 + 2 + 2
    for mask in found:
        assert mask != start
        assert {k: int(v.sum()) for k, v in mask.items()} == {"a": 2, "b": 2}
        assert sorted(mask["b"].view(3, 2).sum(dim=1).tolist()) == [0, 1, 1]
    assert exchanges(Mask({"a": torch.ones(3, dtype=torch.bool)}), {"a": 3}) == []


def test_a_global_exchange_keeps_the_number_of_heads_in_the_model_and_empties_no_site():
    start = Mask({"a": torch.tensor([True, True, False]), "b": torch.tensor([False, True, False])})
    groups = {"a": 3, "b": 3}
    seen = {str(mask.kept) for mask in after(start, exchanges(start, groups, "ranking"))}
    # Any of 3 kept heads against any of 3 dropped ones, but the last head of b stays unless b gets another.
    assert len(seen) == 3 * 3 - 1
    assert str({"a": [0, 1, 2], "b": []}) not in seen
    free = {str(mask.kept) for mask in after(start, exchanges(start, groups, "ranking", floor=0))}
    assert free - seen == {str({"a": [0, 1, 2], "b": []})}
    # Groups move whole, and only to a site whose groups are as wide.
    start = Mask({"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, False, False])})
    seen = {str(mask.kept) for mask in after(start, exchanges(start, {"a": 2, "b": 3}, "ranking"))}
    assert seen == {str({"a": [2, 3], "b": [0]}), str({"a": [0, 1], "b": [1]}), str({"a": [0, 1], "b": [2]})}


def test_an_exchange_never_drops_a_head_that_stays():
    start = Mask({"a": torch.tensor([True, True, False, False]), "b": torch.tensor([False, True, False, False])})
    staying = {"a": torch.tensor([True, False, True, False]), "b": torch.tensor([False, True, False, False])}
    found = after(start, exchanges(start, {"a": 4, "b": 4}, "ranking", 1, staying))
    # Head 1 of a is the only one that may go, to any of five free places; head 2 of a was not kept.
    assert {str(mask.kept) for mask in found} == {
        *(str({"a": [0, h], "b": [1]}) for h in (2, 3)), *(str({"a": [0], "b": sorted([1, h])}) for h in (0, 2, 3))
    }  # fmt: skip
    # Groups that hold one move neither whole nor by a swap inside.
    in_twos = {"a": 2, "b": 2}
    assert exchanges(start, in_twos, "uniform", 1, staying) == []
    assert len(exchanges(start, in_twos, "uniform", 1)) == 3


class Known:
    """A loss of five heads that is a sum over those that are dropped, and slopes that may mislead."""

    def __init__(self, worth, slopes):
        self.worth, self.told, self.asked = torch.tensor(worth), torch.tensor(slopes), 0

    def __call__(self, mask):
        return float(self.worth[~mask["a"]].sum())

    def slopes(self, mask):
        self.asked += 1
        return self.told


def kept_by(trials):
    return [mask.kept["a"] for mask, _ in trials]


def test_the_search_tries_what_the_slopes_promise_most():
    start = Mask({"a": torch.tensor([True, True, False, False, False])})
    loss = Known([1.0, 2.0, 3.0, 4.0, 5.0], [-1.0, -2.0, -3.0, -4.0, -5.0])
    trials = search(loss, start, {"a": 5}, 4, torch.Generator())
    # The best of six exchanges first, then the best of what is left, after which nothing is better.
    assert kept_by(trials)[:3] == [[0, 1], [1, 4], [3, 4]]
    assert [value for _, value in trials][:3] == [12.0, 8.0, 6.0]
    assert loss.asked == 3  # for the start and after each exchange that helped
    every = search(loss, start, {"a": 5}, 100, torch.Generator())
    assert len(every) == 3 + 6  # ends when all exchanges of the best were tried
    assert min(every, key=lambda trial: trial[1])[1] == 6.0


def test_the_search_learns_from_exchanges_that_do_not_keep_their_promise():
    start = Mask({"a": torch.tensor([True, True, False, False, False])})
    # Head 0 seems worth nothing, and is worth most.
    misled = Known([9.0, 2.0, 3.0, 1.0, 1.0], [0.0, -2.0, -3.0, -1.0, -1.0])
    trials = kept_by(search(misled, start, {"a": 5}, 2, torch.Generator()))
    # It promised -3 and cost 6: heads 0 and 2 are thought to cost 4.5 more. Head 1 against 3 or 4 promises least loss.
    assert trials[1] == [1, 2]
    assert trials[2] in ([0, 3], [0, 4])


def test_without_slopes_the_search_draws_its_exchanges():
    start = Mask({"a": torch.tensor([True, True, False, False, False])})
    level = Known([0.0] * 5, [0.0] * 5)
    orders = [
        str(kept_by(search(level, start, {"a": 5}, 6, torch.Generator().manual_seed(n)))) for n in (0, 0, *range(9))
    ]
    assert orders[0] == orders[1]
    assert len(set(orders)) > 5


def test_search_goes_on_from_the_best():
    model = tiny_model("bert")
    start = Mask({name: torch.tensor([True, True, False, False]) for name in find_sites(model)})
    loss = MaskLoss(model, batches_of(model), False)
    trials = search(loss, start, dict.fromkeys(start, 4), 25, torch.Generator().manual_seed(0))
    assert len(trials) > 5
    assert trials[0][0] == start
    best = start, trials[0][1]
    for mask, value in trials[1:]:
        apart = sum(int((mask[s] != best[0][s]).sum()) for s in start)
        assert apart == 2
        assert value == pytest.approx(loss(mask))
        best = min(best, (mask, value), key=lambda t: t[1])
    assert best[1] < trials[0][1]


def test_slopes_are_the_derivatives_of_the_loss_on_the_gates():
    model = tiny_model("bert").double()
    inputs = batches_of(model)
    mask = uneven_mask(find_sites(model))
    loss = MaskLoss(model, inputs, False)
    loss(mask)
    found = loss.slopes(mask)
    assert found.shape == (sum(len(row) for row in mask.values()),)
    gates = torch.cat([row.double() for row in mask.values()])

    def at(values):
        rows = values.split([len(row) for row in mask.values()])
        return float(loss(dict(zip(mask, rows, strict=True))))

    for head in range(len(gates)):
        step = torch.zeros_like(gates)
        step[head] = 1e-2
        expected = (at(gates + step) - at(gates - step)) / 2e-2
        assert float(found[head]) == pytest.approx(expected, rel=2e-2, abs=1e-6)
    assert float(found.abs().max()) > 1e-4
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_gradients_has_no_slopes(monkeypatch):
    model = tiny_model("bert")
    mask = uneven_mask(find_sites(model))
    loss = MaskLoss(model, batches_of(model), False)
    loss(mask)
    plain = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: torch.no_grad()(plain)(*args, **kwargs))
    assert not loss.slopes(mask).any()

    def full(*args, **kwargs):
        raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss.slopes(mask)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_refining_lowers_the_loss_and_leaves_the_model_alone(kind):
    model, tokenizer, texts = tiny_model(kind), tiny_tokenizer(), tiny_texts(12)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    scores = score(model, texts, "random", tokenizer)
    start = secateur.select(scores, 0.5)
    mask, losses = refine_mask(model, start, texts, tokenizer, steps=30)
    assert 3 < len(losses) <= 31
    assert min(losses) < losses[0]
    assert {s: int(v.sum()) for s, v in mask.items()} == {s: int(v.sum()) for s, v in start.items()}
    loss = MaskLoss(model, forward_arguments(model, [dict(tokenizer(texts, padding=True, return_tensors="pt"))]), False)
    assert loss(mask) == pytest.approx(min(losses), rel=1e-4)
    if len(losses) < 31:  # it ends early only where no exchange is better
        groups = {name: site.num_groups for name, site in find_sites(model).items()}
        assert all(loss(other) > min(losses) for other in after(mask, exchanges(mask, groups)))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert refine_mask(model, start, texts, tokenizer, steps=0)[0] == start
    with gated(model, mask):
        pass  # the mask obeys the model's groups


def test_refining_a_pruned_model_never_brings_a_head_back():
    model, tokenizer, texts = tiny_model("bert"), tiny_tokenizer(), tiny_texts(12)
    gone = Mask({name: torch.tensor([False, True, True, True]) for name in find_sites(model)})
    remove_(model, gone)
    start = Mask({name: torch.tensor([False, True, False, True]) for name in gone})
    mask, _ = refine_mask(model, start, texts, tokenizer, steps=20)
    assert all(not bool(row[0]) and int(row.sum()) == 2 for row in mask.values())
    with pytest.raises(InvalidInputError, match="already removed"):
        refine_mask(model, Mask({name: ~row for name, row in gone.items()}), texts, tokenizer, steps=1)


def test_prune_refines_and_reports_it():
    model, tokenizer, texts = tiny_model("bert"), tiny_tokenizer(), tiny_texts(12)
    pruned, report = secateur.prune(model, texts, 0.5, scorer="random", tokenizer=tokenizer, cut=Cut(refine=10))
    assert len(report.refinement) == 11
    assert report.to_json()["refinement"][0] >= min(report.refinement)
    assert pruned.config.head_pruning["kept_heads"] == report.mask.kept
    with pytest.raises(InvalidInputError, match="`refine` needs `texts`"):
        secateur.prune(model, scorer="magnitude", cut=Cut(refine=5))
    with pytest.raises(InvalidInputError, match="`steps` must be a whole number"):
        refine_mask(model, report.mask, texts, tokenizer, steps=-1)
