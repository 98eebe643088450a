"""The readers of what runs leave in their folders: pages, and runs that go on. See readers.py."""

import json
import shutil
from functools import cache, partial
from types import SimpleNamespace

import torch

from secateur.cli.tables import comparison_table
from secateur.comparing.folder import owned, rows_by_run
from secateur.comparing.plan import Settings
from secateur.comparing.run import read_scores
from secateur.comparing.summary import summarise
from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.contents import settle_contents
from secateur.meta_training.joint_config import JointTrainingConfig
from secateur.meta_training.joint_settings import settle
from secateur.meta_training.outcomes import Outcome
from secateur.meta_training.runs import Log, load_checkpoint, save_checkpoint
from secateur.meta_training.sample import Sample
from secateur.pruners.evidence import Evidence
from secateur.pruners.features import FEATURES
from secateur.pruners.map_network import MetaPruner
from secateur.pruners.writes import FINGERPRINT
from secateur.pruning_steps import Steps, kept_steps
from secateur.pruning_work import Pruning
from secateur.report import render_report
from secateur.report.reading import read_runs
from secateur.reproducing.reproduce import Reproduction, check_folder
from secateur.units.masks import Mask
from secateur.units.scores import Scores
from tests.support.fuzzing import Reader
from tests.support.report_data import comparison_rows, pruning_json, write_comparison, write_pruned

QUALITY = {"num_texts": 8, "agreement": 0.9, "cosine": 0.95, "relational_kl": 0.1}
ABOUT = {
    "budget": [{"asked": "macs <= 0.5", "reached": 0.4}, {"asked": "latency <= 0.5", "reached": 0.45}],
    "units": {"heads": [4, 2], "neurons": [8, 4]}, "quality": QUALITY, "reconstruction": [0.2, 0.1],
    "blocks": {
        "layer.0.mlp": {"kind": "neurons", "of": 8, "kept": 4}, "layers": {"kind": "layers", "of": 2, "kept": 1},
    },
    "distillation": [0.2, 0.1], "steps": 10, "left_out": ["not reconstructed: too few texts"],
}  # fmt: skip


def dump(file, data):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data))


def page(*runs):
    html = render_report(read_runs(runs))
    assert html.endswith("</html>\n") or "</html>" in html


def write_pruned_folder(folder):
    write_pruned(folder / "run", sites=1, heads=3, **ABOUT)
    dump(folder / "run" / "distillation.json", {"relational_kl": [0.2, 0.1], "steps": 10, "texts": 20})
    dump(folder / "run" / "config.json", {"architectures": ["BertModel"], "head_pruning": {}})


def read_page(folder, name):
    page(folder / "run")


def write_demo(folder):
    pruning = pruning_json(sites=1, heads=3, **ABOUT)
    rows = [
        {"name": name, "unit": "s", "dense": 1.0, "pruned": 0.5}
        for name in ("latency, 8 x 128", "fine-tuning", "accuracy")
    ]
    result = {
        "pruning": pruning,
        "rows": rows,
        "seed": 0,
        "step_seconds": {"scoring": 1.0},
        "model": "m",
        "command": "c",
    }
    dump(folder / "run" / "result.json", result)


def write_compared(folder):
    rows = [row for row in comparison_rows(("a",)) if row["ratio"] != 0.25 and row["scorer"] != "smp"]
    write_comparison(folder / "run", rows, restore="distill", steps=5)
    write_comparison(folder / "other", comparison_rows(("b",))[:2], scores=False)


def read_compared(folder, name):
    page(folder / "run", folder / "other")


COMPARED = Settings("a model", ("data/a",), ("random",))


def write_comparison_to_go_on(folder):
    with owned(folder, COMPARED, {"model a model": "0123"}):
        pass
    (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in comparison_rows(("a",))[:2]))
    scores = Scores({"layer.0": torch.arange(4.0)}).to_json()
    dump(folder / "scores" / "a-random-0.json", {**scores, "cost": {"scoring_seconds": 1.0, "peak_memory": 2}})


def go_on_comparing(folder, name):
    read_scores(folder / "scores" / "a-random-0.json")
    with owned(folder, COMPARED, {"model a model": "0123"}):
        rows = [*rows_by_run(folder).values()]
        assert not rows or comparison_table(summarise(rows)).row_count


REPRODUCED = Reproduction("smoke", "a model", ("a",), ("a",))


def write_reproduction(folder):
    settings = {"scale": "smoke", "model": "a model", "meta_tasks": ["a"], "tasks": ["a"], "pruner": None}
    dump(folder / "settings.json", settings)


def go_on_reproducing(folder, name):
    check_folder(folder, REPRODUCED)


def write_joint_run(folder):
    settle(folder, [], [], JointTrainingConfig())


def go_on_joint_run(folder, name):
    settle(folder, [], [], JointTrainingConfig())


def write_meta_contents(folder):
    settle_contents(folder, [], [])


def go_on_meta_contents(folder, name):
    settle_contents(folder, [], [])


LOOKS = [
    {"step": 0, "held_out": {"a": 0.5, "b": 0.7}, "contribution": {"a": 0.4, "b": 0.4}},
    {"step": 1, "task": "a", "loss": 0.3},
    {"step": 2, "held_out": {"a": 0.4, "b": 0.6}},
]


