"""Matching: contributions count more where a head finds the words of one text in the other."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, Data2VecVisionConfig

import secateur
from secateur.choosing.refinement import refine_mask
from secateur.demo import demo_model
from secateur.errors import InvalidInputError, UnsupportedModelError
from secateur.models.inputs import example_inputs, forward_arguments
from secateur.models.loading import load_model, load_tokenizer
from secateur.pruners import evidence
from secateur.pruners.evidence import gather_evidence
from secateur.pruners.joint_network import JointPruner, matching_scores
from secateur.pruners.tokens import special_ids_of
from secateur.pruners.word_matches import MATCH_WEIGHT, matching
from secateur.scorers.base import ScoringTask
from secateur.scorers.matching import MatchingScorer, heads_that_match
from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.texts.calibration import PreparedModel
from secateur.texts.sources import ReadyInputs
from secateur.texts.tokenization import batches
from secateur.units.masks import Mask
from secateur.units.select import select
from tests.support.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

# [CLS] a b [SEP] b c [SEP], then padding: only b, at places 2 and 4, is in both texts.
IDS = torch.tensor([[2, 10, 11, 3, 11, 12, 3, 0]])
PAIR = {
    "input_ids": IDS,
    "token_type_ids": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 0]]),
    "attention_mask": (IDS > 0).long(),
}
SPECIAL = frozenset({0, 2, 3})
PAIRS = [("good bad film", "the film is good"), ("plot", "bad plot"), ("film film", "good"), ("bad", "bad good bad")]


def test_a_decoder_beside_an_encoder_matches_nothing():
    """BART's reads the words one place later than the batch has them, so that a copy of a word is not one there."""
    model, tokenizer = tiny_model("bart"), tiny_tokenizer()
    plain, found = (score(model, PAIRS, name, tokenizer) for name in ("contribution", "matching"))
    for site in plain:
        assert torch.allclose(plain[site], found[site], atol=1e-6) == site.startswith("decoder."), site
    inputs = forward_arguments(model, batches(tokenizer, PAIRS))
    evidence = gather_evidence(model, find_sites(model), inputs, True, special_ids=special_ids_of(tokenizer))
    by_site = evidence.split(evidence.matching)
    assert all(bool((row > 0).any()) != site.startswith("decoder.") for site, row in by_site.items())


def maps(**looks):
    """Return maps of one text and one head: each query looks at itself but for those in `looks`."""
    found = torch.eye(8)
    for query, row in looks.items():
        found[int(query[1:])] = torch.tensor(row)
    return found[None, None]


def test_matching_by_hand():
    toward = {"q2": [0, 0, 0, 0, 1.0, 0, 0, 0], "q4": [0, 0.2, 0.6, 0, 0.2, 0, 0, 0]}
    # Attending to all seven real tokens alike would give a seventh to the one copy.
    expected = ((1 - 1 / 7) + (0.6 - 1 / 7)) / 2
    assert float(matching(maps(**toward), PAIR, SPECIAL)) == pytest.approx(expected)
    # Looking at oneself, at [SEP], or at other words is no matching, nor is looking less than by chance.
    assert float(matching(maps(), PAIR, SPECIAL)) == 0
    assert float(matching(torch.full((1, 1, 8, 8), 1 / 8), PAIR, SPECIAL)) == 0
    ends = {"q3": [0, 0, 0, 0, 0, 0, 1.0, 0], "q6": [0, 0, 0, 1.0, 0, 0, 0, 0]}
    assert float(matching(maps(**ends), PAIR, SPECIAL)) == 0
    assert float(matching(maps(**ends), PAIR, frozenset({0}))) > 0


def test_a_copy_within_a_text_counts_where_the_inputs_do_not_tell_texts_apart():
    ids = torch.tensor([[2, 10, 10, 3, 12, 3, 0, 0]])
    within = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    looks = maps(q1=[0, 0, 1.0, 0, 0, 0, 0, 0])
    assert float(matching(looks, within, SPECIAL)) == pytest.approx((1 - 1 / 6 - 1 / 6) / 2)
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0]])
    assert float(matching(looks, {**within, "token_type_ids": types}, SPECIAL)) == 0
    assert float(matching(looks, {**within, "token_type_ids": 0 * types}, SPECIAL)) > 0


