"""What a joint run is made of, in a file of its folder by which it is known again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError, invalid
from secateur.meta_training.contents import check_same, contents
from secateur.meta_training.joint_config import JointTrainingConfig
from secateur.meta_training.subjects import Subject
from secateur.support.files import read_json, write_text
from secateur.support.run_files import SETTINGS
from secateur.texts.data import Task


def settle(out: Path, subjects: Sequence[Subject], tasks: Sequence[Task], config: JointTrainingConfig) -> None:
    """Write what the run is made of, or check that it is what the folder holds; samples alone may be added.

    A folder whose models were known by less than all of their numbers, as in earlier versions, is refused.
    """
    wanted = {**contents(subjects, tasks), **_saved(config)}
    file = out / SETTINGS
    if file.is_file():
        there = read_json(file)
        there = {"search": 0, **there} if isinstance(there, dict) else {}  # earlier versions knew no search
        if not set(wanted) <= set(there) or type(there["samples"]) is not int:
            raise CheckpointError(f"{file} is of no run of this kind; choose another folder")
        check_same(out, there, {name: value for name, value in wanted.items() if name != "samples"})
        if config.samples < there["samples"]:
            raise invalid("samples", f"be at least the {there['samples']} of the run in {out}", config.samples)
    write_text(file, json.dumps(wanted, indent=1))


def _saved(config: JointTrainingConfig) -> dict[str, Any]:
    """Return the settings by the names that the file has for them; one is the command line's."""
    return {"judges" if name == "evaluation_batches" else name: value for name, value in asdict(config).items()}
