"""Scoring that stops by itself, and what it says about the texts that it did not read."""

import json

import pytest
import torch

import secateur
from secateur import cli
from secateur.errors import InvalidInputError
from secateur.settings import Reading
from secateur.texts.stopping import Settling
from tests.support.tiny import tiny_model, tiny_tokenizer

WORDS = ["good", "bad", "film", "plot", "story", "music", "scene", "actor"]


def best_half(means):
    """Keep the better half of the heads of the one site."""
    (row,) = means.values()
    return row >= row.sort(descending=True).values[len(row) // 2 - 1]


def rows(count, gap, seed=0):
    """Scores of four heads, noise 1; two are better by `gap`."""
    noise = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"site": noise + torch.tensor([gap, 0.0, gap, 0.0])}


def test_clear_differences_settle_and_small_ones_do_not():
    clear, level = Settling(best_half, 10_000), Settling(best_half, 10_000)
    clear.add(rows(64, 3.0))
    level.add(rows(64, 0.0))
    assert clear.settled()
    assert clear.agreement == 1
    assert not level.settled()
    assert level.agreement <= 0.5  # two of four heads may change sides


def test_nothing_settles_before_there_are_enough_texts_and_all_texts_settle_everything():
    early = Settling(best_half, 100)
    early.add(rows(31, 9.0))
    assert not early.settled()
    last = Settling(best_half, 40)
    last.add(rows(40, 0.0))
    assert last.settled()
    assert last.agreement == 1


def test_moments_are_those_of_all_rows_however_they_come():
    whole = rows(50, 1.0)["site"]
    settling = Settling(best_half, 1000)
    for part in whole.split([1, 20, 29]):
        settling.add({"site": part})
    torch.testing.assert_close(settling._mean, whole.mean(dim=0))
    torch.testing.assert_close(settling._scatter / 49, whole.T.cov())


def test_what_it_promises_it_keeps():
    """Over populations of all difficulties: in 1 of 20 stops (here: at most 3 of 40) fewer heads agree than said."""
    broken = stops = 0
    for seed in range(40):
        population = rows(2000, 0.05 + seed / 40, seed)
        settling = Settling(best_half, 2000, seed)
        for part in population["site"].split(32):
            settling.add({"site": part})
            if settling.settled():
                break
        agree = best_half({"site": population["site"].mean(dim=0)}) == best_half({"site": settling._mean})
        stops += settling.seen < 2000
        broken += bool(agree.double().mean() < settling.agreement)
    assert stops >= 20
    assert broken <= 3


@pytest.fixture
def texts():
    random = torch.Generator().manual_seed(0)
    return [" ".join(WORDS[i] for i in torch.randint(8, (3,), generator=random)) for _ in range(400)]


def test_scoring_stops_and_says_where(texts):
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()
    every = secateur.score(model, texts, "contribution", tokenizer)
    assert (every.num_texts, every.agreement) == (400, None)
    found = secateur.score(model, texts, "contribution", tokenizer, reading=Reading(stop="auto"))
    assert 32 <= found.num_texts < 400
    assert found.agreement >= 0.95
    again = type(found).from_json(json.loads(json.dumps(found.to_json())))
    assert (again.num_texts, again.agreement) == (found.num_texts, found.agreement)
    # The same texts again, by their number: what was read is a random choice that the seed makes.
    same = secateur.score(model, texts, "contribution", tokenizer, reading=Reading(stop=found.num_texts))
    assert same.agreement is None
    for site in found:
        torch.testing.assert_close(same[site], found[site], rtol=0, atol=0)
    _, report = secateur.prune(model, texts, tokenizer=tokenizer, reading=Reading(stop="auto"))
    assert (report.num_texts, report.agreement) == (found.num_texts, found.agreement)


def test_labels_follow_their_texts(texts):
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()
    labels = [int("good" in text) for text in texts]
    chosen = [(t, n) for t, n in zip(texts, labels, strict=True)]
    order = torch.randperm(400, generator=torch.Generator().manual_seed(3)).tolist()[:20]
    options = {"scorer": "taylor", "tokenizer": tokenizer}
    found = secateur.score(model, texts, labels=labels, reading=Reading(stop=20, seed=3), **options)
    wanted = secateur.score(
        model, [chosen[i][0] for i in order], labels=[chosen[i][1] for i in order], reading=Reading(seed=3), **options
    )
    for site in wanted:
        torch.testing.assert_close(found[site], wanted[site], rtol=0, atol=0)


@pytest.mark.parametrize("stop", ["all", 10])
def test_labels_of_fewer_texts_are_refused(stop, texts):
    with pytest.raises(InvalidInputError, match="`labels` must hold one label for each of the 400 texts, got 10"):
        secateur.score(
            tiny_model("bert"), texts, "taylor", tiny_tokenizer(), labels=[0, 1] * 5, reading=Reading(stop=stop)
        )


@pytest.mark.parametrize("stop", [0, -1, True, 1.5, "soon", None])
def test_other_stops_are_refused(stop, texts):
    with pytest.raises(InvalidInputError, match="`stop` must be 'all', 'auto' or a whole number from 1"):
        secateur.score(tiny_model("bert"), texts, tokenizer=tiny_tokenizer(), reading=Reading(stop=stop))


def test_what_cannot_stop_by_itself(texts, capsys):
    model = tiny_model("bert")
    with pytest.raises(InvalidInputError, match="with scorer leave_one_out"):
        secateur.score(model, texts, "leave_one_out", tiny_tokenizer(), reading=Reading(stop="auto"))
    with pytest.raises(InvalidInputError, match="no `texts` to choose from"):
        secateur.score(model, scorer="magnitude", reading=Reading(stop=5))
    assert cli.main(["prune", "model", "--data", "x.csv", "--out", "y", "--stop", "0"]) == 2
    assert "`stop` must be all, auto or a whole number from 1, got 0" in capsys.readouterr().err
