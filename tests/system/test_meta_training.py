"""Runs of meta-training: what a run survives, and what it refuses."""

import copy
import json
import multiprocessing
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

from secateur import cli
from secateur.errors import CheckpointError, InvalidInputError, SecateurError
from secateur.meta_training import paper
from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.held_out import HeldOut, Judge
from secateur.meta_training.meta_step import MetaTraining
from secateur.meta_training.outcomes import Outcome
from secateur.meta_training.paper import run as run_to_the_end
from secateur.meta_training.paper import train_meta_pruner
from secateur.meta_training.runs import Log, latest_checkpoint
from secateur.meta_training.subjects import Subject
from secateur.pruners.map_network import MetaPruner
from secateur.relations import gated_representations, relational_kl
from secateur.scorers.score import score
from secateur.scorers.smp import SmpScorer
from secateur.sites.attention import find_sites
from secateur.support.durations import duration
from secateur.texts.data import Task
from secateur.units.select import select
from tests.support.meta import SMALL, TASKS, subject, training
from tests.support.processes import command, launched
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer


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


def gradients(accelerator, signal):
    tasks = [Task("singles", tiny_texts(20)), Task("pairs", tiny_texts(20, seed=1, pairs=True))]
    config = MetaTrainingConfig(batch_size=4, batches_per_step=4, signal=signal)
    run = MetaTraining([Subject(tiny_model("bert"), tiny_tokenizer())], tasks, config, accelerator)
    run.gradients(0)
    return {name: parameter.grad.contiguous() for name, parameter in run.pruner.named_parameters()}


def write_gradients(accelerator, folder, signals):
    for signal in signals:
        found = gradients(accelerator, signal)
        if accelerator.is_main_process:
            file = folder / f"{signal}.safetensors"
            save_file(found, file, metadata={"processes": str(accelerator.num_processes)})


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork: every process would import")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_give_the_gradients_of_one(tmp_path, one_thread):
    signals = ["straight_through", "leave_one_out"]
    launched(2, write_gradients, tmp_path, signals)
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


def test_the_judge_looks_at_every_model_and_cuts_as_a_pruning_would():
    run, subjects = training(), [subject(), subject("llama")]
    part = HeldOut(Task("dev", tiny_texts(12, seed=9)), 4, 8)
    judge = Judge(subjects, [part], 0.5, 16)
    found = judge.of_pruner(run.pruner)
    assert run.pruner.training
    assert judge.of_pruner(run.pruner) == found
    for number, who in enumerate(subjects, 1):
        sites, texts = find_sites(who.model), part.task.texts
        batch = who.batch(texts[4:], 16)
        for scorer, losses in (
            (SmpScorer(copy.deepcopy(run.pruner)), found),
            ("contribution", judge.of_contribution()),
        ):
            mask = select(score(who.model, texts[:4], scorer, who.tokenizer), 0.5)
            gates = {site: row.float() for site, row in mask.present(sites).items()}
            dense, cut = (gated_representations(who.model, batch, g, False) for g in ({}, gates))
            assert losses[f"dev, model {number}"] == pytest.approx(float(relational_kl(dense, cut)), rel=1e-4)
            for site, row in gates.items():  # heads that share keys and values go together, or as many of each
                assert len(set(row.view(sites[site].num_groups, -1).sum(dim=1).tolist()) - {0}) == 1
    assert Judge(subjects[:1], [part], 0.5, 16).of_pruner(run.pruner) == {"dev": found["dev, model 1"]}
    with pytest.raises(InvalidInputError, match="held-out task dev has 5 texts, fewer than 35"):
        HeldOut(Task("dev", tiny_texts(5)))


