"""The joint pruner: evidence that no width changes, scores for all heads together, search, and fit."""

import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig

import secateur
from secateur.choosing.mask_loss import MaskLoss
from secateur.choosing.refinement import refine_mask
from secateur.choosing.search import exchanges, search
from secateur.errors import CheckpointError, InvalidInputError, SecateurWarning
from secateur.meta_training.collecting import TrialConfig, collect
from secateur.meta_training.fitting import FitConfig, fit, imitation_loss, training_loss, trial_loss
from secateur.meta_training.sample import LEAVE_ONE_OUT, Sample
from secateur.models.inputs import example_inputs, forward_arguments
from secateur.pruners.evidence import Evidence, gather_evidence
from secateur.pruners.features import EVIDENCE_KINDS, FEATURES, MAP_FEATURES
from secateur.pruners.joint_network import JointPruner, trust
from secateur.pruners.kernels import second_moments, unbiased_hsic
from secateur.pruners.map_statistics import map_statistics
from secateur.pruners.writes import output_weights
from secateur.relations import gated_representations, relational_kl
from secateur.removal.remove import gated, remove_
from secateur.scorers.score import score
from secateur.scorers.smp_plus import SmpPlusScorer
from secateur.sites.attention import find_sites
from secateur.sites.gating import probe
from secateur.units.masks import Mask
from tests.support.joint import batches_of, column, evidence_of, learned, permuted
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer, uneven_mask

