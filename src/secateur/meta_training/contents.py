"""What a run learns on, by which its folder is known again: the content of its models and of its tasks' texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError, shown
from secateur.meta_training.subjects import Subject
from secateur.models.model_content import fingerprint_of_model
from secateur.support.files import read_json, write_text
from secateur.support.fingerprints import fingerprint
from secateur.support.run_files import SETTINGS
from secateur.texts.data import Task


def contents(subjects: Sequence[Subject], tasks: Sequence[Task]) -> dict[str, list[str]]:
    """Return a line for each model and each task, with a fingerprint of its weights or texts; labels play no part."""
    return {
        "models": [f"{type(subject.model).__name__} {fingerprint_of_model(subject.model)}" for subject in subjects],
        "tasks": [f"{task.name}, {len(task)} texts {fingerprint([repr(task.texts).encode()])}" for task in tasks],
    }


def check_same(out: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where something of the same name differs, such as a model whose weights have changed."""
    for name in sorted(set(there) & set(wanted)):
        if there[name] != wanted[name]:
            before, now = shown(there[name], 300), shown(wanted[name], 300)
            raise CheckpointError(
                f"{out} was made with {name} = {before}, not {now}; go on with the same, or choose another folder with "
                "--out"
            )


def settle_contents(out: Path, subjects: Sequence[Subject], tasks: Sequence[Task]) -> None:
    """Write the contents into the run's folder, or check that they are those of the run that is there.

    A folder from before there was such a file counts as one of the same contents, and gets it.
    """
    file, wanted = out / SETTINGS, contents(subjects, tasks)
    there = read_json(file) if file.is_file() else {}
    if not isinstance(there, dict):
        raise CheckpointError(f"{file} is of no run of this kind; choose another folder with --out")
    check_same(out, there, wanted)
    write_text(file, json.dumps(wanted, indent=1))
