"""An hour of what people do, in random order, stopped and killed at random: does anything leak, or pass for whole?

    python -m benchmarks.soak [--minutes 60] [--seed N] [--out FILE]

One process prunes, teaches, fine-tunes, saves, loads and exports tiny models. A third of this is stopped by Ctrl-C
after a random time. In between it starts commands, most of which are stopped or killed. After each step it looks at
what may not change: the model's hooks and modes, torch's and transformers' switches, the folders. At the end it looks
at memory, open files and threads over time. Writes benchmarks/results/soak.json, and exits with 1 where something was
left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from benchmarks.provenance import provenance
from tests.support.processes import command
from tests.support.tiny import tiny_classifier, tiny_model, tiny_texts, tiny_tokenizer
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

import secateur
from secateur.errors import SecateurError
from secateur.exporting.export import export_onnx, export_standalone
from secateur.finetuning.evaluate import evaluate_model
from secateur.finetuning.finetune import finetune
from secateur.models.inputs import example_inputs
from secateur.models.model_saving import save_model
from secateur.removal.proof import hidden_states
from secateur.removal.verify import verify_checkpoint
from secateur.support.files import new_folder, read_json, read_lines, write_text
from secateur.texts.data import Task

RESULT = Path(__file__).parent / "results" / "soak.json"
COMMAND = "python -m benchmarks.soak"
KINDS = ("bert", "distilbert", "llama")
STOPPED = 1 / 3  # of the calls
ENDS = [0, signal.SIGINT, signal.SIGKILL, signal.SIGKILL]  # of the commands
LONGEST = {"call": 0.5, "command": 5.0}  # seconds before the signal
MOST_MEMORY = 1.05  # in the last quarter of the time, of the second
TEXTS, TOKENIZER = tiny_texts(24), tiny_tokenizer()
READING = secateur.Reading(batch_size=8, max_length=8, progress=False)
TASK = Task("tiny", TEXTS, [number % 3 for number in range(len(TEXTS))])


class Left(Exception):
    """Something is not as it was; the message says what."""


def main(arguments: list[str] | None = None) -> int:
    """Run it, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"))
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process that was started in the background ignores it
    get_temp_dir()  # of multiprocessing, which stays
    with tempfile.TemporaryDirectory() as place:
        os.environ["TMPDIR"] = tempfile.tempdir = str(Path(place, "temporary"))
        soak = Soak(Path(place), random.Random(chosen.seed))
        soak.run(chosen.minutes * 60)
    found = {"seed": chosen.seed, "minutes": chosen.minutes, **soak.to_json()}
    write_text(chosen.out, json.dumps({**provenance(COMMAND), **found}, indent=1) + "\n")
    print(json.dumps({**found, "over_time": None}, indent=1))
    return 1 if found["left"] else 0


