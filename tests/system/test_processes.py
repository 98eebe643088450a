"""Several processes score and prune as one does, to the last bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import secateur
from secateur import cli
from secateur.errors import InvalidInputError
from secateur.meta_training import joint_training
from secateur.meta_training.collecting import TrialConfig
from secateur.meta_training.fitting import FitConfig
from secateur.meta_training.joint_config import JointTrainingConfig
from secateur.meta_training.joint_training import train_joint_pruner
from secateur.meta_training.subjects import Subject
from secateur.settings import Cut, Reading
from secateur.texts.data import Task
from tests.support.processes import launched
from tests.support.tiny import tiny_classifier, tiny_model, tiny_texts, tiny_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = 44  # in batches of 4: 3 processes get no equal shares


def results(accelerator: Any, folder: Path) -> dict[str, Any]:
    """Return plain data of scores, masks, stops and a joint pruner taught in `folder`, exact to the last bit."""
    model, tokenizer, texts = tiny_model("bert"), tiny_tokenizer(), tiny_texts(TEXTS)
    reading = Reading(batch_size=4, accelerator=accelerator)
    common: dict[str, Any] = {"tokenizer": tokenizer, "reading": reading}
    scores = {}
    for scorer in ("contribution", "smp", "smp-plus", "leave_one_out", "relational_taylor", "random"):
        scores[scorer] = secateur.score(model, texts, scorer, **common)
    pairs = list(zip(texts, texts[1:] + texts[:1], strict=True))
    for scorer in ("matching", "smp-plus"):
        scores[f"{scorer} of pairs"] = secateur.score(model, pairs, scorer, **common)
    classifier, labels = tiny_classifier("bert", 2), [number % 2 for number in range(TEXTS)]
    for scorer in ("taylor", "fisher"):
        scores[scorer] = secateur.score(classifier, texts, scorer, labels=labels, **common)
    scores["shared layers"] = secateur.score(tiny_model("albert"), texts, **common)
    more = tiny_texts(4000, seed=1)
    scores["auto"] = secateur.score(
        model, more, "entropy", tokenizer, cut=Cut(allocation="ranking"), reading=replace(reading, stop="auto")
    )
    scores["stream"] = secateur.score(model, iter(more), tokenizer=tokenizer, reading=replace(reading, stop=61))
    found = {name: row.to_json() for name, row in scores.items()}
    smaller, report = secateur.prune(
        model, texts, cut=Cut(refine=4), restore="reconstruct", tokenizer=tokenizer,
        reading=replace(reading, maps=True),
    )  # fmt: skip
    found["prune"] = {"mask": report.mask.kept, "losses": report.refinement, "texts": report.num_texts}
    found["reconstruction"] = {
        "losses": report.reconstruction,
        "weights": smaller.state_dict()["encoder.layer.0.attention.output.dense.weight"].tolist(),
    }
    subject = Subject(tiny_model("bert"), tokenizer)
    config = JointTrainingConfig(num_texts=8, evaluation_batches=1, batch_size=4, max_length=16)
    tasks = [Task("one", texts), Task("two", pairs)]
    short = {"TrialConfig": partial(TrialConfig, near=3), "FitConfig": partial(FitConfig, epochs=5)}
    with mock.patch.multiple(joint_training, **short):
        taught = train_joint_pruner([subject], tasks, folder, config, progress=False, accelerator=accelerator)
    found["joint pruner"] = {name: value.tolist() for name, value in taught.state_dict().items()}
    try:
        secateur.score(model, texts[:8], "taylor", labels=labels[:8], **common, warmup_epochs=1)
        found["refused"] = ""
    except InvalidInputError as error:
        found["refused"] = str(error)
    return json.loads(json.dumps(found))


def write_results(accelerator: Any, out: Path) -> None:
    (out / f"{accelerator.process_index}.json").write_text(json.dumps(results(accelerator, out / "run")))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield results(None, tmp_path_factory.mktemp("alone") / "run")
    torch.set_num_threads(threads)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork: every process would import")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_several_processes_find_what_one_finds_bit_for_bit(tmp_path, alone):
    """Three: more than two, and their shares of the batches are not equal. Two are in the test of the launcher."""
    processes = 3
    launched(processes, write_results, tmp_path)
    for rank in range(processes):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.keys() == alone.keys()
        for name in alone.keys() - {"refused"}:
            assert found[name] == alone[name], (name, rank)
        assert "cannot share that among processes" in found["refused"]
    assert alone["refused"] == ""
    assert 32 < alone["auto"]["num_texts"] < 4000


def test_under_a_launcher_the_commands_share_the_scoring_teach_alike_and_write_once(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.tsv").write_text("\n".join(["sentence", *tiny_texts(53)]) + "\n")
    command = ["prune", str(tmp_path / "model"), "--data", str(tmp_path / "texts.tsv"), "--batch-size", "8", "--json"]
    command += ["--budget", "macs=0.7", "--steps", "8"]  # past the short batch at the end of an epoch
    # Several processes on one machine are what `accelerate launch` calls multi-GPU, also where it is told to use CPUs.
    start = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", str(free_port()), "-m", "secateur.cli", *command, "--out", str(tmp_path / "two"),
    ]  # fmt: skip
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(start, env={**os.environ, **settings}, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)  # one object: the main process alone prints
    assert cli.main([*command, "--out", str(tmp_path / "one")]) == 0
    expected = json.loads((tmp_path / "one" / "pruning_report.json").read_text())
    assert (report["scores"], report["kept_heads"]) == (expected["scores"], expected["kept_heads"])
    before, after = expected["distillation"]
    assert after < before  # else the weights are those from before it
    weights = "model.safetensors"
    assert (tmp_path / "two" / weights).read_bytes() == (tmp_path / "one" / weights).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "texts.tsv", "two"]
