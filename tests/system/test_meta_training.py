"""Meta-training, step by step as the method states it, and what a run survives."""

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open

import secateur
from secateur import cli
from secateur.errors import CheckpointError, InvalidInputError, SecateurError
from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.held_out import HeldOut, held_out_kl
from secateur.meta_training.meta_step import MetaTraining
from secateur.meta_training.paper import run as run_to_the_end
from secateur.meta_training.paper import train_meta_pruner
from secateur.meta_training.runs import Log, latest_checkpoint
from secateur.meta_training.sampling import draw_heads, draw_whole_sites, drop_dimensions, task_weights
from secateur.meta_training.signals import leave_one_out_estimate, num_kept, random_masks_estimate, ranking_loss
from secateur.meta_training.subjects import Subject
from secateur.pruners.map_network import MetaPruner
from secateur.relations import gated_representations, relational_kl
from secateur.scorers.score import score
from secateur.sites.gating import HeadReading
from secateur.texts.data import Task
from tests.support.accelerate_gradients import gradients
from tests.support.processes import command
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer

TASKS = [Task("singles", tiny_texts(40)), Task("pairs", tiny_texts(40, seed=1, pairs=True))]
SMALL = {"batch_size": 4, "batches_per_step": 2, "max_length": 16, "evaluate_every": 2, "checkpoint_every": 1}


def subject(kind="bert"):
    return Subject(tiny_model(kind), tiny_tokenizer())


def training(kind="bert", **settings):
    return MetaTraining([subject(kind)], TASKS, MetaTrainingConfig(**{**SMALL, **settings}), Accelerator(cpu=True))


# --- sampling (steps 1, 3 and 5)


def test_task_weights_by_hand():
    # 392,702 ** 0.2 = 13.15; 2,490 ** 0.2 = 4.78; 32 ** 0.2 is exactly 2; a single text is still drawn.
    assert task_weights([392_702, 2_490, 32, 1]) == [13, 4, 2, 1]
    with pytest.raises(InvalidInputError, match="each with texts"):
        task_weights([3, 0])


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


# --- one step


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
    maps = {f"site {i}": torch.rand(2, heads, 128, 128) for i, heads in enumerate((4, 2, 5))}
    scores = run.scores(maps, is_pair=False)
    for site, rows in maps.items():
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
        (parts,) = (rows.chunk(layers) for rows in maps.values())
        assert all(len(part) == run.config.batch_size for part in parts)
        assert layers > 1
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
    batch = who.batch(tiny_texts(6), 16)
    dense = gated_representations(who.model, batch, {}, False)
    site = "encoder.layer.1.attention.self"
    alone = leave_one_out_estimate(who.model, batch, dense, who.heads, False)
    gate = torch.tensor([1.0, 1, 0, 1])
    wanted = relational_kl(dense, gated_representations(who.model, batch, {site: gate}, False))
    assert float(alone[site][2]) == pytest.approx(float(wanted), rel=1e-5)
    scorer = score(who.model, scorer="leave_one_out", inputs=[batch])
    torch.testing.assert_close(alone[site].double(), scorer[site], atol=1e-6, rtol=1e-3)

    # With one site of two heads there is one pair of masks, whatever is drawn: the estimate is their difference.
    few = {site: 4}
    config = MetaTrainingConfig(random_masks=2)
    found = random_masks_estimate(who.model, batch, dense, few, False, config, torch.Generator().manual_seed(0))
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


def test_a_pool_is_drawn_again_and_fresh_texts_are_not(monkeypatch):
    def batches_of(**settings):
        run, seen = training(**settings), []
        plain = run.subjects[0].batch
        monkeypatch.setattr(run.subjects[0], "batch", lambda texts, n: seen.append(tuple(texts)) or plain(texts, n))
        for step in range(12):
            run.loss(step, 0)
        return len(set(seen))

    assert batches_of() == 12
    assert batches_of(pool=2, signal="leave_one_out") <= 4


