"""Teaching a joint pruner models that it has not seen: trials of masks in a folder, and the pruner fitted on them.

Each sample's draws come from (seed, number of the model, of the task, and of the sample), and from the second on its
masks lie near what all samples before have taught; so a run may be stopped at any time, and any number of processes
collect the same.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from secateur.choosing.search import MaskLoss
from secateur.errors import CheckpointError, InvalidInputError, invalid
from secateur.meta_training.joint import BESIDE_FOUND, FitConfig, Sample, TrialConfig, collect, fit, remember
from secateur.meta_training.runs import held_run
from secateur.meta_training.subjects import Subject, check_subjects, check_tasks
from secateur.models.state import evaluation_mode
from secateur.pruners.evidence import contribution_scores, gather_evidence
from secateur.pruners.joint_network import JointPruner
from secateur.pruners.tokens import special_ids_of
from secateur.relations import RELATED
from secateur.sites.attention import find_sites
from secateur.support.checks import check_accelerator, check_flag, check_path, check_seed, check_whole
from secateur.support.files import is_taken, read_json, replaced_folder, write_text
from secateur.support.randomness import generator
from secateur.texts.data import Task
from secateur.units.masks import PresentMask
from secateur.units.scores import PresentScores
from secateur.units.select import Allocation, select

ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "ranking")
SETTINGS = "settings.json"
_FEWEST_SCORED = 4
_ALIKE = 1e-3  # losses beside one mask's are around 1
_JUDGED_HELD_OUT = 128


@dataclass(frozen=True)
class JointTrainingConfig:
    """Settings of teaching a joint pruner.

    samples: of each model and task; the masks of a later one lie near what the earlier ones have taught. num_texts:
    texts that give a sample's evidence. search: exchanges of heads by which the best masks are searched for, in place
    of masks at random and near what scores choose; the pruner learns them, and remembers them of the models. judges:
    batches of other texts, of which each mask meets one, and the masks of a search two; fewer where a task has too few
    texts. batch_size: texts a batch. max_length: tokens a text. bf16: judge masks by a copy of the model in bfloat16,
    which is faster where the device has it, and far slower on a CPU that has not.
    """

    samples: int = 2
    search: int = 0
    num_texts: int = 96
    judges: int = 8
    batch_size: int = 32
    max_length: int = 128
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("samples", self.samples)
        check_whole("search", self.search, 0)
        check_whole("num_texts", self.num_texts, _FEWEST_SCORED)
        check_whole("judges", self.judges)
        check_whole("batch_size", self.batch_size, RELATED)
        check_whole("max_length", self.max_length, 4)
        check_flag("bf16", self.bf16)
        check_seed(self.seed)


def train_joint_pruner(
    subjects: Sequence[Subject],
    tasks: Sequence[Task],
    out: str | Path,
    config: JointTrainingConfig | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> JointPruner:
    """Teach a new joint pruner one or more frozen models on the texts of one or more tasks; labels play no part.

    `out` gets `samples/`, which a run that goes on with `resume` does not collect again, and at the end `pruner/`, for
    `score(…, scorer="smp-plus", pruner=…)`. A sample takes about 270 gated passes over a batch. More `samples`
    may be asked for when a run goes on; other settings, models and tasks may not change. The processes of
    `accelerator`, if any, collect a share of the samples each.

    Raises `InvalidInputError` for tasks with too few texts and for a folder that is taken, `CheckpointError` for a run
    of other settings.
    """
    config = JointTrainingConfig() if config is None else config
    check_subjects(subjects)
    check_tasks(tasks)
    if not isinstance(config, JointTrainingConfig):
        raise invalid("config", "be a JointTrainingConfig", config)
    check_flag("resume", resume)
    check_flag("progress", progress)
    check_accelerator(accelerator)
    _check_texts(tasks, config)
    out, accelerator = check_path("out", out), accelerator or Accelerator()
    if accelerator.is_main_process and is_taken(out):
        if not resume:
            raise invalid(
                "out", "be a new or empty folder", str(out), "resume the run that is there, or choose another"
            )
        if not (out / SETTINGS).is_file():
            raise invalid("out", "be a new folder, or one with a run to go on with", str(out))
    with held_run(out) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            _settle(out, subjects, tasks, config)
            if resume and progress:
                there = len(list((out / "samples").glob("*.safetensors")))
                count = config.samples * len(subjects) * len(tasks)
                tqdm.write(f"going on: {there} of {count} samples are there", file=sys.stderr)
        accelerator.wait_for_everyone()
        samples: list[Sample] = []
        for number in range(config.samples):
            earlier = _fitted(samples, config) if samples else None
            samples += _collected(subjects, tasks, out / "samples", config, number, earlier, accelerator, progress)
        pruner = _fitted(samples, config)
        if accelerator.is_main_process:
            with replaced_folder(out / "pruner") as folder:
                pruner.save_pretrained(folder)
    return pruner


def _check_texts(tasks: Sequence[Task], config: JointTrainingConfig) -> None:
    fewest = config.num_texts + config.batch_size
    for task in tasks:
        if len(task) < fewest:
            raise InvalidInputError(
                f"task {task.name} has {len(task)} texts, fewer than the {fewest} that a sample takes: `num_texts` "
                f"({config.num_texts}) for evidence and a batch ({config.batch_size}) that judges masks; give more "
                "texts, or lower either"
            )


def _settle(out: Path, subjects: Sequence[Subject], tasks: Sequence[Task], config: JointTrainingConfig) -> None:
    """Write what the run is made of, or check that it is what the folder holds; samples alone may be added."""
    wanted = {
        "models": [f"{type(subject.model).__name__} {_digest_of_model(subject)}" for subject in subjects],
        "tasks": [f"{task.name}, {len(task)} texts {_digest(repr(task.texts).encode())}" for task in tasks],
        **asdict(config),
    }
    file = out / SETTINGS
    if file.is_file():
        found = read_json(file)
        found = {"search": 0, **found} if isinstance(found, dict) else {}  # earlier versions knew no search
        if not set(wanted) <= set(found):
            raise CheckpointError(f"{file} is of no run of this kind; choose another folder")
        for name in sorted(set(wanted) - {"samples"}):
            if found[name] != wanted[name]:
                raise CheckpointError(
                    f"{out} was made with {name} = {found[name]!r}, not {wanted[name]!r}; go on with the same, or "
                    "choose another folder"
                )
        if config.samples < found["samples"]:
            raise invalid("samples", f"be at least the {found['samples']} of the run in {out}", config.samples)
    write_text(file, json.dumps(wanted, indent=1))


def _digest_of_model(subject: Subject) -> str:
    """Tell a model from others, wherever it was loaded from: by the first numbers of every weight."""
    parts = []
    for name, value in subject.model.state_dict().items():
        if not isinstance(value, Tensor) or value.is_meta:
            continue
        first = value.flatten()[:16].double().cpu().numpy().tobytes()  # exact from any dtype, on any device
        parts.append(f"{name} {tuple(value.shape)} ".encode() + first)
    return _digest(*parts)


def _digest(*parts: bytes) -> str:
    return hashlib.blake2b(b"".join(parts), digest_size=6).hexdigest()


def _collected(
    subjects: Sequence[Subject],
    tasks: Sequence[Task],
    folder: Path,
    config: JointTrainingConfig,
    number: int,
    earlier: JointPruner | None,
    accelerator: Accelerator,
    progress: bool,
) -> list[Sample]:
    """Return the samples of one number of every model and task, after collecting those that are not there."""
    cells = {
        folder / f"{i}-{j}-{number}.safetensors": (i, j) for i, j in product(range(len(subjects)), range(len(tasks)))
    }
    mine = list(cells.items())[accelerator.process_index :: accelerator.num_processes]
    missing = [(path, cell) for path, cell in mine if not path.is_file()]
    trials, rankings = TrialConfig(search=config.search), 1 if earlier is None else 3
    counts = [min(config.judges, (len(task) - config.num_texts) // config.batch_size) for task in tasks]
    total = sum(trials.passes(rankings, counts[j]) for _, (_, j) in missing)
    name = f"sample {number + 1} of {config.samples}"
    with tqdm(total=total, desc=name, unit="mask", disable=not (progress and accelerator.is_main_process)) as bar:
        for i, group in groupby(missing, key=lambda item: item[1][0]):
            model = subjects[i].model
            with evaluation_mode(model):
                judge = deepcopy(model).to(torch.bfloat16) if config.bf16 else model
                for path, (_, j) in group:
                    seed = generator(config.seed, i, j, number).initial_seed()
                    _sample(subjects[i], judge, tasks[j], config, trials, counts[j], seed, earlier, bar).save(path)
    accelerator.wait_for_everyone()
    return [Sample.load(path) for path in cells]


def _sample(
    subject: Subject,
    judge: PreTrainedModel,
    task: Task,
    config: JointTrainingConfig,
    trials: TrialConfig,
    judges: int,
    seed: int,
    earlier: JointPruner | None,
    bar: Any,
) -> Sample:
    """Collect one sample; `judge` is the model that judges masks, one batch at a time, of `judges` batches."""
    texts = task.head(config.num_texts + judges * config.batch_size, seed).texts
    evidence = subject.batches(texts[: config.num_texts], config.batch_size, config.max_length)
    judging = subject.batches(texts[config.num_texts :], config.batch_size, config.max_length)
    losses = [_Counted(judge, [batch], task.is_pair, bar) for batch in judging]
    sites = find_sites(subject.model)
    about = subject.model.name_or_path, task.name
    sample = collect(subject.model, sites, evidence, losses, task.is_pair, *about, trials, seed, earlier)
    if all(float(sample.losses[sample.groups == group].std()) < _ALIKE for group in sample.groups.unique()):
        raise InvalidInputError(
            f"masks all cost the same on the texts of task {task.name}, so there is nothing to learn; give texts that "
            "differ from each other"
        )
    return sample


class _Counted(MaskLoss):
    def __init__(self, model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], is_pair: bool, bar: Any) -> None:
        super().__init__(model, batches, is_pair)
        self.bar = bar

    def __call__(self, mask: PresentMask) -> float:
        self.bar.update()
        return super().__call__(mask)


def _fitted(samples: Sequence[Sample], config: JointTrainingConfig) -> JointPruner:
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        pruner = JointPruner(**(BESIDE_FOUND if config.search else {}))
    fit(pruner, samples, FitConfig(seed=config.seed))
    if config.search:
        remember(pruner, samples)
    return pruner


def check_held_out(task: Task) -> None:
    """Raise `InvalidInputError` unless the task has enough texts to judge a pruner by."""
    if len(task) < 2 * _FEWEST_SCORED:
        raise InvalidInputError(
            f"held-out task {task.name} has {len(task)} texts, fewer than {2 * _FEWEST_SCORED}; give more dev texts, "
            "or the file with the training texts alone"
        )


@torch.no_grad()
def held_out_losses(
    subject: Subject, task: Task, pruner: JointPruner, config: JointTrainingConfig | None = None, ratio: float = 0.5
) -> dict[Allocation, dict[str, float]]:
    """Return, for each allocation, the relational KL of the masks that the contribution and the joint pruner choose.

    `task` holds texts that the pruner was not taught on. Drawn with the seed, `num_texts` of them at most, and no more
    than half, give the evidence; up to 128 others judge the masks. Raises `InvalidInputError` for fewer than eight.
    """
    config = JointTrainingConfig() if config is None else config
    kinds = {"subject": Subject, "task": Task, "pruner": JointPruner, "config": JointTrainingConfig}
    for (name, kind), value in zip(kinds.items(), (subject, task, pruner, config), strict=True):
        if not isinstance(value, kind):
            raise invalid(name, f"be a {kind.__name__}", value)
    check_held_out(task)
    scored = min(config.num_texts, len(task) // 2)
    texts = task.head(scored + _JUDGED_HELD_OUT, config.seed).texts
    model, sites = subject.model, find_sites(subject.model)
    with evaluation_mode(model):
        made = subject.batches(texts[:scored], config.batch_size, config.max_length)
        evidence = gather_evidence(
            model, sites, made, task.is_pair, special_ids=special_ids_of(subject.tokenizer), maps=pruner.sees_maps
        )
        loss = MaskLoss(model, subject.batches(texts[scored:], config.batch_size, config.max_length), task.is_pair)
        groups = {name: sites[name].num_groups for name in evidence.heads}
        rankings = {"contribution": contribution_scores(evidence), "joint_pruner": pruner.eval()(evidence)}
        return {
            allocation: {
                name: loss(select(PresentScores(evidence.split(scores.double()), groups), ratio, allocation))
                for name, scores in rankings.items()
            }
            for allocation in ALLOCATIONS
        }
