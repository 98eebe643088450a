"""Teaching a joint pruner models that it has not seen: samples in a folder, and the pruner fitted on them.

From the second on, a sample's masks lie near what a fit on all samples before chooses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from secateur.errors import invalid
from secateur.meta_training.collecting import TrialConfig
from secateur.meta_training.fitting import BESIDE_FOUND, FitConfig, fit
from secateur.meta_training.joint_config import JointTrainingConfig
from secateur.meta_training.joint_samples import SampleFolder
from secateur.meta_training.joint_settings import SETTINGS, settle
from secateur.meta_training.remembering import remember
from secateur.meta_training.runs import check_run_folder, held_run
from secateur.meta_training.sample import Sample
from secateur.meta_training.subjects import Subject, check_subjects, check_tasks
from secateur.pruners.joint_network import JointPruner
from secateur.support.checks import check_accelerator, check_flag, check_path
from secateur.support.files import is_taken, replaced_folder
from secateur.support.processes import own_accelerator
from secateur.support.randomness import Drawn
from secateur.support.run_files import PRUNER, SAMPLES
from secateur.texts.data import Task


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
    _check(subjects, tasks, config, resume, progress, accelerator)
    out, accelerator = check_path("out", out), accelerator or own_accelerator()
    main = accelerator.is_main_process
    if main:
        _check_folder(out, resume)
    folder = SampleFolder(out / SAMPLES, subjects, tasks, config, TrialConfig(search=config.search))
    with held_run(out) if main else nullcontext():
        if main:
            settle(out, subjects, tasks, config)
            if resume and progress:
                tqdm.write(f"going on: {folder.num_there} of {folder.num_wanted} samples are there", file=sys.stderr)
        accelerator.wait_for_everyone()
        samples: list[Sample] = []
        for number in range(config.samples):
            earlier = _fitted(samples, config) if samples else None
            samples += folder.collected(number, earlier, accelerator, progress)
        pruner = _fitted(samples, config)
        if main:
            with replaced_folder(out / PRUNER) as place:
                pruner.save_pretrained(place)
    return pruner


def _check(subjects: Any, tasks: Any, config: Any, resume: Any, progress: Any, accelerator: Any) -> None:
    check_subjects(subjects)
    check_tasks(tasks)
    if not isinstance(config, JointTrainingConfig):
        raise invalid("config", "be a JointTrainingConfig", config)
    check_flag("resume", resume)
    check_flag("progress", progress)
    check_accelerator(accelerator)
    config.check_texts(tasks)


def _check_folder(out: Path, resume: bool) -> None:
    check_run_folder(out, resume)
    if is_taken(out) and not (out / SETTINGS).is_file():
        raise invalid("out", "be a new folder, or one with a run to go on with", str(out))


def _fitted(samples: Sequence[Sample], config: JointTrainingConfig) -> JointPruner:
    with Drawn(config.seed):
        pruner = JointPruner(**(BESIDE_FOUND if config.search else {}))
    fit(pruner, samples, FitConfig(seed=config.seed))
    if config.search:
        remember(pruner, samples)
    return pruner
