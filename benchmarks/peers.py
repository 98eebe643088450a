"""Libraries that remove heads, in one run: the same model, the same heads; cost, result, and whether it reloads.

    make peers  # OMP_NUM_THREADS=1 .venv-peers/bin/python -m benchmarks.peers --transformers-4 .venv-peers-4/bin/python

all-MiniLM-L6-v2, with two masks from `contribution` on 128 film sentences: half of every layer's heads, and half of all
heads, wherever they are. Every library removes them in a process of its own, under transformers 5 and under the last
transformers 4, as its documentation says (peer_workers.py); what fails is recorded with the last line of its error.
Measured: CPU and wall time of the removal alone, the memory that it added at its peak, the largest difference to the
gated model over 16 sentences, and CPU time of a pass over 8 x 128 tokens in turn with the dense model. Then fresh
processes load what was saved: by `AutoModel.from_pretrained` under the same transformers, and under transformers 5 with
secateur imported. Prints a table and writes results/peers.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from benchmarks.provenance import provenance
from benchmarks.runs import minilm

import secateur
from secateur.demo import demo_model, demo_task
from secateur.measuring.timing import quartiles
from secateur.support.files import write_text
from secateur.support.versions import environment

WORKER = Path(__file__).parent / "peer_workers.py"
RESULT = Path(__file__).parent / "results" / "peers.json"
UNDER_5 = ["secateur", "torch-pruning", "neural-compressor", "transformers", "textpruner", "nn_pruning", "nni",
           "torch.nn.utils.prune"]  # fmt: skip
UNDER_4 = ["transformers", "textpruner", "nn_pruning", "neural-compressor", "nni"]
TOLERANCE = 1e-4


def run(python: str, what: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a worker and return what it found; a process that ends without a word failed with its last line."""
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    done = subprocess.run(
        [python, "-W", "ignore", str(WORKER), what, str(file)], capture_output=True, text=True, cwd=folder, check=False
    )
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}


def verdict(found: dict[str, Any]) -> str:
    if "failed" in found:
        return found["failed"]
    return "equal" if found["largest_difference"] <= TOLERANCE else f"wrong by {found['largest_difference']:.2g}"


def report(row: dict[str, Any]) -> None:
    name = f"{row['mask']}, {row['peer']} (transformers {row['transformers']})"
    if "failed" in row:
        print(f"{name}: FAILED, {row['failed']}", flush=True)
        return
    low, middle, high = row["speed_up_quartiles"]
    print(
        f"{name}: {statistics.median(row['cpu_seconds']):.3f} s CPU, {statistics.median(row['wall_seconds']):.3f} s, "
        f"peak {statistics.median(row['peak_mb_above']):.0f} MB, differs by {row['largest_difference']:.1g}, "
        f"{row['parameters']:,} parameters, {middle:.3f} times as fast ({low:.3f} to {high:.3f})",
        flush=True,
    )
    for way, found in row.get("reload", {}).items():
        print(f"    {way}: {found['verdict']}", flush=True)


@click.command()
@click.option("--transformers-4", required=True, help="A python with the last transformers 4 and the peers.")
@click.option("--rounds", default=9, show_default=True)
@click.option("--only", multiple=True, help="Run this library again, such as nni@5, and keep the other rows.")
def main(transformers_4: str, rounds: int, only: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    pythons = {"5": sys.executable, "4": str(Path(transformers_4).absolute())}
    model, tokenizer = minilm()
    texts = demo_task(0)[0].texts
    scores = secateur.score(model, texts[:128], "contribution", tokenizer)
    inputs = dict(tokenizer(texts[128:144], padding=True, truncation=True, max_length=64, return_tensors="pt"))
    result: dict[str, Any] = {
        **provenance(
            " ".join(["OMP_NUM_THREADS=1 python -m benchmarks.peers", *sys.argv[1:]]), "other work beside it; CPU time"
        ),
        "load_average": [os.getloadavg()[0]],
        "versions": environment() | versions(pythons),
        "model": "all-MiniLM-L6-v2, 6 layers of 12 heads",
        "seed": 0,
        "masks": {},
        "rows": [],
    }
    wanted = {}
    for allocation, what in (("uniform", "half of every layer"), ("ranking", "half of the model")):
        mask = secateur.select(scores, 0.5, allocation=allocation)
        result["masks"][what] = [(~kept).nonzero().flatten().tolist() for kept in mask.values()]
        with torch.no_grad(), secateur.gated(model, mask):
            wanted[what] = model(**inputs)[0]
        print(f"{what}: heads kept {[int(kept.sum()) for kept in mask.values()]}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        torch.save(inputs | {"wanted": wanted}, folder / "inputs.pt")
        base = {"model": str(demo_model()), "masks": result["masks"], "inputs": str(folder / "inputs.pt"),
                "rounds": rounds}  # fmt: skip
        for under, peers in (("5", UNDER_5), ("4", UNDER_4)):
            for peer in peers:
                if only and f"{peer}@{under}" not in only:
                    continue
                out = folder / f"{peer}-{under}"
                out.mkdir()
                found = run(pythons[under], "prune", {**base, "peer": peer, "out": str(out)}, folder)
                for what in wanted:
                    row = {"mask": what, "peer": peer, "transformers": under, **found.get(what, found)}
                    if "failed" not in row:
                        seconds = row["seconds_8x128"]
                        ratios = [a / b for a, b in zip(seconds["dense"], seconds["pruned"], strict=True)]
                        row["speed_up_quartiles"] = quartiles(ratios)
                    result["rows"].append(row)
                    report(row)
        for name, under, where, ways in (
            ("from_pretrained", "5", "5", ["plain", "pickled"]),
            ("from_pretrained", "4", "4", ["plain", "pickled"]),
            ("from_pretrained, transformers 5", "4", "5", ["plain"]),
            ("from_pretrained, transformers 5, secateur imported", None, "5", ["imported"]),
        ):
            rows = [r for r in result["rows"] if "failed" not in r and under in (None, r["transformers"])]
            folders = [str(folder / f"{r['peer']}-{r['transformers']}" / r["mask"]) for r in rows]
            job = {"ways": ways, "folders": folders, "inputs": base["inputs"]}
            found = run(pythons[where], "reload", job, folder)
            for way in ways:
                for row, saved in zip(rows, folders, strict=True):
                    one = found[way][saved] if way in found else found
                    what = "the object, pickled" if way == "pickled" else name
                    row.setdefault("reload", {})[what] = {**one, "verdict": verdict(one)}
    for row in result["rows"]:
        report(row)
    result["load_average"].append(os.getloadavg()[0])
    if only:
        kept = json.loads(RESULT.read_text())
        again = [f"{row['peer']}@{row['transformers']}" for row in result["rows"]]
        others = [row for row in kept["rows"] if f"{row['peer']}@{row['transformers']}" not in again]
        result = kept | {"rows": others + result["rows"], "again": [*kept.get("again", []), result["command"]]}
    write_text(RESULT, json.dumps(result, indent=1) + "\n")


def versions(pythons: dict[str, str]) -> dict[str, str]:
    """Return the versions of the libraries under test, and of both transformers."""
    names = ["transformers", "torch-pruning", "neural-compressor", "textpruner", "nn_pruning", "nni"]
    code = f"import json; from importlib.metadata import version; print(json.dumps([version(n) for n in {names!r}]))"
    found = {}
    for under, python in pythons.items():
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        values = json.loads(done.stdout)
        found |= {(f"transformers {under}" if n == "transformers" else n): v
                  for n, v in zip(names, values, strict=True)}  # fmt: skip
    return found


if __name__ == "__main__":
    main()