def test_the_best_pruner_is_kept(tmp_path, monkeypatch, capsys):
    kl, seen = iter([0.5, 0.3, 0.4, 0.3]), []

    def look(_, pruner):
        seen.append({name: value.clone() for name, value in pruner.state_dict().items()})
        return {"dev": next(kl)}

    monkeypatch.setattr(Judge, "of_pruner", look)
    run = training(steps=3, evaluate_every=1)
    run_to_the_end(run, tmp_path, [HeldOut(Task("dev", tiny_texts(10, seed=5)), 4, 6)])
    outcome = Outcome.read(tmp_path)
    assert [look.step for look in (outcome.start, outcome.best, outcome.last)] == [0, 1, 3]
    assert set(outcome.contribution) == {"dev"}
    best = MetaPruner.from_pretrained(tmp_path / "best").state_dict()
    assert all(torch.equal(value, best[name]) for name, value in seen[1].items())
    assert not torch.equal(best["main.0.weight"], run.pruner.main[0].weight)
    assert "for the 2 updates that are left" in capsys.readouterr().err


def test_durations_are_said_in_a_persons_unit():
    found = [duration(seconds) for seconds in (0.1, 89, 100, 5399, 5400, 14_000, 363_000)]
    assert found == ["1 s", "89 s", "2 min", "90 min", "1.5 h", "3.9 h", "101 h"]


def run_by_another_clock(accelerator, folder):
    """All but the main process think that there is time left for ever."""
    if not accelerator.is_main_process:
        paper.time = SimpleNamespace(perf_counter=lambda: 0.0)
    tasks = [Task("singles", tiny_texts(20))]
    config = MetaTrainingConfig(**{**SMALL, "steps": 3})
    run = MetaTraining([Subject(tiny_model("bert"), tiny_tokenizer())], tasks, config, accelerator)
    accelerator.end_training = lambda: None  # `launched` does it
    run_to_the_end(run, folder, progress=False, stop_after=1e-9)
    (folder / f"steps-{accelerator.process_index}").write_text(str(run.step))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork: every process would import")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_main_process_decides_for_all_when_time_is_up(tmp_path, one_thread):
    launched(2, run_by_another_clock, tmp_path)
    assert [(tmp_path / f"steps-{rank}").read_text() for rank in range(2)] == ["1", "1"]


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
        ({"task_power": -1}, "`task_power` must be at least 0"),
        ({"task_sizes": (3, 0)}, "`task_sizes` must hold a whole number from 1 for each task"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        MetaTrainingConfig(**settings)


def test_tasks_and_models_that_cannot_be_trained_on():
    with pytest.raises(InvalidInputError, match="task few has 3 texts, fewer than one batch of 60"):
        MetaTraining([subject()], [Task("few", tiny_texts(3))], MetaTrainingConfig(), Accelerator(cpu=True))
    with pytest.raises(InvalidInputError, match="`task_sizes` must hold a size for each of the 2 tasks"):
        training(task_sizes=(7,))


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


def test_a_run_on_another_model_or_other_texts_does_not_go_on(tmp_path):
    def go(who, tasks, steps=2):
        config = MetaTrainingConfig(**{**SMALL, "steps": steps})
        return train_meta_pruner(
            [who], tasks, tmp_path / "run", config, resume=True, progress=False, accelerator=Accelerator(cpu=True)
        )

    go(subject(), TASKS, 1)
    other = subject()
    with torch.no_grad():
        other.model.encoder.layer[1].output.dense.weight[-1, -1] += 1  # a single number, and not the first
    with pytest.raises(CheckpointError, match=r"was made with models = .*choose another folder with --out"):
        go(other, TASKS)
    changed = [Task(TASKS[0].name, [*TASKS[0].texts[:-1], TASKS[0].texts[0]]), *TASKS[1:]]
    with pytest.raises(CheckpointError, match=rf"was made with tasks = \['{TASKS[0].name}, .*choose another folder"):
        go(subject(), changed)
    (tmp_path / "run" / "settings.json").unlink()  # a run from before there was this file goes on
    go(subject(), TASKS)
    assert latest_checkpoint(tmp_path / "run").name == "checkpoint-2"


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
        (["--task-sizes", "3,0"], "must be whole numbers from 1 with commas, got 3,0"),
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
    out = capsys.readouterr().out
    assert "best (" in out
    assert f"best: {tmp_path / 'run' / 'best'}, after " in out
    assert [r["step"] for r in rows(tmp_path / "run") if "losses" in r] == [1, 2, 3]
