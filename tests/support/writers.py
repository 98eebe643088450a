"""Every writer of the library, a row each: what puts one file in a place, and what makes a folder.

Each is called with the place and with `given`, the folder that `write_given` made.
"""

from unittest.mock import patch

import click
import pytest
import torch

import secateur
from secateur import cli
from secateur.comparing.compare import compare
from secateur.comparing.plan import Settings
from secateur.errors import SecateurError
from secateur.exporting.convert import convert
from secateur.exporting.export import export_onnx, export_standalone
from secateur.finetuning.finetune import finetune
from secateur.measuring.latency_table import LatencyTable
from secateur.meta_training.runs import held_run
from secateur.meta_training.sample import Sample
from secateur.meta_training.subjects import Subject
from secateur.pruners.evidence import Evidence
from secateur.pruners.features import FEATURES
from secateur.pruning_steps import Steps
from secateur.report import plots, write_report
from secateur.report.model_card import write_model_card
from secateur.report.reading import read_runs
from secateur.reproducing.reproduce import Reproduction, reproduce
from secateur.settings import Shape
from secateur.support.files import new_folder, write_bytes, write_text, write_together
from secateur.texts.data import Task, load_task
from secateur.units.scores import Scores
from tests.support.legacy import v4_folder
from tests.support.pruned import pruned_classifier
from tests.support.report_data import maps_of, pruning_json, write_pruned
from tests.support.tiny import tiny_classifier, tiny_model, tiny_texts, tiny_tokenizer


