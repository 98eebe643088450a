"""What scoring in bfloat16 saves, and how many heads it judges otherwise.

96 training texts of each task, 32 a batch, at most 128 tokens, MiniLM. Verdicts are those at half of the heads, by
site and over the whole model. CPU time, float32 and bfloat16 in turn. What bfloat16 saves depends on the processor:
see `processor` in the result. On one without its instructions it costs (scoring_bf16_emulated).
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.runs import Run, minilm
from tqdm import tqdm

from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.units.scores import Scores
from secateur.units.select import select

LENGTH = 128


def verdicts(scores: Scores, allocation: Any) -> torch.Tensor:
    return torch.cat(list(select(scores, 0.5, allocation).values()))


def measure(run: Run, *, scorers: list[str], rounds: int) -> None:
    model, tokenizer = minilm()
    rows = []
    for task in tqdm(run.tasks):
        texts = run.texts(task)
        for scorer in scorers:
            ratios, found = [], {}
            for number in range(rounds):
                seconds = {}
                for bf16 in (False, True) if number % 2 else (True, False):
                    start = time.process_time()
                    found[bf16] = score(model, texts, scorer, tokenizer, reading=Reading(max_length=LENGTH, bf16=bf16))
                    seconds[bf16] = time.process_time() - start
                ratios.append(seconds[False] / seconds[True])
            same = {
                allocation: float(
                    (verdicts(found[False], allocation) == verdicts(found[True], allocation)).double().mean()
                )
                for allocation in ("uniform", "ranking")
            }
            rows.append({"task": task, "scorer": scorer, "time_ratios": ratios, "same_verdicts": same})
    run.write(processor=_bfloat16_units(), rows=rows)
    for scorer in scorers:
        chosen = [row for row in rows if row["scorer"] == scorer]
        ratios = [statistics.median(row["time_ratios"]) for row in chosen]
        same = [row["same_verdicts"][allocation] for row in chosen for allocation in ("uniform", "ranking")]
        print(
            f"{scorer}: {statistics.median(ratios):.2f} times faster ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"{statistics.mean(same):.1%} of the verdicts the same, at least {min(same):.1%}"
        )


def _bfloat16_units() -> dict[str, bool]:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return {name: name in flags for name in ("avx512_bf16", "amx_bf16")}
