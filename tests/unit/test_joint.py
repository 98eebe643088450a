"""The joint pruner's network: scores for all heads together."""

import itertools
import math
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig

from secateur.errors import CheckpointError, InvalidInputError, SecateurWarning
from secateur.models.inputs import example_inputs
from secateur.pruners.evidence import Evidence, gather_evidence
from secateur.pruners.features import EVIDENCE_KINDS, FEATURES, MAP_FEATURES
from secateur.pruners.joint_network import JointPruner, trust
from secateur.scorers.score import score
from secateur.scorers.smp_plus import SmpPlusScorer
from secateur.sites.attention import find_sites
from secateur.sites.gating import probe
from tests.support.joint import batches_of, column, evidence_of, learned, permuted
from tests.support.tiny import tiny_model


def test_heads_of_a_site_may_come_in_any_order():
    evidence = evidence_of(tiny_model("bert"))
    pruner = learned()
    order = torch.cat([torch.tensor([2, 0, 3, 1]) + 4 * site for site in range(3)])
    with torch.no_grad():
        torch.testing.assert_close(pruner(permuted(evidence, order)), pruner(evidence)[order], atol=1e-5, rtol=1e-5)


def test_models_scored_together_are_scored_alike():
    small, large = evidence_of(tiny_model("bert")), evidence_of(tiny_model("llama"))
    pruner = learned()
    with torch.no_grad():
        for together, one in zip(pruner.score_all([small, large, small]), (small, large, small), strict=True):
            torch.testing.assert_close(together, pruner(one), atol=1e-5, rtol=1e-5)


def test_a_new_network_is_the_contribution_scorer():
    model = tiny_model("bert")
    contribution = score(model, inputs=batches_of(model), scorer="contribution")
    with torch.no_grad():
        found = JointPruner().eval()(evidence_of(model))
    logs = torch.cat(list(contribution.values())).log().float()
    # The standardised contribution: half of it as the prior, all of it as what members make of it so far.
    torch.testing.assert_close(found, 1.5 * (logs - logs.mean()) / logs.std(correction=0), atol=1e-4, rtol=1e-4)


def test_members_are_trusted_as_far_as_they_agree():
    first = torch.tensor([1.0, -1.0, 1.0, -1.0])
    second = torch.tensor([1.0, 1.0, -1.0, -1.0])  # without correlation to the first
    assert float(trust(first[None])) == 1
    assert float(trust(torch.stack([first, first]))) == 1
    assert float(trust(torch.stack([first, second]))) == 0
    assert float(trust(torch.stack([first, -first]))) == 0
    for correlation, expected in ((0.8, 0), (0.86, 0.4), (0.95, 1)):
        mixed = correlation * first + math.sqrt(1 - correlation**2) * second
        assert float(trust(torch.stack([first, mixed]))) == pytest.approx(expected, abs=1e-5)
    # The mean over pairs: 1, 0 and 0.
    assert float(trust(torch.stack([first, first, second]))) == 0


