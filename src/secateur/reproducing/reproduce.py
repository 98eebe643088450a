"""The paper's experiment in one folder: a pruner is meta-trained, and its masks are set beside others fine-tuned."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from secateur.comparing.compare import compare, default_jobs
from secateur.comparing.folder import rows_by_run
from secateur.comparing.plan import Settings, plan
from secateur.comparing.splits import check_tasks, splits
from secateur.demo import demo_model, demo_task
from secateur.errors import InvalidInputError, invalid
from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.held_out import HeldOut
from secateur.meta_training.paper import train_meta_pruner
from secateur.meta_training.runs import latest_checkpoint
from secateur.meta_training.subjects import Subject
from secateur.models.loading import load_model, load_tokenizer
from secateur.reproducing.forecast import Splits, comparison_seconds, meta_training_seconds, pass_seconds
from secateur.reproducing.scales import SCALES, SCORERS
from secateur.scorers.smp import load_pruner
from secateur.support.durations import duration
from secateur.support.files import LOCK, is_taken, one_run, read_json, write_text
from secateur.support.run_files import CHECKPOINT, COMPARISON, DATA, META_TRAINING, PRUNER, SETTINGS


@dataclass(frozen=True)
class Reproduction:
    """What a folder holds a reproduction of: a scale, with the places of its model, tasks and pruner (None: its own).

    No tasks: the demo's sentences, which are written into the folder.
    """

    scale: str
    model: str
    meta_tasks: tuple[str, ...]
    tasks: tuple[str, ...]
    pruner: str | None = None

    @classmethod
    def of(
        cls, scale: str, model: str | None = None, data: Sequence[str] = (), pruner: str | None = None
    ) -> Reproduction:
        """Return a scale's reproduction, or one of another model or of other tasks, which are learned and compared on.

        Raises `InvalidInputError` for an unknown scale, and where the demo's model is meant and not installed.
        """
        if scale not in SCALES:
            raise invalid("scale", f"be one of {', '.join(SCALES)}", scale)
        chosen = SCALES[scale]
        place = model or chosen.model or str(demo_model())
        return cls(scale, place, tuple(data) or chosen.meta_tasks, tuple(data) or chosen.tasks, pruner)


def reproduce(
    wanted: Reproduction,
    out: str | Path,
    *,
    jobs: int | None = None,
    device: torch.device | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Meta-train, then compare; go on where the folder was left, and return the rows of the comparison.

    `out` gets `meta-training/`, as `train_meta_pruner` writes it (not where a pruner is given), and `comparison/`, as
    `compare` does, with `jobs` runs at once. With `progress` standard error says beforehand what will be done, and
    about how long it takes.

    Raises `InvalidInputError` where `out` holds something else or another reproduction, and for more processes than
    one; and whatever its two parts raise, which keep what they had done.
    """
    out, device = Path(out).absolute(), device or torch.device("cpu")
    accelerator = Accelerator(cpu=device.type == "cpu")
    if accelerator.num_processes > 1:
        raise InvalidInputError(
            "`reproduce` runs in one process; start `meta-train` in several, and give what it made with --pruner"
        )
    check_folder(out, wanted)
    # What may be wrong is read before the folder gets anything.
    subject = Subject(load_model(wanted.model, accelerator.device), load_tokenizer(wanted.model))
    if wanted.pruner is not None:
        load_pruner(wanted.pruner)
    check_tasks(list(dict.fromkeys([*wanted.meta_tasks, *wanted.tasks])))
    with one_run(out / LOCK, out):
        write_text(out / SETTINGS, json.dumps(asdict(wanted), indent=1))
        places = list(wanted.tasks) or [_write_demo_task(out, SCALES[wanted.scale].demo_dev_texts)]
        meta_places = list(wanted.meta_tasks) or places
        jobs = jobs or default_jobs(device, 1)
        settings = _comparison(wanted, out, places)
        tasks = {place: splits(place) for place in dict.fromkeys([*meta_places, *places])}
        if progress:
            _announce(wanted, out, subject, tasks, meta_places, settings, jobs)
        if wanted.pruner is None:
            train_meta_pruner(
                [subject],
                [tasks[place][0] for place in meta_places],
                out / META_TRAINING,
                _meta_training(wanted),
                held_out=[HeldOut(tasks[place][1]) for place in meta_places],
                resume=is_taken(out / META_TRAINING),
                progress=progress,
                accelerator=accelerator,
            )
        del subject, tasks  # the comparison reads them anew, run by run
        return compare(settings, out / COMPARISON, jobs=jobs, device=str(device), progress=progress)


