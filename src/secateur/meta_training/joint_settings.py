"""What a joint run is made of, in a file of its folder by which it is known again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.errors import CheckpointError, invalid
from secateur.meta_training.joint_config import JointTrainingConfig
from secateur.meta_training.subjects import Subject
from secateur.support.files import read_json, write_text
from secateur.support.run_files import SETTINGS
from secateur.texts.data import Task


def settle(out: Path, subjects: Sequence[Subject], tasks: Sequence[Task], config: JointTrainingConfig) -> None:
    """Write what the run is made of, or check that it is what the folder holds; samples alone may be added."""
    wanted = {
        "models": [f"{type(subject.model).__name__} {_digest_of_model(subject)}" for subject in subjects],
        "tasks": [f"{task.name}, {len(task)} texts {_digest(repr(task.texts).encode())}" for task in tasks],
        **_saved(config),
    }
    file = out / SETTINGS
    if file.is_file():
        there = read_json(file)
        there = {"search": 0, **there} if isinstance(there, dict) else {}  # earlier versions knew no search
        if not set(wanted) <= set(there):
            raise CheckpointError(f"{file} is of no run of this kind; choose another folder")
        for name in sorted(set(wanted) - {"samples"}):
            if there[name] != wanted[name]:
                raise CheckpointError(
                    f"{out} was made with {name} = {there[name]!r}, not {wanted[name]!r}; go on with the same, or "
                    "choose another folder"
                )
        if config.samples < there["samples"]:
            raise invalid("samples", f"be at least the {there['samples']} of the run in {out}", config.samples)
    write_text(file, json.dumps(wanted, indent=1))


def _saved(config: JointTrainingConfig) -> dict[str, Any]:
    """Return the settings by the names that the file has for them; one is the command line's."""
    return {"judges" if name == "evaluation_batches" else name: value for name, value in asdict(config).items()}


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