def test_networks_that_disagree_say_so():
    model = tiny_model("bert")
    inputs = batches_of(model)
    with pytest.warns(SecateurWarning, match=r"disagree on this model \(mean correlation -?0\.\d\d, trusted above 0.8"):
        score(model, inputs=inputs, scorer="smp-plus", pruner=learned(members=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(model, inputs=inputs, scorer="smp-plus", pruner=JointPruner())


@pytest.mark.parametrize("apart", [0.0, 0.2, 2.0])
def test_the_score_is_the_prior_and_the_members_or_the_contribution_by_hand(apart):
    evidence = evidence_of(tiny_model("bert"))
    pruner = learned(members=3, prior=0.7)
    for member in pruner.members[1:]:
        member.load_state_dict(pruner.members[0].state_dict())
        torch.nn.init.normal_(member.head.weight, std=apart)
        member.head.weight.data += pruner.members[0].head.weight

    def standardised(x):
        return (x - x.mean()) / x.std(correction=0)

    with torch.no_grad():
        (scores,) = pruner.member_scores([evidence])
        found = pruner(evidence)
    assert scores.shape == (3, 12)
    rows = [standardised(row) for row in scores]
    alike = sum(float(a @ b) / 12 for a, b in itertools.combinations(rows, 2)) / 3
    sure = min(max((alike - 0.8) / 0.15, 0), 1)
    assert (sure == 1, 0 < sure < 1, sure == 0)[[0.0, 0.2, 2.0].index(apart)], sure
    contribution = standardised(column(evidence, "size") + column(evidence, "site level"))
    expected = (0.7 + 1 - sure) * contribution + sure * sum(rows) / 3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for wrong in ({"members": 0}, {"prior": -1.0}, {"prior": math.nan}, {"matching": -1.0}, {"matching": "much"}):
        with pytest.raises(InvalidInputError, match=f"`{next(iter(wrong))}` must be"):
            JointPruner(**wrong)


def test_one_pruner_serves_models_of_other_widths_depths_and_head_counts():
    pruner = learned()
    for width, layers, heads in ((32, 2, 4), (48, 5, 2), (96, 3, 12)):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=99, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=37
        )
        model = AutoModel.from_config(config).eval()
        scores = score(model, inputs=[example_inputs(model, batch=4)], scorer=SmpPlusScorer(pruner))
        assert [len(v) for v in scores.values()] == [heads] * layers
        assert all(bool(v.isfinite().all()) for v in scores.values())


def test_heads_are_scored_together_unless_told_otherwise():
    """Two heads of different sites change places: each other head has other company, and the same evidence."""
    evidence = evidence_of(tiny_model("bert"))
    order = torch.arange(12)
    order[[5, 10]] = order[[10, 5]]
    for joint in (True, False):
        pruner = learned(joint=joint)
        with torch.no_grad():
            before, after = pruner.member_scores([evidence, permuted(evidence, order)])
            differ = ((after - before).abs() > 1e-4).any(dim=0)
        assert bool(differ[[5, 10]].all())
        assert bool(differ[[0, 4, 6, 11]].any()) is joint


def test_maps_are_made_only_for_networks_that_see_them():
    model = tiny_model("bert")
    sites, inputs = find_sites(model), batches_of(model)
    plain = gather_evidence(model, sites, inputs, False, maps=False)
    whole = gather_evidence(model, sites, inputs, False)
    seen = [FEATURES.index(name) for name in FEATURES if name not in MAP_FEATURES]
    torch.testing.assert_close(plain.features[:, seen], whole.features[:, seen], atol=1e-5, rtol=1e-5)
    assert float(plain.features[:, [FEATURES.index(name) for name in MAP_FEATURES]].abs().max()) == 0
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "secateur.pruners.evidence.probe", lambda *a, weights: asked.append(weights) or probe(*a, weights=weights)
        )
        for without in (("maps",), ()):
            score(model, inputs=inputs, scorer=SmpPlusScorer(learned(without=without)))
    assert asked == [False] * len(inputs) + [True] * len(inputs)


@pytest.mark.parametrize("kind", EVIDENCE_KINDS)
def test_evidence_that_is_left_out_is_not_seen(kind):
    evidence = evidence_of(tiny_model("bert"))
    changed = Evidence(evidence.features.clone(), evidence.likeness, evidence.heads)
    for name in EVIDENCE_KINDS[kind]:
        if name != "depth":
            changed.features[:, FEATURES.index(name)] += torch.rand(12)
    with torch.no_grad():
        blind, seeing = learned(without=(kind,), prior=0.0), learned(without=(), prior=0.0)
        assert torch.equal(blind(changed), blind(evidence))
        assert not torch.equal(seeing(changed), seeing(evidence))
    with pytest.raises(InvalidInputError, match="`without` must name kinds among"):
        JointPruner(without=("nothing",))


def test_saved_and_loaded_it_scores_alike(tmp_path, capsys):
    evidence = evidence_of(tiny_model("bert"))
    pruner = learned(width=24, layers=1, without=("maps",))
    pruner.save_pretrained(tmp_path / "p")
    again = JointPruner.from_pretrained(str(tmp_path / "p")).eval()
    with torch.no_grad():
        assert torch.equal(again(evidence), pruner(evidence))
    assert capsys.readouterr().out == ""
    with pytest.raises(CheckpointError, match="cannot be loaded as a JointPruner"):
        SmpPlusScorer(tmp_path / "nowhere")
    # Weights that the network of this version has no place for are an error, not left out.
    file = tmp_path / "p" / "model.safetensors"
    save_file({**load_file(file), "mean": torch.zeros(26)}, file)
    with pytest.raises(CheckpointError, match="cannot be loaded as a JointPruner"):
        SmpPlusScorer(tmp_path / "p")


def test_what_is_set_after_it_was_made_is_saved(tmp_path):
    evidence = evidence_of(tiny_model("bert"))
    pruner = learned(members=3)
    pruner.prior, pruner.matching, pruner.members = 0.25, 0.0, pruner.members[:2]
    pruner.save_pretrained(tmp_path / "p")
    again = JointPruner.from_pretrained(str(tmp_path / "p")).eval()
    assert (again.prior, again.matching, len(again.members)) == (0.25, 0.0, 2)
    with torch.no_grad():
        assert torch.equal(again(evidence), pruner(evidence))


def test_neither_level_nor_scale_of_a_kind_of_evidence_counts():
    """So that a network serves models whose numbers it has not seen; depth differences and likeness are as they are."""
    evidence = evidence_of(tiny_model("bert"))
    features = 3 * evidence.features - 2
    kept = [FEATURES.index(name) for name in ("size", "site level", "depth")]
    features[:, kept] = evidence.features[:, kept]
    with torch.no_grad():
        pruner = learned(without=())
        found = pruner(Evidence(features, evidence.likeness, evidence.heads))
        torch.testing.assert_close(found, pruner(evidence), atol=1e-4, rtol=1e-4)
