"""What fine-tuning on all training texts keeps of the dense model's quality, on eight GLUE tasks: for a GPU.

Scores all-MiniLM-L6-v2's heads on 96 training texts of at most 64 tokens, as results/rivals.jsonl does, whose masks it
takes where there are any (but for smp-plus: fitted without the task). `masks` says which are wanted, the first first:
allocation, scorer, ratio, texts that output projections are refitted on, steps of distillation. Each mask is
fine-tuned once for each task and seed (one that two scorers choose counts for both); none is started after `seconds`.
Masks and runs
are kept in --work: start again to go on. Prints what they keep: the mean over tasks of pruned / dense, mean over seeds;
the same without CoLA, which the dense model hardly learns; and the mean over tasks of the quotient of the means over
seeds.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.measures.finetuning_runs import FULL, finetune_mask, key, score_texts
from benchmarks.runs import RESULTS, SCORED, Run, minilm, table
from tqdm import tqdm

from secateur.comparing.plan import DENSE
from secateur.comparing.summary import Summary, summarise
from secateur.comparing.workers import each, workers
from secateur.support.files import append_line, read_lines, write_text
from secateur.units.select import select


def measure(run: Run, *, masks: list[list[Any]], dense: bool, bf16: bool, seconds: float | None) -> None:
    chosen, runs = run.work / "masks.jsonl", run.work / "runs.jsonl"
    run.work.mkdir(parents=True, exist_ok=True)
    if not chosen.is_file():
        write_lines(chosen, choose(run, masks, dense))
    train(run, chosen, runs, bf16, math.inf if seconds is None else seconds)
    done = {key(row): row for row in read_lines(runs)}
    rows = [row | done[key(row)] | row for row in read_lines(chosen) if key(row) in done]
    write_lines(run.out, rows)
    if rows:
        print(tasks_table(rows, run.tasks))


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def choose(run: Run, wanted: list[list[Any]], dense: bool) -> list[dict[str, Any]]:
    """Return a row for each mask, in the order in which they are wanted."""
    rivals = [row for name in ("rivals", "rivals_mnli_qnli") for row in read_lines(RESULTS / f"{name}.jsonl")]
    found = {
        (row["task"], row["seed"], "uniform", row["scorer"], row["ratio"]): row["kept_heads"]
        for row in rivals
        if row["scorer"] != "smp-plus"
    }
    model, tokenizer = minilm()
    for task, seed in tqdm(list(itertools.product(run.tasks, run.seeds)), desc="scoring"):
        texts = run.texts(task, SCORED, seed)
        for scorer in dict.fromkeys(scorer for _, scorer, *_ in wanted):
            missing = {
                (allocation, ratio)
                for allocation, name, ratio, *_ in wanted
                if name == scorer and (task, seed, allocation, scorer, ratio) not in found
            }
            if missing:
                scores = score_texts(model, tokenizer, texts, scorer, seed, **run.options(scorer, task))
            for allocation, ratio in missing:
                found[task, seed, allocation, scorer, ratio] = select(scores, ratio, allocation).kept
    rows = [
        {"task": t, "seed": s, "allocation": "", "scorer": DENSE, "ratio": 0.0, "kept_heads": None}
        for s in (run.seeds if dense else ())
        for t in run.tasks
    ]
    for (allocation, scorer, ratio, texts, steps), seed, task in itertools.product(wanted, run.seeds, run.tasks):
        row = {"task": task, "seed": seed, "allocation": allocation, "scorer": scorer, "ratio": ratio}
        row["kept_heads"] = found[task, seed, allocation, scorer, ratio]
        row |= {"reconstruct": texts} if texts else {}
        rows.append(row | ({"distill": steps} if steps else {}))
    return rows


def train(run: Run, chosen: Path, runs: Path, bf16: bool, seconds: float) -> None:
    """Fine-tune every mask that `runs` does not have."""
    end = time.monotonic() + seconds
    done = {key(row) for row in read_lines(runs)}
    cells = list({key(row): row for row in reversed(read_lines(chosen))}.values())[::-1]
    calls = [
        (run.glue, row["task"], row["seed"], row["kept_heads"], FULL, run.device, *restoring(row), bf16, end)
        for row in cells
        if key(row) not in done
    ]
    with workers(run.jobs, run.threads, run.device) as pool:
        for row in each(pool, train_until, calls, "fine-tuning", True):
            if row is not None:
                append_line(runs, row)


def train_until(*call: Any) -> dict[str, Any] | None:
    """Fine-tune one mask, unless it is too late."""
    *arguments, end = call
    return None if time.monotonic() > end else finetune_mask(*arguments)


def tasks_table(rows: list[dict[str, Any]], tasks: tuple[str, ...]) -> str:
    """Return what is kept, mean over tasks and seeds, as Markdown."""
    named = [{**row, "scorer": label(row)} for row in rows]
    found = {(s.task, s.scorer, s.ratio): s for s in summarise(named)}
    lines = []
    for ratio, scorer in dict.fromkeys((row["ratio"], row["scorer"]) for row in named):
        cells = {task: found[task, scorer, ratio] for task in tasks if (task, scorer, ratio) in found}
        values = [
            f"{c.mean:.3f}" + (f" ± {c.std:.3f}" if c.std is not None else "") if (c := cells.get(task)) else ""
            for task in tasks
        ]
        runs = " to ".join(str(n) for n in sorted({c.runs for c in cells.values()}))
        who = scorer if " | " in scorer else f" | {scorer}"
        lines.append([f"{ratio:.0%}", who, *values, *kept(found, tasks, scorer, ratio), runs])
    columns = ["removed", "allocation | scorer", *tasks, "retention", "without CoLA", "of means", "runs"]
    return table(columns, lines).replace("| --- |", "| --- | --- |", 1)  # a cell of two columns


def kept(found: dict[tuple[str, str, float], Summary], tasks: tuple[str, ...], scorer: str, ratio: float) -> list[str]:
    """Return retention: over all tasks, without CoLA, and of means over seeds; empty where runs are missing."""
    pairs = {task: (found.get((task, scorer, ratio)), found.get((task, DENSE, 0.0))) for task in tasks}
    whole = {task: (c, d) for task, (c, d) in pairs.items() if c and d and c.retention and c.runs == d.runs}
    if len(whole) < len(tasks):
        return ["", "", ""]
    shares = {task: c.retention or 0.0 for task, (c, _) in whole.items()}
    without = [share for task, share in shares.items() if task != "cola"]
    of_means = [c.mean / d.mean for c, d in whole.values()]
    return [f"{statistics.mean(one):.1%}" for one in (shares.values(), without, of_means)]


def restoring(row: dict[str, Any]) -> tuple[int, int]:
    """Return how many texts output projections are refitted on, and the steps of distillation."""
    return row.get("reconstruct", 0), row.get("distill", 0)


def label(row: dict[str, Any]) -> str:
    """Return allocation and scorer, and whether output projections were refitted."""
    return (
        f"{row['allocation']} | {row['scorer']}"
        + (", reconstructed" if "reconstruct" in row else "")
        + (", distilled" if "distill" in row else "")
        if row["allocation"]
        else DENSE
    )