def write_given(folder):
    """Write what is written of: models, a task, a run."""
    for name, model in {"model": tiny_classifier("bert", 2), "pruned": pruned_classifier()}.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    v4_folder(folder / "old", {0: [1]})
    (folder / "task").mkdir()
    for split in ("train", "dev"):
        rows = [f"{text}\t{int('good' in text)}" for text in tiny_texts(48)]
        (folder / "task" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    write_pruned(folder / "run")


def command(*words):
    """Run a command line; raises its one line as a `SecateurError` where the exit code is 2."""
    said = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(click, "echo", lambda message=None, **_: said.append(str(message)))
        code = cli.main([str(word) for word in words])
    if code == 2:
        assert said[-1].startswith("secateur: error: "), said
        raise SecateurError(said[-1])
    assert code == 0, said


REPORT = []


def report():
    if not REPORT:
        REPORT.append(secateur.prune(tiny_model("bert"), scorer="random")[1])
    return REPORT[0]


def sample():
    evidence = Evidence(torch.ones(2, len(FEATURES)), torch.eye(2), {"a": 2})
    return Sample("bert", "words", evidence, torch.ones(1, 2) > 0, torch.ones(1), torch.ones(1, dtype=torch.long))


def card(folder):
    if folder.is_dir():
        (folder / "README.md").write_text("what came with the model")
        (folder / "config.json").write_text("{}")
    write_model_card(report(), folder)


def subjects():
    return [Subject(tiny_model("bert"), tiny_tokenizer())], [Task("words", tiny_texts(200))]


def short(given, *words):
    return *words, "--data", given / "task", "--max-length", 16, "--device", "cpu"


def bench(path, given):
    """Measuring takes longer than there is time, so the table is empty."""
    with patch("secateur.exporting.latency.latency_table", return_value=LatencyTable(Shape(1, 4), ())):
        command("bench", given / "model", "--device", "cpu", "--table", path)


def filled(out):
    with new_folder(out) as folder:
        (folder / "file").write_text("after")


def held(out):
    with held_run(out):
        (out / "file").write_text("after")


def settings(given):
    return Settings(str(given / "model"), (str(given / "task"),), ("random",))


# What writes one file: the name of that, and a call that is given the place and `given`.
FILES = {
    "write_text": ("file", lambda path, given: write_text(path, "after")),
    "write_bytes": ("file", lambda path, given: write_bytes(path, b"after")),
    "write_together": ("file", lambda path, given: write_together({path: b"after", path.with_name("b"): b"after"})),
    "Scores.save": ("file", lambda path, given: Scores({"a": [1.0]}).save(path)),
    "Mask.save": ("file", lambda path, given: secateur.Mask({"a": [True]}).save(path)),
    "PruningReport.save": ("file", lambda path, given: report().save(path)),
    "AttentionMaps.save": ("file", lambda path, given: maps_of(pruning_json()).save(path)),
    "Sample.save": ("file", lambda path, given: sample().save(path)),
    "Steps.write": ("mask.json", lambda path, given: Steps(path.parent).write("mask", {"a": [1]})),
    "write_report": ("file", lambda path, given: write_report(read_runs([given / "run"]), path)),
    "write_plots": ("head-map.svg", lambda path, given: plots.write_plots(read_runs([given / "run"]), path.parent)),
    "write_model_card": ("PRUNING.md", lambda path, given: card(path.parent)),
    "score --out": (
        "file",
        lambda path, given: command(*short(given, "score", given / "model"), "--scorer", "magnitude", "--out", path),
    ),
    "bench --table": ("file", bench),
    "report --out": ("file", lambda path, given: command("report", given / "run", "--out", path)),
    "report --plots": (
        "head-map.svg",
        lambda path, given: command("report", given / "run", "--out", path.with_name("p"), "--plots", path.parent),
    ),
}  # fmt: skip
# What makes a folder: a call that is given the place and `given`.
FOLDERS = {
    "new_folder": lambda out, given: filled(out),
    "write_plots": lambda out, given: plots.write_plots(read_runs([given / "run"]), out),
    "report --plots": lambda out, given: command(
        "report", given / "run", "--out", given / "page.html", "--plots", out
    ),
    "prune": lambda out, given: secateur.prune(tiny_model("bert"), scorer="magnitude", out=out),
    "prune --out": lambda out, given: command(
        *short(given, "prune", given / "model"), "--scorer", "magnitude", "--restore", "none", "--no-maps", "--out", out
    ),
    "finetune": lambda out, given: finetune(given / "model", load_task(str(given / "task"), "train"), out=out),
    "finetune --out": lambda out, given: command(*short(given, "finetune", given / "model"), "--out", out),
    "distill --out": lambda out, given: command(
        *short(given, "distill", given / "pruned", "--against", given / "model", "--steps", 1), "--out", out
    ),
    "export_standalone": lambda out, given: export_standalone(given / "pruned", out),
    "export_onnx": lambda out, given: export_onnx(given / "pruned", out),
    "export --out": lambda out, given: command("export", given / "pruned", "--format", "standalone", "--out", out),
    "convert": lambda out, given: convert(given / "old", out),
    "convert --out": lambda out, given: command("convert", given / "old", "--out", out),
    "demo --out": lambda out, given: command("demo", "--out", out),
    "train_meta_pruner": lambda out, given: secateur.train_meta_pruner(*subjects(), out),
    "meta-train --out": lambda out, given: command(
        "meta-train", "--model", given / "model", "--data", given / "task", "--batch-size", 4, "--out", out
    ),
    "train_joint_pruner": lambda out, given: secateur.train_joint_pruner(*subjects(), out),
    "joint-train --out": lambda out, given: command(
        "joint-train", "--model", given / "model", "--data", given / "task", "--texts", 4, "--out", out
    ),
    "compare": lambda out, given: compare(settings(given), out, device="cpu"),
    "compare --out": lambda out, given: command(
        "compare", "--model", given / "model", "--data", given / "task", "--scorer", "random", "--device", "cpu",
        "--out", out,
    ),
    "reproduce": lambda out, given: reproduce(
        Reproduction.of("smoke", str(given / "model"), (str(given / "task"),)), out, device=torch.device("cpu")
    ),
    "reproduce --out": lambda out, given: command(
        "reproduce", "--model", given / "model", "--data", given / "task", "--device", "cpu", "--out", out
    ),
}  # fmt: skip
# Folders that are made in a moment, so that they are made here where they may be; all others come of the same calls.
QUICK = {
    "a run that goes on": lambda out, given: held(out),
    **{name: FOLDERS[name] for name in ("new_folder", "write_plots", "report --plots", "prune")},
}