RANDOM = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 30, 32])
def test_second_moments_in_blocks_are_those_of_the_whole(width):
    rows = torch.randn(20, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    torch.testing.assert_close(second_moments(rows), rows.T @ rows)


# --- evidence


def contributions(model, batch):
    """What every head adds to the residual stream, `[heads, texts, tokens, model width]`, made the long way."""
    sites, found = find_sites(model), []
    with (
        torch.no_grad(),
        probe(
            model,
            lambda r: found.append(torch.einsum("bthi,hid->hbtd", r.outputs, output_weights(model, sites[r.site]))),
        ),
    ):
        model(**batch)
    return found


def hsic(first, second):
    """The unbiased estimate as a U-statistic: all (i, j, q, r) that differ, one by one."""
    total, count, n = torch.zeros(()), 0, len(first)
    for i, j, q, r in itertools.permutations(range(n), 4):
        total = total + first[i, j] * (second[i, j] + second[q, r] - 2 * second[i, q])
        count += 1
    return total / count


def test_hsic_does_not_depend_on_the_number_of_texts():
    random = torch.Generator().manual_seed(0)
    first, second = torch.randn(6, 3, generator=random), torch.randn(6, 3, generator=random)
    kernels = first @ first.T, second @ second.T
    torch.testing.assert_close(unbiased_hsic(*kernels), hsic(*kernels), atol=1e-4, rtol=1e-4)
    means = []
    for texts in (6, 40):
        x = torch.randn(2000, texts, 3, generator=random)
        y = x[..., :1] + torch.randn(2000, texts, 1, generator=random)
        means.append(float(unbiased_hsic(x @ x.mT, y @ y.mT).mean()))
    assert means[0] == pytest.approx(means[1], rel=0.1)
    assert means[1] == pytest.approx(1, rel=0.1)  # the squared covariance of x's first number with y


def test_sizes_directions_and_redundancy_by_the_long_way():
    model = tiny_model("bert")
    (batch,) = batches_of(model, 6, 6)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    evidence = evidence_of(model, [batch])
    with torch.no_grad():
        targets = model(**batch).last_hidden_state.mean(dim=1)
    targets = torch.nn.functional.normalize(targets - targets.mean(dim=0), dim=1)
    target = targets @ targets.T
    for number, written in enumerate(contributions(model, batch)):
        rows = slice(4 * number, 4 * number + 4)

        def check(name, expected, rows=rows):
            torch.testing.assert_close(column(evidence, name)[rows], expected, atol=2e-4, rtol=2e-4)

        size = written.norm(dim=-1).mean(dim=(1, 2)).log()
        check("size", size - size.mean())
        texts = written.mean(dim=2)
        texts = texts - texts.mean(dim=1, keepdim=True)
        variation = texts.norm(dim=-1).square().mean(dim=1).log() / 2
        check("variation", variation - variation.mean())
        common = torch.stack([hsic(t @ t.T, target) for t in texts])
        relevance = (common / hsic(target, target).sqrt()).clamp(min=0)
        relevance = relevance.clamp(min=1e-2 * float(relevance.mean())).log() / 2
        check("relevance", relevance - relevance.mean())
        own = torch.stack([hsic(t @ t.T, t @ t.T).sqrt() for t in texts])
        check("alignment", (common / (own * hsic(target, target).sqrt())).clamp(-1, 1))
        total = written.sum(dim=0)
        inner = (written * total).sum(dim=(1, 2, 3))
        check("cosine with site", inner / (written.flatten(1).norm(dim=1) * total.norm()))
        check("share of site", 4 * inner / total.square().sum())
        flat = torch.nn.functional.normalize(written.flatten(1), dim=1)
        likeness = flat @ flat.T
        torch.testing.assert_close(evidence.likeness[rows, rows], likeness, atol=1e-4, rtol=1e-4)
        check("nearest head", (likeness - 2 * torch.eye(4)).amax(dim=1))
    assert bool((evidence.likeness[:4, 4:] == 0).all())


def test_a_copied_head_is_explained_by_the_other():
    model = tiny_model("bert")
    attention = model.encoder.layer[1].attention
    with torch.no_grad():
        for linear in (attention.self.query, attention.self.key, attention.self.value):
            linear.weight[8:16] = linear.weight[:8]
            linear.bias[8:16] = linear.bias[:8]
        attention.output.dense.weight[:, 8:16] = attention.output.dense.weight[:, :8]
    evidence = evidence_of(model)
    unexplained = column(evidence, "unexplained")
    assert float(unexplained[4:6].max()) < -4
    assert float(unexplained[6:8].min()) > -4
    assert column(evidence, "nearest head")[4] == pytest.approx(1, abs=1e-4)
    assert evidence.likeness[4, 5] == pytest.approx(1, abs=1e-4)


def test_what_maps_look_like_by_hand():
    weights = torch.tensor([[[[1.0, 0, 0], [0.5, 0.5, 0], [0, 0.25, 0.75]]]])
    found = dict(zip(MAP_FEATURES, map_statistics(weights, torch.ones(1, 3))[0, 0].tolist(), strict=True))
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert found["entropy"] == pytest.approx((0 + math.log(2) + quarter) / 3 / math.log(3))
    assert found["confidence"] == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert found["to first"] == pytest.approx(1.5 / 3)
    assert found["to last"] == pytest.approx(0.75 / 3)
    assert found["to self"] == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert found["to previous"] == pytest.approx((0.5 + 0.25) / 3)
    assert found["to next"] == pytest.approx(0)


@pytest.mark.parametrize("kind", ["bert", "albert", "vit", "gpt2", "llama", "bart"])
def test_evidence_is_finite_for_every_kind(kind):
    model = tiny_model(kind)
    inputs = forward_arguments(
        model, [example_inputs(model, batch=4, length=10), example_inputs(model, batch=2, length=7)]
    )
    evidence = evidence_of(model, inputs)
    assert evidence.features.shape == (sum(s.num_units for s in find_sites(model).values()), len(FEATURES))
    assert bool(evidence.features.isfinite().all())
    assert float(evidence.likeness.abs().max()) <= 1


def test_padding_and_batching_and_order_change_nothing():
    model = tiny_model("bert")
    (whole,) = batches_of(model, 8, 8)
    parts = batches_of(model, 8, 2)
    one = evidence_of(model, [whole])
    for inputs in (parts, parts[::-1]):
        other = evidence_of(model, inputs)
        torch.testing.assert_close(other.features, one.features, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(other.likeness, one.likeness, atol=1e-4, rtol=1e-4)
    wider = {k: torch.nn.functional.pad(v, (0, 5)) if isinstance(v, torch.Tensor) else v for k, v in whole.items()}
    torch.testing.assert_close(evidence_of(model, [wider]).features, one.features, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("is_pair", [False, True])
def test_the_side_of_the_padding_changes_nothing(is_pair):
    from secateur.texts.tokenization import batches

    model, tokenizer, found = tiny_model("llama"), tiny_tokenizer(), []
    for side in ("right", "left"):
        tokenizer.padding_side = side
        inputs = forward_arguments(model, batches(tokenizer, tiny_texts(8, 0, is_pair), 8, 32))
        found.append(evidence_of(model, inputs, is_pair))
    torch.testing.assert_close(found[1].features, found[0].features, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[1].likeness, found[0].likeness, atol=1e-4, rtol=1e-4)


def test_three_texts_are_too_few():
    model = tiny_model("bert")
    with pytest.raises(InvalidInputError, match=r"`texts` must be at least 4, .* got 3"):
        evidence_of(model, batches_of(model, 3, 3))


# --- the network


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


# --- the search


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
    pruned, report = secateur.prune(model, texts, 0.5, scorer="random", tokenizer=tokenizer, refine=10)
    assert len(report.refinement) == 11
    assert report.to_json()["refinement"][0] >= min(report.refinement)
    assert pruned.config.head_pruning["kept_heads"] == report.mask.kept
    with pytest.raises(InvalidInputError, match="`refine` needs `texts`"):
        secateur.prune(model, scorer="magnitude", refine=5)
    with pytest.raises(InvalidInputError, match="`steps` must be a whole number"):
        refine_mask(model, report.mask, texts, tokenizer, steps=-1)


# --- the fit


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
