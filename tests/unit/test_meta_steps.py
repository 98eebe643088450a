"""Meta-training, step by step as the method states it."""

import itertools

import pytest
import torch

from secateur.errors import InvalidInputError
from secateur.meta_training import meta_step
from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.sampling import draw_heads, draw_whole_sites, drop_dimensions, task_weights
from secateur.meta_training.signals import leave_one_out_estimate, num_kept, random_masks_estimate, ranking_loss
from secateur.pruners.map_network import to_network_size
from secateur.relations import gated_representations, relational_kl
from secateur.scorers.score import score
from secateur.sites.gating import HeadReading
from tests.support.meta import subject, training
from tests.support.tiny import tiny_texts


def test_task_weights_by_hand():
    # 392,702 ** 0.2 = 13.15; 2,490 ** 0.2 = 4.78; 32 ** 0.2 is exactly 2; a single text is still drawn.
    assert task_weights([392_702, 2_490, 32, 1]) == [13, 4, 2, 1]
    with pytest.raises(InvalidInputError, match="each with texts"):
        task_weights([3, 0])


def test_a_part_of_the_texts_can_stand_for_all_of_them():
    assert training().weights.tolist() == [2, 2]  # 40 texts each
    assert training(task_sizes=(392_702, 2_490)).weights.tolist() == [13, 4]
    assert training(task_sizes=[3, 1], task_power=1).weights.tolist() == [3, 1]  # the weights themselves