def write_log(folder):
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LOOKS))


def read_log(folder, name):
    outcome = Outcome.read(folder)
    for look in () if outcome is None else (outcome.start, outcome.best, outcome.last):
        assert f"{look.step:,} {look.mean:.4f}"
    Log(folder / name, 1)


ADAM = MetaTrainingConfig(optimizer="adam")


@cache
def meta_training():
    torch.manual_seed(0)
    pruner = MetaPruner()
    return pruner, torch.optim.Adam(pruner.parameters(), 0.1)


def step():
    pruner, optimizer = meta_training()
    for parameter in pruner.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return pruner, optimizer


def write_state(folder):
    save_checkpoint(folder, 1, *step(), ADAM)


def read_state(folder, name):
    assert load_checkpoint(folder / "checkpoint-1", *meta_training(), ADAM) >= 0
    step()


def write_sample(folder):
    torch.manual_seed(0)
    evidence = Evidence(
        torch.rand(3, len(FEATURES)), torch.eye(3), {"a": 2, "b": 1}, fingerprints=torch.rand(3, FINGERPRINT)
    )
    masks, sets = torch.rand(2, 3) > 0.5, torch.tensor([0, 1])
    sample = Sample("m", "t", evidence, masks, torch.rand(2), sets, masks, torch.tensor([True, False]))
    sample.save(folder / "0-0-0.safetensors")


def read_sample(folder, name):
    sample = Sample.load(folder / name)
    sample.save(folder / "again")
    assert sample.evidence.split(sample.evidence.features[:, 0]).keys() == sample.evidence.heads.keys()
    assert len(sample.evidence.site_numbers) == sample.masks.shape[1]


def write_steps(folder):
    """What a killed pruning keeps: its scores and mask, what it refitted, and how far the training is."""
    mask = {"facts": {"requested_ratio": 0.5, "refinement": [0.2, 0.1], "scoring_seconds": 1.0}}
    mask["scores"] = Scores({"a": torch.tensor([0.5, 1.0])}).to_json()
    mask["mask"] = Mask({"a": torch.tensor([True, False])}).to_json()
    place = folder / "steps" / "training" / "checkpoint-2"
    dump(place / "trainer_state.json", {"global_step": 2, "epoch": 0.5, "log_history": [], "max_steps": 4})
    (place / "whole").touch()
    dump(folder / "steps" / "about.json", {"model": "a"})
    kept = Steps(folder / "steps")
    kept.write("mask", mask)
    kept.write("refit", [0.2, 0.1], {"weight": torch.ones(2, 3)})


def go_on_pruning(folder, name):
    here = folder / "here"
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(folder / "steps", here)
    with kept_steps(here, {"model": "a"}) as kept:
        there = kept.names()
        assert {*there} <= {"mask", "refit", "training"}
        base = SimpleNamespace(base=torch.nn.Linear(3, 2))
        run = SimpleNamespace(
            kept=kept, facts={}, similarity=None, note=lambda *_: None, prepared=base, restore="distill"
        )
        run._note_refit = partial(Pruning._note_refit, run)
        run.record = {}
        if kept.read("mask") is not None:
            mask = Pruning.choose(run, None, None, {})
            assert f"{run.facts.get('scoring_seconds', 0.0):.1f} {mask}"
        if kept.read("refit") is not None:
            Pruning.reconstruct(run, None)
            assert f"{run.facts['reconstruction'][0]:.4f}"


GO_ON_FILES = ("settings.json", "runs.jsonl", "scores/a-random-0.json")
PAGE_FILES = ("run/pruning_report.json", "run/attention_maps.json", "run/distillation.json", "run/config.json")
COMPARED_FILES = ("run/runs.jsonl", "run/settings.json", "run/scores/a-random-0.json")
STEP_FILES = tuple(
    f"steps/{name}"
    for name in (
        "about.json",
        "mask.json",
        "refit.json",
        "refit.safetensors",
        "training/checkpoint-2/trainer_state.json",
    )
)
STATE_FILES = ("checkpoint-1/state.json", "checkpoint-1/state.safetensors")
RUN_READERS = [
    Reader("a pruned folder, for a page", write_pruned_folder, PAGE_FILES, read_page),
    Reader("a demo's folder, for a page", write_demo, ("run/result.json",), read_page),
    Reader("a comparison's folder, for a page", write_compared, COMPARED_FILES, read_compared),
    Reader("the steps of a killed pruning", write_steps, STEP_FILES, go_on_pruning),
    Reader("a comparison's folder, to go on", write_comparison_to_go_on, GO_ON_FILES, go_on_comparing),
    Reader("a reproduction's folder, to go on", write_reproduction, ("settings.json",), go_on_reproducing),
    Reader("a joint pruner's fitting, to go on", write_joint_run, ("settings.json",), go_on_joint_run),
    Reader("a meta-training's contents, to go on", write_meta_contents, ("settings.json",), go_on_meta_contents),
    Reader("a meta-training's log", write_log, ("log.jsonl",), read_log),
    Reader("a meta-training's state, to go on", write_state, STATE_FILES, read_state),
    Reader("a sample of a joint pruner", write_sample, ("0-0-0.safetensors",), read_sample),
]