@pytest.mark.parametrize(
    ("weights", "batch"),
    [
        (torch.ones(1, 2, 8, 5), PAIR),  # keys of another sequence
        (torch.ones(1, 2, 5, 5), PAIR),
        (torch.ones(1, 2, 5, 5), {"pixel_values": torch.ones(1, 3, 4, 4)}),
    ],
)
def test_maps_of_other_things_match_nothing(weights, batch):
    assert matching(weights, batch, SPECIAL).tolist() == [[0.0, 0.0]]


def test_padding_does_not_change_matching():
    wider = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in PAIR.items()}
    looks = maps(q2=[0, 0, 0, 0, 1.0, 0, 0, 0])
    padded = torch.nn.functional.pad(looks, (0, 3, 0, 3))
    assert float(matching(padded, wider, SPECIAL)) == pytest.approx(float(matching(looks, PAIR, SPECIAL)))


def test_pairs_score_as_contribution_times_matching_and_single_texts_as_contribution():
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()
    seen = {}

    class Watching(MatchingScorer):
        def read(self, reading, batch, task):
            found = super().read(reading, batch, task)
            alone = super(MatchingScorer, self).read(reading, batch, task)
            seen[reading.site] = (found / alone, matching(reading.weights, batch, task.special_ids))
            return found

    scores = score(model, PAIRS, Watching(), tokenizer)
    for ratio, matched in seen.values():
        assert bool((matched > 0).any())
        torch.testing.assert_close(ratio, 1 + MATCH_WEIGHT * matched)
    plain = score(model, PAIRS, "contribution", tokenizer)
    assert all(bool((scores[site] >= plain[site]).all()) for site in plain)
    assert any(bool((scores[site] > plain[site]).any()) for site in plain)

    singles = [first for first, _ in PAIRS]
    one, other = (score(model, singles, name, tokenizer) for name in ("matching", "contribution"))
    assert all(torch.equal(one[site], other[site]) for site in one)
    same = score(model, PAIRS, "matching", tokenizer, weight=0)
    assert all(torch.allclose(same[site], plain[site]) for site in plain)
    for wrong in (-1.0, math.nan, "much", True):
        with pytest.raises(InvalidInputError, match="`weight` must be a number from 0"):
            MatchingScorer(wrong)
    assert MatchingScorer().reads_maps(SimpleNamespace(is_pair=True))
    assert not MatchingScorer().reads_maps(SimpleNamespace(is_pair=False))


def pairs_task(model, tokenizer, is_pair=True):
    texts = PAIRS if is_pair else [first for first, _ in PAIRS]
    inputs = list(forward_arguments(model, batches(tokenizer, texts, 3)))
    source = ReadyInputs(PreparedModel(model), inputs, is_pair)
    return ScoringTask(model, find_sites(model), source, special_ids=special_ids_of(tokenizer))


def test_heads_that_match_are_those_from_a_tenth_on(monkeypatch):
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()
    task = pairs_task(model, tokenizer)
    evidence = gather_evidence(model, task.sites, task.batches, True, special_ids=task.special_ids)
    # Random heads match little: the bound is put between them.
    bound = float(evidence.matching.sort().values[6:8].mean())
    monkeypatch.setattr(secateur.scorers.matching, "MATCHES", bound)
    found = torch.cat(list(heads_that_match(task).values()))
    assert found.tolist() == (evidence.matching >= bound).tolist()
    assert int(found.sum()) == 12 - 7
    alone = heads_that_match(pairs_task(model, tokenizer, is_pair=False))
    assert {site: row.tolist() for site, row in alone.items()} == {site: [False] * 4 for site in task.sites}
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    seeing = AutoModel.from_config(Data2VecVisionConfig(**size)).eval()
    without_maps = ScoringTask(
        seeing, find_sites(seeing), ReadyInputs(PreparedModel(seeing), [example_inputs(seeing)], is_pair=True)
    )
    with pytest.raises(UnsupportedModelError, match="does not compute attention maps"):
        MatchingScorer().score(without_maps)
    assert not bool(torch.cat(list(heads_that_match(without_maps).values())).any())