def check_folder(out: Path, wanted: Reproduction) -> None:
    """Raise `InvalidInputError` for a folder that holds anything but this reproduction."""
    if not is_taken(out):
        return
    file, content = out / SETTINGS, json.loads(json.dumps(asdict(wanted)))
    found = read_json(file) if file.is_file() else None
    if not isinstance(found, dict) or set(found) != set(content):
        raise invalid("out", "be a new folder, or one with a reproduction to go on with", str(out))
    names = [name for name, value in content.items() if found[name] != value]
    if names:
        raise InvalidInputError(f"{out} holds a reproduction with other {', '.join(names)}; choose another folder")


def _write_demo_task(out: Path, dev_texts: int) -> str:
    """Write the demo's sentences where both parts read them, and return the place."""
    train, dev = demo_task()
    place = out / DATA / train.name
    for split, task in (("train", train), ("dev", dev.head(dev_texts))):
        assert task.labels is not None
        rows = zip(task.texts, task.labels, strict=True)
        lines = (json.dumps({"sentence": text, "label": label}) for text, label in rows)
        write_text(place / f"{split}.jsonl", "\n".join(lines) + "\n")
    return str(place)


def _announce(
    wanted: Reproduction,
    out: Path,
    subject: Subject,
    tasks: Splits,
    meta_places: Sequence[str],
    settings: Settings,
    jobs: int,
) -> None:
    """Say what is left to do, and about how long it takes."""
    config, runs = _meta_training(wanted), plan(settings)
    last, there = latest_checkpoint(out / META_TRAINING), rows_by_run(out / COMPARISON)
    done = 0 if last is None else int(last.name.removeprefix(CHECKPOINT))
    steps = config.steps - done if wanted.pruner is None else 0
    missing = [run for run in runs if run not in there]
    lines = [f"{wanted.scale}: {SCALES[wanted.scale].about}"]
    passes = pass_seconds(subject, tasks, settings.training.max_length) if steps or missing else {}
    names = {place: task.name for place, (task, _) in tasks.items()}
    if wanted.pruner is not None:
        lines.append(f"1. the pruner is {wanted.pruner}")
    else:
        seconds = meta_training_seconds(subject, passes, meta_places, config, steps) if steps else 0.0
        lines.append(
            f"1. meta-train a pruner on {wanted.model}: {steps} of {config.steps} updates of "
            f"{config.batches_per_step} x {config.batch_size} texts, signal {config.signal}, "
            f"tasks {', '.join(names[place] for place in meta_places)}{_about(seconds)}"
        )
    seconds = comparison_seconds(passes, tasks, settings, missing, jobs, subject.model.device.type) if missing else 0.0
    lines.append(
        f"2. drop half of every layer's heads by {', '.join(settings.scorers)}, and fine-tune beside the dense model: "
        f"{len(missing)} of {len(runs)} runs, {jobs} at once, tasks "
        f"{', '.join(names[place] for place in settings.data)}{_about(seconds)}"
    )
    tqdm.write("\n".join(lines), file=sys.stderr)


def _about(seconds: float) -> str:
    return f"; roughly {duration(seconds)}" if seconds else ""


def _meta_training(wanted: Reproduction) -> MetaTrainingConfig:
    return MetaTrainingConfig(**SCALES[wanted.scale].meta_training)


def _comparison(wanted: Reproduction, out: Path, places: Sequence[str]) -> Settings:
    scale = SCALES[wanted.scale]
    return Settings(
        wanted.model, tuple(places), SCORERS, seeds=scale.seeds, protocol=scale.protocol, num_texts=scale.num_texts,
        pruners={"smp": wanted.pruner or str(out / META_TRAINING / PRUNER)}, max_train=scale.max_train,
        learning_rate=scale.learning_rate, epochs=scale.epochs,
    )  # fmt: skip
