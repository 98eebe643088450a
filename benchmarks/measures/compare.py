"""A comparison of scorers after fine-tuning, by `secateur compare`, whose flags are the settings.

Takes minutes to days; a stopped run goes on where it stopped, from the folder --work. Writes the rows of all runs.
{fits} in a flag becomes the folder of the fits without each task.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

from benchmarks.runs import Run

from secateur.demo import demo_model


def measure(run: Run, **flags: Any) -> None:
    command = [sys.executable, "-m", "secateur.cli", "compare", "--model", str(demo_model()), "--out", str(run.work)]
    command += ["--threads", str(run.threads), "--jobs", str(run.jobs), "--seeds", str(len(run.seeds))]
    for task in run.tasks:
        command += ["--data", str(run.glue / task)]
    for flag, value in flags.items():
        for one in value if isinstance(value, list) else [value]:
            text = str(one).replace("{fits}", str(run.fits)) if run.fits else str(one)
            if "{fits}" in text:
                run.unseen("")  # says what is missing
            command += [f"--{flag}"] if one is True else [f"--{flag}", text]
    subprocess.run(command, check=True)
    shutil.copyfile(run.work / "runs.jsonl", run.out)