def test_refining_keeps_the_heads_that_match(monkeypatch):
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()
    start = Mask({name: torch.tensor([True, False, True, False]) for name in find_sites(model)})
    matching_heads = {name: torch.tensor([True, False, False, False]) for name in start}
    asked = []

    def those(task):
        asked.append(task.is_pair)
        return matching_heads

    monkeypatch.setattr(secateur.choosing.refinement, "heads_that_match", those)
    for seed in range(4):
        mask, losses = refine_mask(model, start, PAIRS, tokenizer, steps=20, reading=Reading(seed=seed))
        assert len(losses) == 21
        assert all(bool(row[0]) for row in mask.values())
    assert asked == [True] * 4
    assert refine_mask(model, start, PAIRS, tokenizer, steps=0)[0] == start
    assert asked == [True] * 4  # no pass where nothing is tried


@pytest.mark.real
def test_minilm_matches_words_with_two_heads_which_stay_at_every_ratio():
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    pairs = [
        ("A man is playing a guitar on the street.", "On the street, someone plays the guitar."),
        ("The company sold its shares last week.", "Last week shares of the company were sold."),
        ("How do I learn to cook rice?", "What is the best way to cook rice?"),
        ("Two dogs run through the snow.", "The dogs are running in deep snow."),
        ("The vote was delayed until Monday.", "Lawmakers delayed the vote."),
        ("A woman slices an onion.", "An onion is being cut by a woman."),
    ]
    scores = score(model, pairs, "matching", tokenizer)
    first, second = list(scores)[1:3]
    for allocation, ratio in itertools.product(("uniform", "ranking"), (0.25, 0.5, 0.75)):
        mask = select(scores, ratio, allocation)
        assert bool(mask[first][1])
        assert bool(mask[second][9])


def test_the_joint_pruner_adds_matching_to_its_scores_for_pairs():
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()
    inputs = list(forward_arguments(model, batches(tokenizer, PAIRS, 4)))
    special = frozenset({tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id})
    pairs = gather_evidence(model, find_sites(model), inputs, True, special_ids=special)
    assert bool((pairs.matching > 0).any())
    with torch.no_grad():
        less, more = (JointPruner(members=1, matching=weight).eval() for weight in (0.0, 2.0))
        more.load_state_dict(less.state_dict())
        torch.testing.assert_close(more(pairs) - less(pairs), 2 * (1 + 8 * pairs.matching).log())
    singles = gather_evidence(model, find_sites(model), inputs, False, special_ids=special)
    assert matching_scores(singles).tolist() == [0.0] * 12


def test_the_scorer_may_weigh_matching_otherwise_than_its_pruner(monkeypatch):
    model, tokenizer, pruner = tiny_model("bert"), tiny_tokenizer(), JointPruner(members=1)
    asked, real = [], evidence.probe
    monkeypatch.setattr(evidence, "probe", lambda *a, weights: asked.append(weights) or real(*a, weights=weights))

    def scores(**options):
        found = score(model, PAIRS, "smp-plus", tokenizer, pruner=pruner, **options)
        return torch.cat(list(found.values()))

    own, none, more = scores(), scores(matching=0), scores(matching=6.0)
    assert asked[0] is True
    assert asked[len(asked) // 3] is False  # without matching no maps are made
    torch.testing.assert_close(more - none, 3 * (own - none), rtol=1e-4, atol=1e-5)
    assert float((own - none).max()) > 0
    assert pruner.matching == 2
    for wrong in (-1, "much", float("nan")):
        with pytest.raises(InvalidInputError, match="`matching` must be a number from 0"):
            scores(matching=wrong)
