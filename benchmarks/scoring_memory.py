"""Peak memory of scoring: maps streamed site by site, against all maps of a batch held at once.

    python benchmarks/scoring_memory.py

Each way runs in a process of its own, which prints its peak resident memory before and after one batch; the model is
all-MiniLM-L6-v2 from the demo extra. Writes benchmarks/results/scoring_memory.json.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

from provenance import provenance

BATCH, LENGTH = 32, 256


def run(way: str) -> None:
    import torch

    torch.set_num_threads(2)
    from transformers import AutoModel

    import secateur
    from secateur.demo import demo_model
    from secateur.models.inputs import example_inputs
    from secateur.sites.gating import probe

    model = AutoModel.from_pretrained(demo_model(), attn_implementation="eager" if way == "all maps" else "sdpa").eval()
    batch = example_inputs(model, BATCH, LENGTH, padding=0)
    with torch.no_grad():
        model(**example_inputs(model, 1, 8))
    before = _peak()
    with torch.no_grad():
        if way == "dense pass":
            model(**batch)
        elif way == "all maps":
            maps = model(**batch, output_attentions=True).attentions
            assert len(maps) == 6
        elif way == "streamed maps":
            with probe(model, lambda reading: reading.weights.sum(), weights=True):
                model(**batch)
        else:
            secateur.score_heads(model, scorer="contribution", inputs=[batch])
    print(json.dumps({"way": way, "before_mb": before, "after_mb": _peak()}))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    rows = []
    for way in ("dense pass", "contribution scores", "streamed maps", "all maps"):
        done = subprocess.run([sys.executable, __file__, way], capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.strip().splitlines()[-1])
        row["batch_mb"] = round(row["after_mb"] - row["before_mb"], 1)
        rows.append(row)
        print(f"{way:20s} {row['batch_mb']:8.1f} MB above the loaded model")
    one_site = BATCH * 12 * LENGTH * LENGTH * 4 / 2**20
    print(f"{'one site of maps':20s} {one_site:8.1f} MB by arithmetic, all six {6 * one_site:.1f} MB")
    result = {
        **provenance("python benchmarks/scoring_memory.py"),
        "model": "all-MiniLM-L6-v2",
        "batch": [BATCH, LENGTH],
        "one_site_maps_mb": one_site,
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / "scoring_memory.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run(sys.argv[1]) if len(sys.argv) > 1 else main()
