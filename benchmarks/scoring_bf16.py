"""What scoring in bfloat16 saves, and how many heads it judges otherwise.

    OMP_NUM_THREADS=1 python benchmarks/scoring_bf16.py --glue GLUE [--rounds 3] [--tasks cola …]

96 training texts of each task (GLUE: a folder with one folder a task), 32 a batch, at most 128 tokens, MiniLM. Verdicts
are those at half of the heads, by site and over the whole model. CPU time of one thread, float32 and bfloat16 in turn.
What bfloat16 saves depends on the processor: see `processor` in the result. Writes results/scoring_bf16.json, or on a
processor without bfloat16 instructions, where it costs, results/scoring_bf16_emulated.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from provenance import provenance
from secateur.demo import demo_model
from secateur.models.loading import load_model, load_tokenizer
from secateur.scorers.score import score_heads
from secateur.support.files import write_text
from secateur.texts.data import load_task
from secateur.units.select import select_heads
from secateur.units.values import HeadScores

TASKS = ("cola", "sst2", "stsb", "mrpc", "qqp", "mnli", "rte", "qnli")
SCORERS = ("contribution", "confidence", "entropy", "smp", "smp-plus", "relational_taylor")
TEXTS, LENGTH = 96, 128


def verdicts(scores: HeadScores, scope: Any) -> torch.Tensor:
    return torch.cat(list(select_heads(scores, 0.5, scope).values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", required=True, type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    rows = []
    for task in tqdm(options.tasks):
        texts = load_task(options.glue / task, "train").head(TEXTS, seed=0).texts
        for scorer in SCORERS:
            ratios, found = [], {}
            for number in range(options.rounds):
                seconds = {}
                for bf16 in (False, True) if number % 2 else (True, False):
                    start = time.process_time()
                    found[bf16] = score_heads(model, texts, scorer, tokenizer, max_length=LENGTH, bf16=bf16)
                    seconds[bf16] = time.process_time() - start
                ratios.append(seconds[False] / seconds[True])
            same = {
                scope: float((verdicts(found[False], scope) == verdicts(found[True], scope)).double().mean())
                for scope in ("site", "global")
            }
            rows.append({"task": task, "scorer": scorer, "time_ratios": ratios, "same_verdicts": same})
    units = _bfloat16_units()
    told = "" if tuple(options.tasks) == TASKS else f" --tasks {' '.join(options.tasks)}"
    result = {
        **provenance(
            f"OMP_NUM_THREADS=1 python benchmarks/scoring_bf16.py --glue GLUE --rounds {options.rounds}{told}",
            "other work beside it; CPU time",
        ),
        "processor": units,
        "rows": rows,
    }
    name = "scoring_bf16" if any(units.values()) else "scoring_bf16_emulated"
    write_text(Path(__file__).parent / "results" / f"{name}.json", json.dumps(result, indent=1) + "\n")
    for scorer in SCORERS:
        chosen = [row for row in rows if row["scorer"] == scorer]
        ratios = [statistics.median(row["time_ratios"]) for row in chosen]
        same = [row["same_verdicts"][scope] for row in chosen for scope in ("site", "global")]
        print(
            f"{scorer}: {statistics.median(ratios):.2f} times faster ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"{statistics.mean(same):.1%} of the verdicts the same, at least {min(same):.1%}"
        )


def _bfloat16_units() -> dict[str, bool]:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return {name: name in flags for name in ("avx512_bf16", "amx_bf16")}


if __name__ == "__main__":
    main()
