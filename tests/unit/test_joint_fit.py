"""What a joint pruner learns from: samples, what they cost, and the fit."""

from dataclasses import replace

import pytest
import torch

import secateur
from secateur.choosing.mask_loss import MaskLoss
from secateur.errors import CheckpointError, InvalidInputError
from secateur.meta_training.collecting import TrialConfig, collect
from secateur.meta_training.fitting import FitConfig, fit, imitation_loss, training_loss, trial_loss
from secateur.meta_training.sample import LEAVE_ONE_OUT, Sample
from secateur.pruners.evidence import Evidence
from secateur.pruners.features import FEATURES
from secateur.pruners.joint_network import JointPruner
from secateur.scorers.score import score
from secateur.scorers.smp_plus import SmpPlusScorer
from secateur.sites.attention import find_sites
from secateur.units.masks import Mask
from tests.support.joint import batches_of, column, learned
from tests.support.tiny import tiny_model


def evaluators_of(model, count=3):
    return [MaskLoss(model, batches_of(model, 4, 4, seed=10 + number), False) for number in range(count)]


def sample_of(model, seed=0, texts=8, pruner=None, **settings):
    settings = {
        "ratios": (0.5,),
        "allocations": ("uniform",),
        "own": 1,
        "near": 3,
        "at_random": 4,
        "search": 0,
        **settings,
    }
    config = TrialConfig(**settings)
    return collected(model, batches_of(model, texts, texts // 2, seed), evaluators_of(model), config, seed, pruner)


def collected(model, batches, evaluators, config, seed=0, pruner=None):
    return collect(
        model, find_sites(model), batches, evaluators, False,
        subject="tiny", task="words", config=config, seed=seed, pruner=pruner,
    )  # fmt: skip


def test_a_sample_holds_what_masks_cost_beside_one_mask_on_the_same_texts(tmp_path, monkeypatch):
    model = tiny_model("bert")
    sample = sample_of(model, ratios=(0.25, 0.5), leave_one_out=True)
    assert sample.masks.shape == (2 * 8 + 12, 12)
    counts = {int(g): set(sample.masks[sample.trial_sets == g].sum(dim=1).tolist()) for g in sample.trial_sets.unique()}
    assert counts == {LEAVE_ONE_OUT: {11}, 1: {9}, 2: {6}}
    contribution = score(model, inputs=batches_of(model), scorer="contribution")
    evaluators = evaluators_of(model)
    for first, ratio in ((0, 0.25), (8, 0.5)):
        own = secateur.select(contribution, ratio)
        assert sample.masks[first].tolist() == torch.cat(list(own.values())).tolist()
        assert float(sample.losses[first]) == pytest.approx(1, rel=1e-4)
        for number in range(first + 1, first + 8):
            mask = Mask(sample.evidence.split(sample.masks[number]))
            ratios = [evaluator(mask) / evaluator(own) for evaluator in evaluators]
            assert min(abs(float(sample.losses[number]) / ratio - 1) for ratio in ratios) < 1e-3
    alone = Mask(sample.evidence.split(sample.masks[16]))
    assert float(sample.losses[16]) == pytest.approx(sum(evaluator(alone) for evaluator in evaluators) / 3, rel=1e-4)
    sample.save(tmp_path / "s.safetensors")
    again = Sample.load(tmp_path / "s.safetensors")
    assert torch.equal(again.masks, sample.masks)
    assert torch.equal(again.evidence.features, sample.evidence.features)
    assert again.evidence.heads == sample.evidence.heads
    monkeypatch.setattr("secateur.meta_training.sample.FEATURES", (*FEATURES, "another"))
    message = "holds evidence of another version; remove it, and it is collected again"
    with pytest.raises(CheckpointError, match=message):
        Sample.load(tmp_path / "s.safetensors")
    monkeypatch.undo()
    assert torch.equal(sample_of(model, ratios=(0.25, 0.5), leave_one_out=True).masks, sample.masks)


def test_with_a_pruner_its_choice_is_tried_and_that_of_its_mean_with_the_contribution():
    model = tiny_model("bert")
    pruner = learned()
    sample = sample_of(model, pruner=pruner, allocations=("uniform", "ranking"))
    assert (
        sample.trial_sets.tolist() == [1] * 10 + [2] * 10
    )  # at either allocation three choices, 3 near them, 4 at random
    scores = score(model, scorer=SmpPlusScorer(pruner), inputs=batches_of(model))
    for row, allocation in ((1, "uniform"), (11, "ranking")):
        own = secateur.select(scores, 0.5, allocation)
        assert sample.masks[row].tolist() == torch.cat(list(own.values())).tolist()
        assert float(sample.losses[row + 1]) == pytest.approx(1, rel=1e-4)  # the mean's, which the others stand beside


def test_a_search_finds_the_mask_that_its_guides_like_best_and_the_others_evaluate_what_it_tries(tmp_path):
    model, config = tiny_model("bert"), TrialConfig(ratios=(0.5,), search=6)
    for count in (2, 3):  # two lead; where there are no more, they evaluate the rest too
        evaluators = evaluators_of(model, count)
        sample = collected(model, batches_of(model), evaluators, config)
        assert sample.by_site.tolist() == [True, False]
        assert [int(row.sum()) for row in sample.found] == [6, 6]
        assert all(int(row.sum()) == 2 for row in sample.evidence.split(sample.found[0]).values())
        for number, found in zip((1, 2), sample.found, strict=True):
            rows = sample.trial_sets == number
            tried, losses = sample.masks[rows], sample.losses[rows]
            assert len(tried) == 7
            for place, mask in enumerate(tried[1:], 1):
                assert 2 in {int((mask != one).sum()) for one in tried[:place]}  # it is one exchange away
            masks = [Mask(sample.evidence.split(row)) for row in tried]
            costs = torch.tensor([[evaluator(mask) for mask in masks] for evaluator in evaluators])
            by_evaluator = (costs / costs[:, :1] / losses - 1).abs() < 1e-3
            assert bool(by_evaluator.any(dim=0).all())
            others = by_evaluator.all(dim=1)
            assert count == 2 or int(others.sum()) == 1
            best = costs[~others if count > 2 else slice(None)].sum(dim=0).argmin()
            assert torch.equal(tried[best], found)
    sample.save(tmp_path / "s.safetensors")
    again = Sample.load(tmp_path / "s.safetensors")
    assert torch.equal(again.found, sample.found)
    assert torch.equal(again.by_site, sample.by_site)


def test_a_search_begins_at_the_choice_of_the_pruner():
    model = tiny_model("bert")
    contribution, pruners, mean, exchanged = sample_of(model, pruner=learned(), search=1).masks
    scores = score(model, scorer=SmpPlusScorer(learned()), inputs=batches_of(model))
    assert torch.equal(pruners, torch.cat(list(secateur.select(scores, 0.5).values())))
    distances = [int((exchanged != mask).sum()) for mask in (contribution, pruners, mean)]
    assert distances[1] == 2
    assert distances[0] != 2


def test_a_fit_learns_from_found_masks_and_the_trials_on_the_way_to_them():
    samples = [
        sample_of(tiny_model("bert", seed), seed, search=8, allocations=("uniform", "ranking")) for seed in range(4)
    ]

    @torch.no_grad()
    def mean(loss, pruner):
        return sum(float(loss(pruner(sample.evidence), sample)) for sample in samples) / len(samples)

    new, both, trials = JointPruner(), JointPruner(), JointPruner()
    fit(both, samples, FitConfig(epochs=60, jitter=0.0))
    fit(trials, samples, FitConfig(epochs=60, jitter=0.0, trial_sets=(1, 2)))  # asked for, the trials alone
    assert mean(imitation_loss, both) < 0.6 * mean(imitation_loss, new)
    assert mean(imitation_loss, both) < mean(imitation_loss, trials)
    assert mean(trial_loss, both) < mean(trial_loss, new)
    scores = both(samples[0].evidence).detach()
    parts = trial_loss(scores, samples[0]), imitation_loss(scores, samples[0])
    assert float(training_loss(scores, samples[0])) == pytest.approx(float(sum(parts)))
    assert training_loss(scores, samples[0], (2,)) == trial_loss(scores, samples[0], (2,))
    assert training_loss(scores, replace(samples[0], found=None)) == parts[0]


def test_the_imitation_loss_by_hand():
    found = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]).bool()
    evidence = Evidence(torch.zeros(6, len(FEATURES)), torch.zeros(6, 6), {"a": 3, "b": 3})
    both = Sample("m", "t", evidence, *[torch.zeros(0)] * 3, found, torch.tensor([True, False]))
    scores = torch.tensor([3.0, 1.0, 2.0, 7.0, 5.0, 6.0])
    # Less the sites' means: kept (1, -2, 1, 2, -1, -1) / 3, scores (1, -1, 0, 1, -1, 0).
    by_site = 1 - (1 + 2 + 2 + 1) / (12 * 4) ** 0.5
    # Less the mean of all: kept (1, 1, 1, -1, -1, -1) / 2, scores (-1, -3, -2, 3, 1, 2).
    whole = 1 + (1 + 3 + 2 + 3 + 1 + 2) / (28 * 6) ** 0.5
    one, other = (replace(both, found=found[[i]], by_site=both.by_site[[i]]) for i in (0, 1))
    assert float(imitation_loss(scores, one)) == pytest.approx(by_site, rel=1e-5)
    assert float(imitation_loss(scores, other)) == pytest.approx(whole, rel=1e-5)
    assert float(imitation_loss(scores, both)) == pytest.approx((by_site + whole) / 2, rel=1e-5)
    moved = scores * 5 + torch.tensor([9.0] * 3 + [-4.0] * 3)
    assert float(imitation_loss(moved, one)) == pytest.approx(by_site, rel=1e-4)
    with pytest.raises(InvalidInputError, match="`sample` must hold masks that a search found"):
        imitation_loss(scores, replace(both, found=None))


