"""Peak memory of scoring: maps streamed site by site, against all maps of a batch held at once.

Each way runs in a process of its own, which says its peak resident memory before and after one batch; the model is
all-MiniLM-L6-v2 from the demo extra.
"""

from __future__ import annotations

import json
import sys

import torch
from benchmarks.runs import Run, alone, memory_mb
from transformers import AutoModel

import secateur
from secateur.demo import demo_model
from secateur.models.inputs import example_inputs
from secateur.sites.gating import probe

BATCH, LENGTH = 32, 256
WAYS = ("dense pass", "contribution scores", "streamed maps", "all maps")


@torch.no_grad()
def one_batch(way: str) -> dict[str, float | str]:
    model = AutoModel.from_pretrained(demo_model(), attn_implementation="eager" if way == "all maps" else "sdpa").eval()
    batch = example_inputs(model, BATCH, LENGTH, padding=0)
    model(**example_inputs(model, 1, 8))
    before = memory_mb()
    if way == "dense pass":
        model(**batch)
    elif way == "all maps":
        maps = model(**batch, output_attentions=True).attentions
        assert len(maps) == 6
    elif way == "streamed maps":
        with probe(model, lambda reading: reading.weights.sum(), weights=True):
            model(**batch)
    else:
        secateur.score(model, scorer="contribution", inputs=[batch])
    return {"way": way, "before_mb": before, "after_mb": memory_mb()}


def measure(run: Run) -> None:
    rows = []
    for way in WAYS:
        row = alone(__name__, way)
        row["batch_mb"] = round(row["after_mb"] - row["before_mb"], 1)
        rows.append(row)
        print(f"{way:20s} {row['batch_mb']:8.1f} MB above the loaded model")
    one_site = BATCH * 12 * LENGTH * LENGTH * 4 / 2**20
    print(f"{'one site of maps':20s} {one_site:8.1f} MB by arithmetic, all six {6 * one_site:.1f} MB")
    run.write(model="all-MiniLM-L6-v2", batch=[BATCH, LENGTH], one_site_maps_mb=one_site, rows=rows)


if __name__ == "__main__":
    print(json.dumps(one_batch(sys.argv[1])))