class Soak:
    """The model that is worked on, the folders, and what has been seen so far."""

    def __init__(self, place: Path, draw: random.Random) -> None:
        self.place, self.draw = place, draw
        self.temporary, self.results = place / "temporary", place / "results"
        for folder in (self.temporary, self.results):
            folder.mkdir()
        self.tried: Counter[str] = Counter()
        self.left: list[str] = []
        self.over_time: list[dict[str, float]] = []
        self.given = _given(place)
        self.begin()
        self.switches = switches()

    def run(self, seconds: float) -> None:
        """Do one thing after the other."""
        start = time.monotonic()
        while (passed := time.monotonic() - start) < seconds:
            if len(self.over_time) <= passed / max(seconds / 60, 1):
                self.over_time.append(resources())
            does = self.command if self.draw.random() < 0.1 else self.call
            try:
                does()
            except Left as error:
                self.left.append(str(error))
                print(f"left: {error}", file=sys.stderr, flush=True)
                self.begin()
            for folder in (self.results, self.temporary):
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.over_time.append(resources())
        self.left += growing(self.over_time)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"tried": dict(sorted(self.tried.items())), "left": self.left, "over_time": self.over_time}

    def begin(self) -> None:
        """Take a new model."""
        self.model = self.draw.choice([tiny_model, tiny_classifier])(self.draw.choice(KINDS), self.draw.randrange(99))

    def call(self) -> None:
        """Call one thing of the library, and look at what it leaves."""
        name, work = self.draw.choice(CALLS)
        before = state(self.model)
        ended = "done"
        try:
            with stopped_after(self.draw.random() * LONGEST["call"] if self.draw.random() < STOPPED else 0):
                self.model = work(self) or self.model
        except KeyboardInterrupt:
            ended = "stopped"
        except SecateurError:  # nothing left to remove, say
            ended = "refused"
        self.tried[f"{name}, {ended}"] += 1
        after = state(self.model)
        if after.keys() == before.keys() and name != "begin":
            _same(f"{name}, {ended}: the model's", before, after)
        _same(f"{name}, {ended}:", self.switches, switches())
        self.check_folders(f"{name}, {ended}", hidden=False)
        if sum(p.numel() for p in self.model.parameters()) < 3000:  # little is left to work on
            self.begin()

    def command(self) -> None:
        """Start one command, end it in one of several ways, and look at the folders."""
        name, line = self.draw.choice(COMMANDS)
        how = self.draw.choice(ENDS)
        log = self.place / "log"
        shutil.rmtree(log, ignore_errors=True)
        running = command([*line(self), "--out", self.results / "out"], log)
        while not (log / "err").exists():  # until then it hears nothing
            time.sleep(0.01)
        if how:
            running.process.join(self.draw.random() * LONGEST["command"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(running.process.pid or 0, how)
        ended = running.wait()
        running.process.close()
        came = {0: "done", 130: "stopped", -signal.SIGKILL: "killed", -signal.SIGINT: "stopped"}.get(ended.code or 0)
        if came is None or "Traceback" in ended.err:
            raise Left(f"secateur {name}, signal {how:d}: ended with {ended.code}: {ended.err[-2000:]!r}")
        self.tried[f"secateur {name}, {came}"] += 1
        self.check_folders(f"secateur {name}, {came}", hidden=came == "killed")
        if came == "done" and not (self.results / "out").exists():
            raise Left(f"secateur {name}: no result")

    def check_folders(self, what: str, hidden: bool) -> None:
        """Is what lies there whole, or marked as unfinished?"""
        for path in self.results.iterdir():
            if path.name.startswith("."):
                marked = path.name.endswith((".unfinished", ".lock", ".steps"))
                if not marked or not (hidden or path.name.endswith(".steps")):
                    raise Left(f"{what}: {path.name} lies about")
            elif trouble := what_is_wrong(path):
                raise Left(f"{what}: {path.name} is not whole: {trouble}")
        files = [
            path.name for path in self.temporary.iterdir() if path.name != ".ses"
        ]  # onnxruntime's own, which stays
        if files and not hidden:
            raise Left(f"{what}: {files} in the folder of temporary files")


def what_is_wrong(path: Path) -> str | None:
    """Read a result as its user would, and say what of it cannot be read."""
    try:
        for file in path.rglob("*.json*"):
            (read_lines if file.suffix == ".jsonl" else read_json)(file)
        if (path / "onnx").is_dir():
            import onnxruntime

            for file in path.rglob("*.onnx"):
                onnxruntime.InferenceSession(file)
        elif (path / "config.json").is_file() and not (path / "modeling_pruned.py").exists():
            AutoModel.from_pretrained(path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Return what nothing may leave changed in a model that stays the same one, by whose it is."""
    modules = dict(model.named_modules())
    return {
        f"hooks of {id(model)}": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
            for name, module in modules.items()
        },
        "mode": {name: module.training for name, module in modules.items()},
        "gradients": {name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()},
        "attention": model.config._attn_implementation,
    }


def switches() -> dict[str, Any]:
    """Return what of torch, transformers and Python calls switch meanwhile."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "modes": len(torch.overrides._get_current_function_mode_stack()),
        "verbosity": (logging.get_verbosity(), logging.is_progress_bar_enabled()),
        "SIGINT": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "warnings": len(warnings.filters),
        "attention functions": sorted(ALL_ATTENTION_FUNCTIONS.keys()),
        "transformers": [PreTrainedModel.post_init, PreTrainedModel.save_pretrained, PreTrainedModel.__call__],
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "threads": torch.get_num_threads(),
    }


def resources() -> dict[str, float]:
    """Return the memory, open files, threads and objects of this process, after its garbage has gone."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "objects": len(gc.get_objects()),
    }


def growing(rows: list[dict[str, float]]) -> list[str]:
    """Name what is more in the last quarter of the time than in the second; the first fills caches."""
    quarter = len(rows) // 4
    if not quarter:
        return []
    found = []
    for name, most in (("memory_mib", MOST_MEMORY), ("files", 1), ("threads", 1), ("objects", MOST_MEMORY)):
        then, now = (
            statistics.median(row[name] for row in part) for part in (rows[quarter : 2 * quarter], rows[-quarter:])
        )
        if now > then * most:
            found.append(f"{name} grow: {then} in the second quarter, {now} in the last")
    return found


@contextlib.contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Let Ctrl-C come after so many seconds, where there are any and the block is not done."""
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _same(what: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, value in before.items():
        if isinstance(value, dict):  # a layer may have gone
            value = {key: kept for key, kept in value.items() if key in after[name]}
        if after[name] != value:
            raise Left(f"{what} {name} {_difference(value, after[name])}")


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        return f"changed in {len(names)} places, first {names[0]}: {before.get(names[0])} -> {after.get(names[0])}"
    return f"changed: {before} -> {after}"


def _random_mask(soak: Soak) -> secateur.Mask:
    kinds = soak.draw.sample(["heads", "neurons", "layers"], soak.draw.randint(1, 3))
    rows = {}
    for name, site in secateur.find_units(soak.model, kinds).items():
        kept = torch.ones(site.original_num_units, dtype=torch.bool)
        step = max(site.original_num_units // 4, 1)
        if soak.draw.random() < 0.3 and site.original_num_units > 1:
            kept[soak.draw.randrange(step) :: step + 1] = False
        rows[name] = kept
    return secateur.Mask(rows)


def _begin(soak: Soak) -> None:
    soak.begin()


def _score(soak: Soak) -> None:
    name = soak.draw.choice(["contribution", "magnitude", "entropy", "leave_one_out", "smp-plus"])
    secateur.score(soak.model, TEXTS, name, TOKENIZER, reading=READING)


def _remove(soak: Soak) -> None:
    secateur.remove_(soak.model, _random_mask(soak))


def _prune(soak: Soak) -> PreTrainedModel:
    budget = soak.draw.choice(["macs=0.9", "macs=0.7", "heads=0.75", "params=0.9"])
    out = soak.results / "pruned" if soak.draw.random() < 0.5 else None
    restore = soak.draw.choice(["none", "reconstruct", "distill"])
    model, _ = secateur.prune(
        soak.model, TEXTS, budget=budget, restore=restore, steps=2, tokenizer=TOKENIZER, reading=READING, out=out
    )
    return model


def _reconstruct(soak: Soak) -> None:
    secateur.reconstruct_(soak.model, _random_mask(soak), TEXTS, TOKENIZER, reading=READING)


def _refine(soak: Soak) -> None:
    mask = secateur.select(secateur.score(soak.model, scorer="magnitude"), 0.25)
    secateur.refine_mask(soak.model, mask, TEXTS, TOKENIZER, steps=2, reading=READING)


def _finetune(soak: Soak) -> None:
    model, _ = finetune(tiny_classifier("bert"), TASK, tokenizer=TOKENIZER, epochs=1, reading=READING)
    evaluate_model(model, TOKENIZER, TASK, reading=READING)


def _save_and_load(soak: Soak) -> PreTrainedModel:
    folder = soak.results / "saved"
    with new_folder(folder) as staged:
        save_model(soak.model, TOKENIZER, None, staged)
    again = type(soak.model).from_pretrained(folder).eval()
    inputs = example_inputs(soak.model)
    for one, other in zip(hidden_states(soak.model, inputs), hidden_states(again, inputs), strict=True):
        if not torch.equal(one, other):
            raise Left("a model that was saved computes something else when it is loaded")
    return again


def _verify(soak: Soak) -> None:
    folder = soak.results / "verified"
    secateur.prune(soak.given / "model", TEXTS, budget="macs=0.8", restore="none", reading=READING, out=folder)
    if verify_checkpoint(folder)["verdict"] != "equal":
        raise Left("a folder that was just written is not equal to its original")


def _standalone(soak: Soak) -> None:
    export_standalone(soak.given / "pruned", soak.results / "standalone")


def _onnx(soak: Soak) -> None:
    export_onnx(soak.given / "pruned", soak.results / "exported", soak.draw.choice([None, "int8"]))


CALLS: list[tuple[str, Callable[[Soak], PreTrainedModel | None]]] = [
    *[("begin", _begin), ("score", _score), ("remove_", _remove), ("prune", _prune), ("refine_mask", _refine)] * 4,
    *[("reconstruct_", _reconstruct), ("save and load", _save_and_load), ("verify", _verify)] * 4,
    *[("export standalone", _standalone), ("finetune", _finetune)] * 2,
    ("export onnx", _onnx),
]
"""What is called, as often as it stands here."""


SHORT = ["--max-length", 16, "--device", "cpu"]
COMMANDS: list[tuple[str, Callable[[Soak], list[object]]]] = [
    ("prune", lambda s: ["prune", s.given / "model", "--data", s.given / "task", "--budget", "macs=0.7", *SHORT]),
    ("distill", lambda s: ["distill", s.given / "pruned", "--data", s.given / "task", "--steps", 2, *SHORT]),
    ("finetune", lambda s: ["finetune", s.given / "pruned", "--data", s.given / "task", "--epochs", 1, *SHORT]),
    ("export standalone", lambda s: ["export", s.given / "pruned", "--format", "standalone"]),
    ("export onnx", lambda s: ["export", s.given / "pruned", "--format", "onnx", "--quantize", "int8"]),
    ("score", lambda s: ["score", s.given / "model", "--data", s.given / "task", *SHORT]),
    ("report", lambda s: ["report", s.given / "pruned", "--plots", s.results / "plots"]),
    ("meta-train", lambda s: [
        "meta-train", "--model", s.given / "model", "--data", s.given / "task" / "train.tsv", "--steps", 2,
        "--batch-size", 3, "--batches-per-step", 1, "--checkpoint-every", 1, "--max-length", 16,
    ]),
    ("compare", lambda s: [
        "compare", "--model", s.given / "model", "--data", s.given / "task", "--scorer", "random", "--seeds", 1,
        "--texts", 8, "--max-train", 8, "--jobs", 1, "--device", "cpu",
    ]),
]  # fmt: skip


def _given(place: Path) -> Path:
    """Write a tiny model, what is left of it, and a task."""
    given = place / "given"
    tiny_model("bert").save_pretrained(given / "model")
    TOKENIZER.save_pretrained(given / "model")
    (given / "task").mkdir()
    for split, count in (("train", 24), ("dev", 8)):
        rows = [f"{text}\t{int('good' in text)}" for text in tiny_texts(count)]
        (given / "task" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    secateur.prune(given / "model", TEXTS, budget="macs=0.7", restore="none", reading=READING, out=given / "pruned")
    return given


if __name__ == "__main__":
    sys.exit(main())
