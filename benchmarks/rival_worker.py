"""What rivals_by_their_code.py runs in a process of its own: `main.py` of a clone of a rival, whole and as it is.

    python rival_worker.py JOB.json

JOB.json holds: `clone`, the folder of the clone, and `main`, its script, with `arguments` for it; `task`, one of
GLUE's; `train` and `test`, lists of rows of texts and a label; `length`, tokens a text at most; `macs_length`, tokens
that multiply-accumulates are counted at; `masks`, the files that it saves, of heads and of neurons; `out`, a file for
what it found. Needs the packages of peers-rivals-requirements.txt, and imports nothing of secateur's. The shim is this:

- There is no GPU: what goes to "cuda" stays where it is.
- cupy is not there: numpy and scipy take its place, and lsmr has as many iterations as cupy's.
- Where a layer has one neuron left, the solver of Kwon et al. reads a variable that it has not set; this is mended.
- `load_dataset` gives the rows of the job, `train` as the training split and `test` as the validation split;
  `load_metric` gives a metric that only collects predictions, which whoever started this judges.
- Texts are cut to `length`, and multiply-accumulates are counted at `macs_length`, not at each task's mean length.
- Calibration texts are drawn without replacement, so that all rows of `train` are read. Theirs draw with replacement.

Seconds are those between the model's way to the GPU and the evaluation: all of the pruning, and tokenising the test.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
import time
import types
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import scipy.sparse.linalg
import torch
import transformers

KEYS = {"sst2": ("sentence",), "qqp": ("question1", "question2")}
SEEN: dict[str, Any] = {"predictions": [], "times": {}}


def note_time(what: str) -> None:
    SEEN["times"].setdefault(what, (time.perf_counter(), time.process_time()))


def stay_on_cpu() -> None:
    def model_stays(module: Any, *_: Any) -> Any:
        note_time("start")
        return module

    to = torch.Tensor.to
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    torch.nn.Module.cuda = model_stays
    torch.Tensor.to = lambda tensor, *places, **named: to(
        tensor, *("cpu" if place == "cuda" else place for place in places), **named
    )


def without_cupy() -> None:
    def lsmr(matrix: Any, vector: Any, damp: float) -> Any:
        return scipy.sparse.linalg.lsmr(matrix, vector, damp=damp, maxiter=5 * min(matrix.shape))

    for name, content in {
        "cupy": {"asarray": np.asarray, "asnumpy": np.asarray},
        "cupyx": {},
        "cupyx.scipy": {},
        "cupyx.scipy.sparse": {},
        "cupyx.scipy.sparse.linalg": {"lsmr": lsmr},
    }.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)


def mend(linalg: Any) -> None:
    """Let the solver of Kwon et al. return what it computes for a single unknown, by their other solver."""
    solve = linalg.lsmr_cupy_solver
    linalg.lsmr_cupy_solver = lambda matrix, vector: (
        (linalg.closed_form_solver(matrix, vector), True) if len(vector) == 1 else solve(matrix, vector)
    )


def own_data(job: dict[str, Any]) -> None:
    def split(rows: list[Any]) -> Any:
        names = (*KEYS.get(job["task"], ("sentence1", "sentence2")), "label")
        return datasets.Dataset.from_dict(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))

    class Collected:
        def add_batch(self, predictions: Any, references: Any) -> None:
            SEEN["predictions"] += predictions.reshape(-1).tolist()

        def compute(self) -> dict[str, float]:
            return {"accuracy": float("nan"), "spearmanr": float("nan")}

    def load_metric(*_: Any) -> Any:
        note_time("end")
        return Collected()

    datasets.load_dataset = lambda *_: datasets.DatasetDict(train=split(job["train"]), validation=split(job["test"]))
    datasets.load_metric = load_metric
    np.random.choice = lambda among, count: np.random.permutation(among)[:count]
    sys.path.insert(0, str((Path(job["clone"]) / job["main"]).parent))
    if (Path(sys.path[0]) / "utils" / "linalg.py").is_file():
        mend(importlib.import_module("utils.linalg"))
    glue = importlib.import_module("dataset.glue")
    glue.max_seq_length = lambda task: job["length"]
    glue.avg_seq_length = lambda task: job["macs_length"]


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    stay_on_cpu()
    without_cupy()
    own_data(job)
    sys.argv = [job["main"], *job["arguments"]]
    runpy.run_path(str(Path(job["clone"]) / job["main"]), run_name="__main__")
    heads, neurons = (torch.load(file) != 0 for file in job["masks"])
    (started, spent), (ended, spent_then) = SEEN["times"]["start"], SEEN["times"]["end"]
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np, scipy)}
    found = {
        "predictions": SEEN["predictions"],
        "heads": heads.tolist(),
        "neurons": neurons.tolist(),
        "seconds": round(ended - started),
        "processor_seconds": round(spent_then - spent),
        "versions": versions,
    }
    Path(job["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
