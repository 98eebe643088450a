"""What a pruner remembers of models that it knows: telling heads again, and half of the score."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch

from secateur.errors import InvalidInputError
from secateur.meta_training.remembering import remember
from secateur.meta_training.sample import Sample
from secateur.pruners.evidence import Evidence, contribution_scores
from secateur.pruners.features import FEATURES
from secateur.pruners.joint_network import JointPruner
from secateur.pruners.known_models import KnownModel
from secateur.removal.remove import remove_
from secateur.scorers.score import score
from secateur.sites.attention import find_sites
from tests.support.joint import batches_of, column, evidence_of, learned, permuted
from tests.support.tiny import tiny_model, uneven_mask

SHARES = torch.stack([torch.linspace(0, 1, 12), torch.linspace(1, 0, 12)])


def knowing(evidence, shares=SHARES, **options):
    """A pruner that has seen a sample of single texts, and one of pairs, of the evidence's model."""
    pruner = learned(**options)
    of = [(replace(evidence, features=of_form(evidence, is_pair)), shares[is_pair]) for is_pair in (0, 1)]
    pruner.known.append(KnownModel.of(of))
    return pruner


def of_form(evidence, is_pair):
    features = evidence.features.clone()
    features[:, FEATURES.index("is pair")] = is_pair
    return features


def standardised(x):
    return (x - x.mean()) / x.std(correction=0)


def test_half_of_the_score_is_what_is_remembered_by_hand():
    evidence = evidence_of(tiny_model("bert"))
    plain, pruner = learned(), knowing(evidence)
    with torch.no_grad():
        expected = (standardised(plain(evidence)) + standardised(SHARES[0])) / 2
        torch.testing.assert_close(pruner(evidence), expected)
        pairs = evidence_of(tiny_model("bert"), is_pair=True)
        torch.testing.assert_close(pruner(pairs), (standardised(plain(pairs)) + standardised(SHARES[1])) / 2)


def test_the_weight_of_matching_is_what_it_was():
    evidence = evidence_of(tiny_model("bert"), is_pair=True)
    matched = Evidence(evidence.features, evidence.likeness, evidence.heads, torch.rand(12), evidence.fingerprints)
    pruner = knowing(evidence, matching=0.7)
    with torch.no_grad():
        added = pruner(matched) - pruner(evidence)
    torch.testing.assert_close(added, 0.7 * (8 * matched.matching).log1p())


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama", "t5"])
def test_a_model_is_known_again_after_training_in_low_precision_and_with_heads_removed(kind):
    model = tiny_model(kind)
    evidence = evidence_of(model)
    heads = len(evidence.features)
    shares = torch.rand(2, heads)
    pruner = knowing(evidence, shares)
    torch.testing.assert_close(pruner.recall(evidence), shares[0])
    trained = copy.deepcopy(model)
    for parameter in trained.parameters():
        parameter.data += 0.01 * parameter.data.std() * torch.randn_like(parameter)
    torch.testing.assert_close(pruner.recall(evidence_of(trained)), shares[0])
    torch.testing.assert_close(pruner.recall(evidence_of(copy.deepcopy(model).to(torch.bfloat16))), shares[0])
    mask = uneven_mask(find_sites(model))
    kept = torch.cat(list(mask.values()))
    assert not kept.all()
    remove_(model, mask)
    torch.testing.assert_close(pruner.recall(evidence_of(model)), shares[0][kept])


def test_heads_of_a_known_site_may_come_in_any_order():
    evidence = evidence_of(tiny_model("bert"))
    pruner = knowing(evidence, torch.rand(2, 12))
    order = torch.cat([torch.tensor([2, 0, 3, 1]) + 4 * site for site in range(3)])
    moved = replace(permuted(evidence, order), fingerprints=evidence.fingerprints[order])
    with torch.no_grad():
        torch.testing.assert_close(pruner.recall(moved), pruner.recall(evidence)[order])
        torch.testing.assert_close(pruner(moved), pruner(evidence)[order], atol=1e-5, rtol=1e-5)


def test_another_model_of_the_same_shape_is_not_known():
    one = tiny_model("bert")
    torch.manual_seed(1)
    other = type(one)(one.config).eval()
    pruner, evidence = knowing(evidence_of(one)), evidence_of(other)
    assert pruner.recall(evidence) is None
    with torch.no_grad():
        torch.testing.assert_close(pruner(evidence), learned()(evidence))


def test_a_head_that_stands_for_two_is_not_known():
    evidence = evidence_of(tiny_model("bert"))
    pruner = knowing(evidence)
    twice = evidence.fingerprints.clone()
    twice[1] = twice[0]
    assert pruner.recall(Evidence(evidence.features, evidence.likeness, evidence.heads, None, twice)) is None
    assert pruner.recall(Evidence(evidence.features, evidence.likeness, evidence.heads)) is None


def test_several_models_are_remembered_and_saved(tmp_path):
    small, large = (evidence_of(tiny_model(kind)) for kind in ("bert", "gpt2"))
    pruner = learned()
    for evidence in (small, large):
        kept = torch.rand(3, len(evidence.features))
        pruner.known.append(KnownModel.of([(evidence, row) for row in kept]))
    pruner.save_pretrained(tmp_path / "p")
    again = JointPruner.from_pretrained(str(tmp_path / "p")).eval()
    assert [len(model.kept) for model in again.known] == [3, 3]
    for evidence, known in zip((small, large), pruner.known, strict=True):
        torch.testing.assert_close(again.recall(evidence), known.kept.mean(dim=0))
        with torch.no_grad():
            assert torch.equal(again(evidence), pruner(evidence))
    mixed = torch.cat([small.fingerprints[:6], large.fingerprints[:6]])
    assert again.recall(replace(small, fingerprints=mixed)) is None