def test_tasks_are_drawn_by_their_weights():
    run = training()
    run.weights = torch.tensor([3.0, 1.0], dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    drawn = [run.draw(random) for _ in range(2000)]
    assert sum(task == 0 for _, task, _ in drawn) / 2000 == pytest.approx(0.75, abs=0.03)
    assert {(model, place) for model, _, place in drawn} == {(0, -1)}


def test_whole_sites():
    draws = [draw_whole_sites(5, 0.5, torch.Generator().manual_seed(i)) for i in range(400)]
    assert all(len(d) == 2 for d in draws)
    for site in range(5):
        assert sum(site in d for d in draws) / 400 == pytest.approx(0.4, abs=0.08)
    assert draw_whole_sites(6, 0.0, torch.Generator()) == set()


def test_inclusion_frequencies_agree_with_enumeration():
    scores = torch.tensor([0.2, 1.9, 1.0, 0.6])
    p = scores.softmax(0).tolist()
    # Until two distinct heads are in, repeats do nothing: the second follows the first as if that were not there.
    expected = [0.0] * 4
    for first, second in itertools.permutations(range(4), 2):
        chance = p[first] * p[second] / (1 - p[first])
        expected[first] += chance
        expected[second] += chance
    counts = torch.zeros(4)
    random = torch.Generator().manual_seed(0)
    for _ in range(2000):
        gate = draw_heads(scores, 2, random)
        assert set(gate.tolist()) == {0.0, 1.0}
        assert gate.sum() == 2
        counts += gate
    assert sum(expected) == pytest.approx(2)
    torch.testing.assert_close(counts / 2000, torch.tensor(expected), atol=0.04, rtol=0)


def test_the_straight_through_gradient_has_the_right_sign():
    """Where the loss falls when a head's gate opens, that head's score must rise under gradient descent."""
    total = torch.zeros(3)
    for seed in range(300):
        scores = torch.tensor([0.5, 1.0, 1.5], requires_grad=True)
        gate = draw_heads(scores, 2, torch.Generator().manual_seed(seed))
        loss = -3.0 * gate[1] + gate[2]
        loss.backward()
        assert float(scores.grad.sum()) == pytest.approx(0, abs=1e-6)  # a softmax moves no total
        total += scores.grad
    assert total[1] < 0 < total[2]


def test_all_heads_can_be_kept_and_none_cannot():
    assert draw_heads(torch.zeros(3), 3, torch.Generator()).tolist() == [1, 1, 1]
    with pytest.raises(InvalidInputError, match="`num_kept` must be from 1 to 3, got 0"):
        draw_heads(torch.zeros(3), 0, torch.Generator())


def test_dimension_dropout():
    masks = torch.stack([drop_dimensions(50, 0.8, torch.Generator().manual_seed(i)) for i in range(200)])
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert float(masks.mean()) == pytest.approx(0.2, abs=0.02)
    assert drop_dimensions(1, 0.999, torch.Generator().manual_seed(3)).tolist() == [1.0]


@pytest.mark.parametrize("signal_name", ["straight_through", "leave_one_out", "random_masks"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_step_moves_the_pruner_and_nothing_else(kind, signal_name):
    run = training(kind, signal=signal_name, random_masks=4)
    model = run.subjects[0].model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    start = {k: v.clone() for k, v in run.pruner.named_parameters()}
    losses = run.gradients(0)
    assert sum(map(len, losses.values())) == 2
    run.optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert any(not torch.equal(v, start[k]) for k, v in run.pruner.named_parameters())
    assert all(bool(torch.isfinite(p.grad).all()) for p in run.pruner.parameters())
    assert not model.training


def test_heads_and_layers_may_differ_in_number():
    """Three layers of four heads: every score must come from the maps of its own site and head."""
    run = training()
    assert run.subjects[0].heads == {f"encoder.layer.{i}.attention.self": 4 for i in range(3)}
    run.pruner.eval()
    maps = {
        f"site {i}": [torch.rand(1, heads, 128, 128), torch.rand(2, heads, 9, 8)] for i, heads in enumerate((4, 2, 5))
    }
    scores = run.scores(maps, is_pair=False)
    for site, parts in maps.items():
        rows = torch.cat([to_network_size(part) for part in parts])
        assert scores[site].shape == rows.shape[1:2]
        for head in range(rows.shape[1]):
            alone = run.pruner(rows[:, head])[:, 1].mean()
            torch.testing.assert_close(scores[site][head], alone)


def test_a_site_that_layers_share_is_read_in_each(monkeypatch):
    run, seen = training("albert"), []
    scores = run.scores
    monkeypatch.setattr(run, "scores", lambda maps, is_pair: seen.append(maps) or scores(maps, is_pair))
    run.gradients(0)
    layers = run.subjects[0].model.config.num_hidden_layers
    assert seen
    for maps in seen:
        (parts,) = maps.values()
        assert len(parts) == layers > 1
        assert all(len(part) == run.config.batch_size for part in parts)
        assert not torch.equal(parts[0], parts[1])


def test_the_loss_is_weighted_and_gates_are_half_of_the_cut_sites(monkeypatch):
    from secateur.meta_training import signals

    seen = []
    real = signals.gated_representations

    def watch(model, batch, gates, is_pair):
        seen.append((is_pair, {s: int(g.sum()) for s, g in gates.items()}))
        return real(model, batch, gates, is_pair)

    monkeypatch.setattr(signals, "gated_representations", watch)
    losses = {}
    for weight in (1.0, 10.0):
        run = training(single_weight=weight)
        losses[weight] = [run.loss(step, 0) for step in range(6)]
    assert all(set(gates.values()) == {2} and len(gates) == 2 for _, gates in seen)  # 3 sites, 1 stays whole
    for (task, one), (_, ten) in zip(losses[1.0], losses[10.0], strict=True):
        factor = 1 if task.is_pair else 10
        torch.testing.assert_close(one * factor, ten)
    assert {is_pair for is_pair, _ in seen} == {True, False}


def test_estimates_by_hand():
    who = subject()
    batch, parts = who.batch(tiny_texts(6), 16), who.parts(tiny_texts(6), 16)
    dense = gated_representations(who.model, batch, {}, False)
    site = "encoder.layer.1.attention.self"
    alone = leave_one_out_estimate(who.model, parts, dense, who.heads, False)
    gate = torch.tensor([1.0, 1, 0, 1])
    wanted = relational_kl(dense, gated_representations(who.model, batch, {site: gate}, False))
    assert float(alone[site][2]) == pytest.approx(float(wanted), rel=1e-5)
    scorer = score(who.model, scorer="leave_one_out", inputs=[batch])
    torch.testing.assert_close(alone[site].double(), scorer[site], atol=1e-6, rtol=1e-3)

    # With one site of two heads there is one pair of masks, whatever is drawn: the estimate is their difference.
    few = {site: 4}
    config = MetaTrainingConfig(random_masks=2)
    found = random_masks_estimate(who.model, parts, dense, few, False, config, torch.Generator().manual_seed(0))
    mask = torch.randperm(4, generator=torch.Generator().manual_seed(0)) < 2
    kept, dropped = (
        float(relational_kl(dense, gated_representations(who.model, batch, {site: m.float()}, False)))
        for m in (mask, ~mask)
    )
    expected = torch.where(mask, dropped - kept, kept - dropped)
    torch.testing.assert_close(found[site], expected, atol=1e-6, rtol=1e-3)


def test_the_ranking_loss_by_hand():
    scores = {"a": torch.tensor([1.0, 2, 3]), "b": torch.tensor([1.0, 1, 4]), "lone": torch.tensor([5.0])}
    same = {"a": torch.tensor([10.0, 20, 30]), "b": torch.tensor([0.0, 0, 9]), "lone": torch.tensor([1.0])}
    assert float(ranking_loss(scores, same)) == pytest.approx(0, abs=1e-6)
    opposite = {site: -row for site, row in same.items()}
    assert float(ranking_loss(scores, opposite)) == pytest.approx(2, abs=1e-6)


def test_num_kept():
    assert [num_kept(12, r) for r in (0.25, 0.5, 0.75)] == [9, 6, 3]
    assert num_kept(9, 0.5) == 5


def test_a_pool_is_run_through_the_dense_model_once_and_fresh_texts_are_not(monkeypatch):
    def batches_of(room=meta_step.POOL_BYTES, **settings):
        monkeypatch.setattr(meta_step, "POOL_BYTES", room)
        run, seen = training(**settings), []
        plain = run.subjects[0].parts
        monkeypatch.setattr(run.subjects[0], "parts", lambda texts, n: seen.append(tuple(texts)) or plain(texts, n))
        losses = [float(run.loss(step, 0)[1].detach()) for step in range(6)]
        return len(seen), len(set(seen)), losses

    assert batches_of()[:2] == (6, 6)
    passes, different, losses = batches_of(pool=1)
    assert passes == different == 2  # one a task
    assert batches_of(room=0, pool=1) == (6, 2, losses)  # where there is no room, nothing changes but the time
    assert batches_of(pool=1, signal="leave_one_out")[:2] == (2, 2)


def test_readings_reach_the_pruner_streamed():
    """`score_maps` at scoring time and `scores` in training agree on the same maps."""
    run = training()
    run.pruner.eval()
    who = run.subjects[0]
    batch = who.batch(tiny_texts(3), 16)
    maps, streamed = {}, {}

    def see(reading: HeadReading):
        maps[reading.site] = [to_network_size(reading.weights, batch["attention_mask"])]
        streamed[reading.site] = run.pruner.score_maps(reading.weights, batch["attention_mask"], False).mean(dim=0)

    from secateur.sites.gating import probe

    with torch.no_grad(), probe(who.model, see, weights=True):
        who.model(**batch)
        together = run.scores(maps, False)
    for site, row in streamed.items():
        torch.testing.assert_close(row, together[site])
