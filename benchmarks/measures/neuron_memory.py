"""Peak memory of scoring and of refitting neurons, beside the model's weights and the second moments of one block.

BERT-base's shape with a small vocabulary and random weights, on batches of 8 x 128 tokens, six in all; half of the
neurons of every block go. `pass` is one batch through the model: what reading takes, whatever is done with it.
`find` is finding the blocks, once for all steps; scoring and refitting know them. Each way runs in a process of its
own. Memory is resident memory: its peak meanwhile, less what there was once the model had run. What is freed goes back
to the system at once here; the C library keeps blocks of up to 32 MB for later otherwise, of every pass. Linux only.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.runs import Run, alone, memory_mb
from transformers import BertConfig, BertModel

from secateur.models.inputs import example_inputs
from secateur.restoring.reconstruction import reconstruct_
from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.texts.calibration import PreparedModel
from secateur.units.select import select

TEXTS, BATCHES = 8, 6


def one_way(way: str, layers: int) -> dict[str, Any]:
    model = BertModel(BertConfig(vocab_size=1000, num_hidden_layers=layers)).eval()
    inputs = [example_inputs(model, TEXTS, 128, padding=0, seed=seed) for seed in range(BATCHES)]
    with torch.no_grad():
        model(**inputs[0])
    prepared, reading = PreparedModel(model), Reading(batch_size=TEXTS)
    if way != "find":
        scores = score(prepared, units=["neurons"], scorer="magnitude")
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before is given back, or it would hide what comes
    before = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    spent = time.process_time()
    if way == "pass":
        with torch.no_grad():
            model(**inputs[0])
    elif way == "find":
        assert prepared.neurons
    elif way == "score":
        score(prepared, units=["neurons"], scorer="contribution", inputs=inputs, reading=reading)
    else:
        reconstruct_(prepared, select(scores, 0.5), inputs=inputs, reading=reading)
    found = {"weights_mb": weights, "added_mb": memory_mb() - before, "processor_seconds": time.process_time() - spent}
    return {"way": way, "layers": layers, **{name: round(value, 1) for name, value in found.items()}}


def measure(run: Run, *, cells: list[list[Any]]) -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # of the processes that are started
    moments = 3072 * 3072 * 8 / 2**20
    rows = []
    for way, layers in cells:
        rows.append(alone(__name__, way, str(layers)))
        rows[-1]["added_over_moments"] = round(rows[-1]["added_mb"] / moments, 2)
        print(rows[-1], flush=True)
    run.write(moments_of_one_block_mb=moments, threads=run.threads, rows=rows)


if __name__ == "__main__":
    print(json.dumps(one_way(sys.argv[1], int(sys.argv[2]))))