# --- a run


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_resumed_run_is_the_run(tmp_path, optimizer):
    settings = {**SMALL, "optimizer": optimizer, "learning_rate": 0.01}
    held_out = [HeldOut(Task("dev", tiny_texts(10, seed=5)), 4, 6)]

    def go(out, steps, resume=False):
        config = MetaTrainingConfig(steps=steps, **settings)
        return train_meta_pruner(
            [subject()], TASKS, out, config, held_out=held_out, resume=resume, progress=False,
            accelerator=Accelerator(cpu=True),
        )  # fmt: skip

    whole = go(tmp_path / "whole", 4)
    go(tmp_path / "parts", 2)
    with (tmp_path / "parts" / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "losses": {}}\n{"step": 4, "lo')  # what a kill after the checkpoint leaves
    again = go(tmp_path / "parts", 4, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert [r["step"] for r in rows(tmp_path / "whole") if "held_out" in r] == [0, 2, 4]
    loaded = MetaPruner.from_pretrained(tmp_path / "parts" / "pruner")
    assert torch.equal(loaded.main[0].weight, whole.main[0].weight)
    assert sorted(p.name for p in (tmp_path / "parts").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


@pytest.fixture
def folders(tmp_path):
    """A model and a task on disk, for the command line."""
    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    for split, seed in (("train", 0), ("dev", 1)):
        (data / f"{split}.csv").write_text("sentence\n" + "\n".join(tiny_texts(60, seed)) + "\n")
    return tmp_path / "model", data


def meta_train(folders, out, steps, *more):
    model, data = folders
    return [
        "meta-train", "--model", str(model), "--data", str(data), "--out", str(out), "--steps", str(steps),
        "--batch-size", "4", "--batches-per-step", "1", "--max-length", "16", "--checkpoint-every", "2", *more,
    ]  # fmt: skip


def test_a_killed_run_goes_on_to_the_identical_end(folders, tmp_path):
    """In processes of their own, one thread each: other thread counts round differently, and a sample may flip."""

    def start(out, *more):
        return command(meta_train(folders, tmp_path / out, 12, *more), tmp_path / "log")

    assert start("whole").wait().code == 0
    running = start("killed")
    while latest_checkpoint(tmp_path / "killed") is None and running.process.is_alive():
        time.sleep(0.02)
    running.process.kill()
    running.wait()
    assert 0 < len(rows(tmp_path / "killed")) < len(rows(tmp_path / "whole"))
    (tmp_path / "killed" / ".checkpoint-99.unfinished").mkdir()  # one that was being written
    assert start("killed", "--resume").wait().code == 0
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")
    one, other = (MetaPruner.from_pretrained(tmp_path / n / "pruner").state_dict() for n in ("whole", "killed"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not (tmp_path / "killed" / ".checkpoint-99.unfinished").exists()


def test_two_processes_give_the_gradients_of_one(tmp_path):
    root, package = Path(__file__).parents[2], Path(secateur.__file__).parents[1]
    signals = ["straight_through", "leave_one_out"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{package}{os.pathsep}{root}", "CUDA_VISIBLE_DEVICES": ""}
    # Processes on CPUs of one machine: what `accelerate launch` calls multi-GPU, told to stay on the CPU.
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
            "--main_process_port", str(port), "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend",
            "no", "-m", "tests.support.accelerate_gradients", str(tmp_path), *signals,
        ],
        env={**os.environ, **environment, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for signal in signals:
        alone = gradients(Accelerator(cpu=True), signal)
        with safe_open(tmp_path / f"{signal}.safetensors", "pt") as file:
            assert file.metadata()["processes"] == "2"
            for name, gradient in alone.items():
                close = {"rtol": 1e-4, "atol": 1e-5 * float(gradient.abs().max())}
                torch.testing.assert_close(file.get_tensor(name), gradient, **close)
        assert any(gradient.abs().max() > 0 for gradient in alone.values())


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path, monkeypatch):
    run = training()
    real = run.loss
    monkeypatch.setattr(run, "loss", lambda s, n: real(s, n) if s < 2 else (TASKS[1], torch.tensor(float("nan"))))
    with pytest.raises(SecateurError, match=r"the loss is nan at step 3, task pairs; the last good checkpoint is .*-2"):
        run_to_the_end(run, tmp_path, progress=False)
    assert [r["step"] for r in rows(tmp_path)] == [1, 2]


def test_the_held_out_loss_is_that_of_the_mask(tmp_path):
    run = training()
    part = HeldOut(Task("dev", tiny_texts(12, seed=9)), 4, 8)
    first, again = (held_out_kl(run.pruner, run.subjects[0], [part], 0.5, 16) for _ in range(2))
    assert first == again
    assert first["dev"] > 0
    assert run.pruner.training
    with pytest.raises(InvalidInputError, match="held-out task dev has 5 texts, fewer than 35"):
        HeldOut(Task("dev", tiny_texts(5)))


# --- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "`steps` must be a whole number from 1, got 0"),
        ({"batch_size": 2}, "`batch_size` must be at least 3"),
        ({"learning_rate": -1}, "`learning_rate` must be above 0"),
        ({"pruning_ratio": 0}, r"`pruning_ratio` must be in \(0, 1\)"),
        ({"whole_sites": 1}, r"`whole_sites` must be in \[0, 1\)"),
        ({"signal": "none"}, "`signal` must be one of straight_through, leave_one_out, random_masks"),
        ({"optimizer": "lion"}, "`optimizer` must be 'sgd' or 'adam'"),
        ({"random_masks": 3}, "`random_masks` must be even"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        MetaTrainingConfig(**settings)


def test_tasks_and_models_that_cannot_be_trained_on():
    with pytest.raises(InvalidInputError, match="task few has 3 texts, fewer than one batch of 60"):
        MetaTraining([subject()], [Task("few", tiny_texts(3))], MetaTrainingConfig(), Accelerator(cpu=True))


def test_labels_play_no_part_so_one_class_is_enough():
    one_class = [Task(task.name, task.texts, [0] * len(task)) for task in TASKS]
    runs = [
        MetaTraining([subject()], tasks, MetaTrainingConfig(**SMALL), Accelerator(cpu=True))
        for tasks in (TASKS, one_class)
    ]
    assert runs[0].gradients(0) == runs[1].gradients(0)


def test_texts_longer_than_the_models_limit_are_cut():
    who = subject()
    batch = who.batch(["good " * 100, "bad"], max_length=128)
    assert batch["input_ids"].shape == (2, 32)


def test_checkpoints_that_do_not_fit(tmp_path):
    def go(**changes):
        config = MetaTrainingConfig(**{**SMALL, "steps": 2, **changes})
        return train_meta_pruner(
            [subject()], TASKS, tmp_path / "run", config, resume=True, progress=False, accelerator=Accelerator(cpu=True)
        )

    go(steps=1)
    with pytest.raises(CheckpointError, match=r"was made with learning_rate = 0\.02, not 0\.5"):
        go(learning_rate=0.5)
    state = tmp_path / "run" / "checkpoint-1" / "state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="is no complete meta-training checkpoint"):
        go()
    assert state.exists()
    with pytest.raises(InvalidInputError, match=r"be a new or empty folder.*resume the run that is there"):
        train_meta_pruner([subject()], TASKS, tmp_path / "run", accelerator=Accelerator(cpu=True))


def test_the_log_drops_what_lies_beyond_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    Log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    Log(path, 0)
    assert path.read_text() == ""


def test_the_command_refuses_bad_input_in_one_line(folders, tmp_path, capsys):
    for more, message in (
        (["--ratio", "1.5"], "must be in [0, 1), got 1.5"),
        (["--resume"], "there is no checkpoint to resume"),
        (["--data", str(tmp_path / "none.csv")], "none.csv"),
    ):
        assert cli.main(meta_train(folders, tmp_path / "out", 2, *more)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_tensorboard_gets_the_losses(folders, tmp_path, capsys):
    assert cli.main(meta_train(folders, tmp_path / "run", 2, "--tensorboard")) == 0
    assert "pruner: " in capsys.readouterr().out
    events = [p.read_bytes() for p in tmp_path.rglob("events.out.tfevents.*")]
    assert any(b"loss/data" in e for e in events)
    assert any(b"held_out/data" in e for e in events)


def test_a_run_stops_in_time_and_goes_on(folders, tmp_path, capsys):
    assert cli.main(meta_train(folders, tmp_path / "run", 3, "--max-minutes", "0.00001")) == 0
    assert "checkpoint-1; go on: --resume" in capsys.readouterr().out
    assert not (tmp_path / "run" / "pruner").exists()
    assert cli.main(meta_train(folders, tmp_path / "run", 3, "--resume")) == 0
    assert [r["step"] for r in rows(tmp_path / "run") if "losses" in r] == [1, 2, 3]


def test_readings_reach_the_pruner_streamed():
    """`score_maps` at scoring time and `scores` in training agree on the same maps."""
    run = training()
    run.pruner.eval()
    who = run.subjects[0]
    batch = who.batch(tiny_texts(3), 16)
    maps, streamed = {}, {}

    def see(reading: HeadReading):
        from secateur.pruners.map_network import to_network_size

        maps[reading.site] = to_network_size(reading.weights, batch["attention_mask"])
        streamed[reading.site] = run.pruner.score_maps(reading.weights, batch["attention_mask"], False).mean(dim=0)

    from secateur.sites.gating import probe

    with torch.no_grad(), probe(who.model, see, weights=True):
        who.model(**batch)
        together = run.scores(maps, False)
    for site, row in streamed.items():
        torch.testing.assert_close(row, together[site])
