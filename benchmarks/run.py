"""Run an experiment: a file of benchmarks/experiments says what is measured, and with which settings.

    python -m benchmarks.run scoring_time
    python -m benchmarks.run reconstruction --data GLUE --fits FITS
    python -m benchmarks.run scoring_time --set rounds=1 --out trial.json
    python -m benchmarks.run --check

Writes benchmarks/results/NAME.json, or .jsonl for experiments that add row by row: start these again to go on. What is
published was made with the settings of the file; whoever changes them names another file with --out. --check tries
whether every file fits the function that it names, and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXPERIMENTS, RESULTS = HERE / "experiments", HERE / "results"
SHARED = ("threads", "seeds", "tasks", "device", "jobs", "note")  # settings that every experiment may have
ABOUT = ("measure", "result", "page")  # which function, which kind of file, and where the docs show it


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", help="a name of experiments/, or a file")
    parser.add_argument("--check", action="store_true", help="try whether all files are in order")
    parser.add_argument("--data", type=Path, help="a folder with one folder a task")
    parser.add_argument("--fits", type=Path, help="fits of smp-plus without each task")
    parser.add_argument("--work", type=Path, help="where a long run keeps what it has done")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device")
    parser.add_argument("--jobs", type=int, help="processes at once")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the experiment's own")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.check and options.experiment is None:
        parser.error("name an experiment: " + ", ".join(sorted(path.stem for path in EXPERIMENTS.glob("*.json"))))
    if (options.seeds or options.tasks or options.set) and options.out is None:
        parser.error("other settings than those of the published file: name another with --out")
    return options


def changed(settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return an experiment's settings with those of the command line in their place."""
    told = {name: getattr(options, name) for name in SHARED if getattr(options, name, None) is not None}
    for text in options.set:
        name, _, value = text.partition("=")
        try:
            told[name] = json.loads(value)
        except json.JSONDecodeError:
            told[name] = value
    return settings | told


def function(settings: dict[str, Any]) -> Callable[..., None]:
    """Return what measures: `measure` of a module of benchmarks/measures, or the function named after a colon."""
    module, _, name = settings["measure"].partition(":")
    return getattr(importlib.import_module(f"benchmarks.measures.{module}"), name or "measure")


def own(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are the experiment's own."""
    return {name: value for name, value in settings.items() if name not in (*SHARED, *ABOUT)}


def check() -> None:
    for path in sorted(EXPERIMENTS.glob("*.json")):
        settings = json.loads(path.read_text())
        inspect.signature(function(settings)).bind(None, **own(settings))
        print(f"{path.stem}: {settings['measure']}")


def main() -> None:
    options = arguments()
    if options.check:
        check()
        return
    path = Path(options.experiment)
    path = path if path.suffix == ".json" else EXPERIMENTS / f"{path}.json"
    settings = changed(json.loads(path.read_text()), options)
    # Before torch is imported, and for the processes that an experiment starts.
    os.environ["OMP_NUM_THREADS"] = str(settings["threads"])
    import torch
    from benchmarks.runs import Run

    torch.set_num_threads(settings["threads"])
    shared = {name: settings[name] for name in SHARED if name in settings}
    lists = {name: tuple(shared[name]) for name in ("seeds", "tasks") if name in shared}
    run = Run(
        name=path.stem,
        out=options.out or RESULTS / f"{path.stem}.{settings.get('result', 'json')}",
        command=shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
        work=options.work or Path(tempfile.gettempdir()) / f"secateur-{path.stem}",
        data=options.data,
        fits=options.fits,
        **shared | lists,
    )
    measure = function(settings)
    try:
        inspect.signature(measure).bind(run, **own(settings))
    except TypeError as error:
        raise SystemExit(f"{path}: {error}") from None
    measure(run, **own(settings))


if __name__ == "__main__":
    main()
