"""The real model and real texts: all-MiniLM-L6-v2 from its wheel."""

import copy
import csv
import json

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

import secateur
from secateur.choosing.mask_loss import MaskLoss
from secateur.pruners.map_network import MetaPruner
from secateur.relations import relational_kl, represent
from secateur.removal.proof import hidden_states, largest_difference
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.sites.gating import probe
from secateur.units.masks import Mask
from tests.support.sentences import SENTENCES

pytestmark = pytest.mark.real


def uneven(emptied=3):
    random = torch.Generator().manual_seed(0)
    vectors = [torch.rand(12, generator=random) > 0.5 for _ in range(6)]
    vectors[emptied] = torch.zeros(12, dtype=torch.bool)
    return Mask({f"encoder.layer.{i}.attention.self": v for i, v in enumerate(vectors)})


def test_capture_equals_eager_maps(minilm, minilm_folder, batch):
    maps = []
    with torch.no_grad(), probe(minilm, lambda r: maps.append(r.weights), weights=True):
        minilm(**batch)
    eager = AutoModel.from_pretrained(minilm_folder, attn_implementation="eager").eval()
    with torch.no_grad():
        wanted = eager(**batch, output_attentions=True).attentions
    assert len(maps) == 6
    for one, other in zip(maps, wanted, strict=True):
        assert torch.equal(one, other)


def test_gated_equals_removed_and_reloads_bit_for_bit(minilm, batch, tmp_path):
    mask = uneven()
    dense = hidden_states(minilm, batch)
    with secateur.gated(minilm, mask):
        preview = hidden_states(minilm, batch)
    result = secateur.remove_(minilm, mask)
    assert result.max_difference <= 1e-4
    removed = hidden_states(minilm, batch)
    assert largest_difference(preview, removed) <= 1e-5
    assert largest_difference(dense, preview) > 0.1
    minilm.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    state = minilm.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    for a, b in zip(removed, hidden_states(again, batch), strict=True):
        assert torch.equal(a, b)
    task_model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert task_model.bert.encoder.layer[3].attention.self.query.weight.shape == (0, 384)


def test_prune_in_one_call_leaves_the_model_whole(minilm, tokenizer):
    before = {k: v.clone() for k, v in minilm.state_dict().items()}
    small, report = secateur.prune(minilm, SENTENCES, pruning_ratio=0.5, tokenizer=tokenizer)
    assert str(report) == "kept 36 of 72 heads (pruning ratio 0.50)"
    assert all(torch.equal(v, before[k]) for k, v in minilm.state_dict().items())
    assert report.after.parameters < report.before.parameters == 22_713_216
    # By hand: six layers of q, k, v and o lose half of 384 x 384; the map products lose half of 2 x 128 x 128 x 384.
    lost = 6 * (4 * 384 * 192 * 128 + 2 * 128 * 128 * 192)
    assert report.before.macs - report.after.macs == lost
    assert all(v.sum() == 6 for v in report.mask.values())
    assert small.config.head_pruning["scorer"] == report.scorer == "matching"
    json.dumps(report.to_json(), allow_nan=False)


def test_contribution_is_better_than_its_opposite(minilm, tokenizer, batch):
    """The half that writes most keeps the texts' relations better than the half that writes least."""
    scores = secateur.score(minilm, SENTENCES, "contribution", tokenizer)
    kept = secateur.select(scores, 0.5)
    opposite = Mask({site: ~vector for site, vector in kept.items()})
    with torch.no_grad():
        dense = represent(minilm, minilm(**batch), batch, False)
        loss = []
        for mask in (kept, opposite):
            with secateur.gated(minilm, mask):
                loss.append(float(relational_kl(dense, represent(minilm, minilm(**batch), batch, False))))
    assert loss[0] < loss[1] / 2


def test_the_authors_checkpoints_give_the_expected_scores(minilm, tokenizer, shared):
    cases = json.loads((shared / "interop" / "expected_scores.json").read_text())["cases"]
    assert len(cases) >= 4
    for case in cases:
        with (shared / "data" / case["task"] / f"{case['split']}.tsv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[slice(*case["rows"])]
        pair = case["kind"] == "pair"
        texts = [(r["sentence1"], r["sentence2"]) if pair else r["sentence"] for r in rows]
        pruner = MetaPruner.from_authors_checkpoint(shared / "interop" / case["checkpoint"])
        scores = secateur.score(
            minilm, texts, "smp", tokenizer, pruner=pruner, reading=Reading(batch_size=7, max_length=case["max_length"])
        )
        found = torch.stack(list(scores.values()))
        assert (found - torch.tensor(case["scores"])).abs().max() < 1e-4
        mask = secateur.select(scores, 0.5)
        assert list(mask.kept.values()) == case["kept_heads_at_ratio_0.5"]


def test_sites_of_a_real_model(minilm):
    sites = find_sites(minilm)
    assert [site.num_units for site in sites.values()] == [12] * 6
    assert {site.width for site in sites.values()} == {32}


def test_the_shipped_meta_pruners_beat_random_heads(minilm, tokenizer):
    """On sentences that it was not trained on, with masks evaluated on others than those scored."""
    from secateur.demo import demo_task
    from secateur.meta_training.subjects import Subject

    texts, sites = demo_task()[0].texts, find_sites(minilm)
    mask_loss = MaskLoss(minilm, Subject(minilm, tokenizer).batches(texts[64:96], 32, 64), is_pair=False)

    def loss(scorer, seed=0):
        scores = secateur.score(minilm, texts[:32], scorer, tokenizer, reading=Reading(max_length=64, seed=seed))
        return mask_loss(secateur.select(scores, 0.5).present(sites))

    chance = [loss("random", seed) for seed in range(5)]
    assert loss("smp") < sum(chance) / 5
    assert loss("smp-plus") < sum(chance) / 5


def test_the_shipped_joint_pruner_knows_this_model_and_none_of_its_shape(minilm, tokenizer):
    from transformers import AutoModel

    from secateur.demo import demo_task
    from secateur.meta_training.subjects import Subject
    from secateur.pruners.evidence import gather_evidence
    from secateur.pruners.joint_network import JointPruner
    from secateur.scorers.smp_plus import SHIPPED

    pruner, texts = JointPruner.from_pretrained(str(SHIPPED)).eval(), demo_task()[0].texts[:32]

    def recalled(model, is_pair=False):
        made = Subject(minilm, tokenizer).batches(texts, 32, 64)
        return pruner.recall(gather_evidence(model, find_sites(model), made, is_pair, maps=False))

    single, pairs = recalled(minilm), recalled(minilm, is_pair=True)
    for kept in (single, pairs):  # masks at 25, 50 and 75%
        assert kept.shape == (72,)
        assert kept.mean() == pytest.approx(0.5, abs=0.01)
    assert not torch.equal(single, pairs)
    pruned = copy.deepcopy(minilm)
    mask = secateur.select(secateur.score(minilm, texts, "contribution", tokenizer), 0.5)
    secateur.remove_(pruned, mask)
    assert recalled(pruned).shape == (36,)
    torch.manual_seed(0)
    assert recalled(AutoModel.from_config(minilm.config).eval()) is None