def test_trials_at_either_scope_drop_as_many_heads():
    sample = sample_of(tiny_model("bert"), ratios=(0.25, 0.5), allocations=("uniform", "ranking"))
    assert sample.trial_sets.unique().tolist() == [1, 2, 3, 4]
    for number, kept in ((1, 9), (2, 6), (3, 9), (4, 6)):
        assert set(sample.masks[sample.trial_sets == number].sum(dim=1).tolist()) == {kept}
    by_site = sample.masks.view(len(sample.masks), 3, 4).sum(dim=2)
    assert bool((by_site[sample.trial_sets == 2] == 2).all())
    assert not bool((by_site[sample.trial_sets == 4] == 2).all())
    assert bool((by_site[sample.trial_sets == 4] >= 1).all())


def test_the_regression_by_hand():
    evidence = Evidence(torch.zeros(3, len(FEATURES)), torch.eye(3), {"a": 3})
    masks = torch.tensor([[True, True, False], [True, False, True], [False, True, True]])
    importance = torch.tensor([0.3, 1.0, 2.0])
    sample = Sample("m", "t", evidence, masks, ((~masks).float() @ importance).exp(), torch.ones(3, dtype=torch.long))
    assert float(trial_loss(importance, sample)) == pytest.approx(0, abs=1e-6)
    assert float(trial_loss(importance + 5, sample)) == pytest.approx(0, abs=1e-5)  # only differences count
    assert float(trial_loss(torch.zeros(3), sample)) == pytest.approx(1, abs=1e-6)
    assert float(trial_loss(-importance, sample)) == pytest.approx(2, abs=1e-5)
    # Dropping head 2 costs 2, head 1 costs 1, head 0 costs .3; scores 1, 0, 0 say the opposite, but not all of it.
    centred = torch.tensor([2.0, 1.0, 0.3]) - 1.1
    told = torch.tensor([0.0, 0.0, 1.0]) - 1 / 3
    expected = 1 - float(centred @ told / centred.norm() / told.norm())
    assert float(trial_loss(torch.tensor([1.0, 0.0, 0.0]), sample)) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InvalidInputError, match="`trial_sets` must name sets"):
        trial_loss(importance, sample, [7])


def made_up(seed):
    """A sample whose rule is known: a head matters by its relevance, and by half of its uniqueness."""
    random = torch.Generator().manual_seed(seed)
    evidence = Evidence(torch.randn(12, len(FEATURES), generator=random), torch.eye(12), {"a": 6, "b": 6})
    importance = column(evidence, "relevance") + 0.5 * column(evidence, "unexplained")
    masks = torch.stack([torch.randperm(12, generator=random) < 6 for _ in range(40)])
    return Sample("m", "t", evidence, masks, ((~masks).float() @ importance).exp(), torch.ones(40, dtype=torch.long))


def test_a_fit_finds_the_rule_and_explains_samples_that_it_did_not_see():
    torch.manual_seed(0)
    pruner = JointPruner(width=16, layers=1, members=2, prior=0.0)
    history = fit(pruner, [made_up(seed) for seed in range(24)], FitConfig(epochs=40, learning_rate=1e-2))
    with torch.no_grad():
        unseen = [float(trial_loss(pruner(made_up(seed).evidence), made_up(seed))) for seed in range(100, 104)]
    assert history[0] > 0.6
    assert max(unseen) < 0.1
    with pytest.raises(InvalidInputError, match="samples"):
        fit(pruner, [])