def test_of_relatives_the_closest_is_remembered():
    model = tiny_model("bert")
    tuned = copy.deepcopy(model)
    for parameter in tuned.parameters():
        parameter.data += 0.02 * parameter.data.std() * torch.randn_like(parameter)
    shares = torch.rand(2, 12)
    for order in ((0, 1), (1, 0)):
        pruner = learned()
        for number in order:
            pruner.known.append(KnownModel.of([(evidence_of((model, tuned)[number]), shares[number])]))
        for number, one in enumerate((model, tuned)):
            evidence = evidence_of(one)
            assert all(known.recall(evidence) is not None for known in pruner.known)
            torch.testing.assert_close(pruner.recall(evidence), shares[number])


def test_of_a_form_that_was_never_seen_nothing_is_remembered():
    evidence, pairs = (evidence_of(tiny_model("bert"), is_pair=is_pair) for is_pair in (False, True))
    pruner = learned()
    pruner.known.append(KnownModel.of([(evidence, SHARES[0])]))
    assert pruner.recall(evidence) is not None
    assert pruner.recall(pairs) is None
    with torch.no_grad():
        torch.testing.assert_close(pruner(pairs), learned()(pairs))


def test_for_single_texts_samples_on_which_heads_write_alike_count_more_by_hand():
    evidence = evidence_of(tiny_model("bert"))
    noise = torch.randn(12, generator=torch.Generator().manual_seed(0))
    samples = []
    for share, strength in ((SHARES[0], 0.0), (SHARES[1], 0.05), (SHARES[0].square(), 0.2)):
        features = evidence.features.clone()
        features[:, FEATURES.index("size")] += strength * noise
        samples.append((replace(evidence, features=features), share))
    written = torch.stack([contribution_scores(one) for one, _ in samples])
    correlations = torch.corrcoef(torch.cat([contribution_scores(evidence)[None], written]))[0, 1:]
    weights = (40 * correlations).exp() / (40 * correlations).exp().sum()
    assert 0.34 < float(weights[0]) < 0.99, weights
    known = KnownModel.of(samples)
    expected = sum(float(weight) * share for weight, (_, share) in zip(weights, samples, strict=True))
    torch.testing.assert_close(known.recall(evidence), expected)
    of_pairs = [(replace(one, features=of_form(one, 1)), share) for one, share in samples]
    known = KnownModel.of([*samples, *of_pairs[:2]])
    torch.testing.assert_close(known.recall(of_pairs[0][0]), torch.full((12,), 0.5))


def test_networks_that_disagree_on_a_known_model_say_nothing():
    model = tiny_model("bert")
    pruner = learned(members=3)
    with pytest.warns(match="disagree on this model"):
        score(model, inputs=batches_of(model), scorer="smp-plus", pruner=pruner)
    pruner.known = knowing(evidence_of(model)).known
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(model, inputs=batches_of(model), scorer="smp-plus", pruner=pruner)


def sample_of(evidence, found, by_site):
    nothing = torch.zeros(0)
    return Sample("m", "t", evidence, nothing, nothing, nothing, torch.tensor(found).bool(), torch.tensor(by_site))


def test_shares_of_found_masks_by_hand():
    evidence = evidence_of(tiny_model("bert"))
    low, high = [1.0] * 6 + [0.0] * 6, [0.0] * 6 + [1.0] * 6
    pruner = learned()
    every = [
        sample_of(evidence, [low, high, high], [True, False, False]),
        sample_of(evidence, [low, high], [False] * 2),
    ]
    other = replace(evidence, fingerprints=torch.rand_like(evidence.fingerprints))
    elsewhere = replace(evidence, fingerprints=evidence.fingerprints * 1.00001)  # another device rounds otherwise
    every[1] = replace(every[1], evidence=elsewhere)
    remember(pruner, [every[0], sample_of(other, [low], [False]), every[1]])
    known, of_the_other = pruner.known
    assert torch.equal(known.fingerprints, evidence.fingerprints)
    assert torch.equal(of_the_other.fingerprints, other.fingerprints)
    assert known.kept.tolist() == [high, [0.5] * 12]
    assert known.pairs.tolist() == [False, False]
    assert of_the_other.kept.tolist() == [low]
    for useless in (sample_of(evidence, [low], [True]), Sample("m", "t", evidence, *[torch.zeros(0)] * 3)):
        with pytest.raises(InvalidInputError, match="`samples` must hold masks that a search found"):
            remember(learned(), [useless])
    with pytest.raises(InvalidInputError, match="`samples` must hold fingerprints"):
        remember(learned(), [sample_of(replace(evidence, fingerprints=None), [low], [False])])


def test_wrong_arguments_are_named():
    for wrong in (((0, 1),), ((12, -1),), ((12, "3"),), (12,), ((1, 2, 3),)):
        with pytest.raises(InvalidInputError, match="`remembered` must"):
            JointPruner(remembered=wrong)


def test_the_fingerprint_is_no_evidence():
    """Nothing but what is remembered is looked up by it, so that networks cannot learn single models by it."""
    evidence = evidence_of(tiny_model("bert"))
    other = Evidence(evidence.features, evidence.likeness, evidence.heads, None, torch.rand_like(evidence.fingerprints))
    with torch.no_grad():
        assert torch.equal(learned()(evidence), learned()(other))
    assert column(evidence, "size").shape == (12,)
