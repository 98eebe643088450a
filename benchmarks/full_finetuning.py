"""What fine-tuning on all training texts keeps of the dense model's quality, on eight GLUE tasks: for a GPU.

    python benchmarks/full_finetuning.py choose --glue GLUE --fits unseen --masks masks.jsonl [--best] [--seeds N]
    python benchmarks/full_finetuning.py train --glue GLUE --masks masks.jsonl --out runs.jsonl [--jobs N] [--seconds N]
    python benchmarks/full_finetuning.py table --masks masks.jsonl --runs runs.jsonl [--name NAME]

`choose` scores all-MiniLM-L6-v2's heads on 96 training texts of at most 64 tokens, as results/rivals.jsonl does, whose
masks it takes where there are any (but for smp-plus: fitted without the task, `joint_pruner.py unseen`), and writes
what each scorer keeps of every layer and of the whole model. `train` fine-tunes each mask once for each task and seed
(one that two scorers choose counts for both), the first wanted first, and starts none after --seconds; start again to
go on. `table` writes results/NAME.jsonl, full_finetuning unless told, a row for each mask that has been trained, and
prints what they keep: the mean over tasks of pruned / dense, mean over seeds; the same without CoLA, which the dense
model hardly learns; and the mean over tasks of the quotient of the means over seeds.

`--best` chooses the dense model and what keeps most alone, `smp-plus` over the whole model, reconstructed and distilled
in `--steps`, 300 unless told. `train --device cpu --float32` is for processors without bfloat16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetuning_runs import FULL, SCORED, finetune_mask, key, score_texts
from joint_ablation import RESULTS
from secateur.comparing.plan import DENSE
from secateur.comparing.summary import Summary, summarise
from secateur.comparing.workers import each, workers
from secateur.demo import demo_model
from secateur.models.loading import load_model, load_tokenizer
from secateur.support.files import append_line, read_lines, write_text
from secateur.texts.data import load_task
from secateur.units.select import select_heads

TASKS = ("qnli", "mnli", "qqp", "mrpc", "rte", "cola", "sst2", "stsb")  # the longest runs first
MAIN = ("contribution", "matching", "smp-plus", "confidence")
RECONSTRUCTED = 1000  # training texts that output projections are refitted on
DISTILLED = 300  # steps, the default
Wanted = tuple[str, str, float, int, int]  # scope, scorer, ratio, texts that refit, steps of distillation
# What is wanted first: half of the heads, the same share of every layer and over the whole model, as they are, with
# output projections refitted, and then distilled.
WANTED: list[Wanted] = list(
    dict.fromkeys(
        [("site", scorer, 0.5, 0, 0) for scorer in MAIN]
        + [
            (scope, scorer, 0.5, texts, 0)
            for scorer in ("smp-plus", "contribution")
            for scope in ("site", "global")
            for texts in (0, RECONSTRUCTED)
        ]
        + [
            (scope, scorer, 0.5, RECONSTRUCTED, DISTILLED)
            for scorer in ("smp-plus", "contribution")
            for scope in ("global", "site")
        ]
        + [("site", scorer, 0.5, RECONSTRUCTED, DISTILLED) for scorer in MAIN]
    )
)


def choose(glue: Path, fits: Path, masks: Path, wanted: list[Wanted], seeds: range) -> None:
    """Write a line for each mask, in the order in which they are wanted."""
    rivals = [row for name in ("rivals", "rivals_mnli_qnli") for row in read_lines(RESULTS / f"{name}.jsonl")]
    found = {
        (row["task"], row["seed"], "site", row["scorer"], row["ratio"]): row["kept_heads"]
        for row in rivals
        if row["scorer"] != "smp-plus"
    }
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    for task, seed in tqdm(list(itertools.product(TASKS, seeds)), desc="scoring"):
        texts = load_task(glue / task, "train").head(SCORED, seed=seed).texts
        for scorer in dict.fromkeys(scorer for _, scorer, *_ in wanted):
            missing = {
                (scope, ratio)
                for scope, name, ratio, *_ in wanted
                if name == scorer and (task, seed, scope, scorer, ratio) not in found
            }
            if missing:
                options = {"pruner": str(fits / task)} if scorer == "smp-plus" else {}
                scores = score_texts(model, tokenizer, texts, scorer, seed, **options)
            for scope, ratio in missing:
                found[task, seed, scope, scorer, ratio] = select_heads(scores, ratio, scope).kept_heads
    rows = [
        {"task": t, "seed": s, "scope": "", "scorer": DENSE, "ratio": 0.0, "kept_heads": None}
        for s in seeds
        for t in TASKS
    ]
    for (scope, scorer, ratio, texts, steps), seed, task in itertools.product(wanted, seeds, TASKS):
        row = {"task": task, "seed": seed, "scope": scope, "scorer": scorer, "ratio": ratio}
        row["kept_heads"] = found[task, seed, scope, scorer, ratio]
        row |= {"reconstruct": texts} if texts else {}
        rows.append(row | ({"distill": steps} if steps else {}))
    write_text(masks, "".join(json.dumps(row) + "\n" for row in rows))


def train(glue: Path, masks: Path, out: Path, jobs: int, device: str, bf16: bool, seconds: float) -> None:
    """Fine-tune every mask that `out` does not have."""
    end = time.monotonic() + seconds
    done = {key(row) for row in read_lines(out)}
    cells = list({key(row): row for row in reversed(read_lines(masks))}.values())[::-1]
    calls = [
        (glue, row["task"], row["seed"], row["kept_heads"], FULL, device, *restoring(row), bf16, end)
        for row in cells
        if key(row) not in done
    ]
    with workers(jobs, 1, device) as pool:
        for row in each(pool, train_until, calls, "fine-tuning", True):
            if row is not None:
                append_line(out, row)


def train_until(*call: Any) -> dict[str, Any] | None:
    """Fine-tune one mask, unless it is too late."""
    *arguments, end = call
    return None if time.monotonic() > end else finetune_mask(*arguments)


def table(masks: Path, runs: Path, name: str) -> None:
    """Write a row for each scorer's mask that has been trained, and print what is kept, mean over tasks and seeds."""
    done = {key(row): row for row in read_lines(runs)}
    rows = [row | done[key(row)] | row for row in read_lines(masks) if key(row) in done]
    write_text(RESULTS / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    named = [{**row, "scorer": label(row)} for row in rows]
    found = {(s.task, s.scorer, s.ratio): s for s in summarise(named)}
    print("| removed | scope | scorer | " + " | ".join(TASKS) + " | retention | without CoLA | of means | runs |")
    print("|---" * (7 + len(TASKS)) + "|")
    for ratio, scorer in dict.fromkeys((row["ratio"], row["scorer"]) for row in named):
        cells = {task: found[task, scorer, ratio] for task in TASKS if (task, scorer, ratio) in found}
        values = [
            f"{c.mean:.3f}" + (f" ± {c.std:.3f}" if c.std is not None else "") if (c := cells.get(task)) else ""
            for task in TASKS
        ]
        runs = " to ".join(str(n) for n in sorted({c.runs for c in cells.values()}))
        who = scorer if " | " in scorer else f" | {scorer}"
        print(f"| {ratio:.0%} | {who} | " + " | ".join([*values, *kept(found, scorer, ratio), runs]) + " |")


def kept(found: dict[tuple[str, str, float], Summary], scorer: str, ratio: float) -> list[str]:
    """Return retention: over all tasks, without CoLA, and of means over seeds; empty where runs are missing."""
    pairs = {task: (found.get((task, scorer, ratio)), found.get((task, DENSE, 0.0))) for task in TASKS}
    whole = {task: (c, d) for task, (c, d) in pairs.items() if c and d and c.retention and c.runs == d.runs}
    if len(whole) < len(TASKS):
        return ["", "", ""]
    shares = {task: c.retention or 0.0 for task, (c, _) in whole.items()}
    without = [share for task, share in shares.items() if task != "cola"]
    of_means = [c.mean / d.mean for c, d in whole.values()]
    return [f"{statistics.mean(one):.1%}" for one in (shares.values(), without, of_means)]


def restoring(row: dict[str, Any]) -> tuple[int, int]:
    """Return how many texts output projections are refitted on, and the steps of distillation."""
    return row.get("reconstruct", 0), row.get("distill", 0)


def label(row: dict[str, Any]) -> str:
    """Return scope and scorer, and whether output projections were refitted."""
    return (
        f"{row['scope']} | {row['scorer']}"
        + (", reconstructed" if "reconstruct" in row else "")
        + (", distilled" if "distill" in row else "")
        if row["scope"]
        else DENSE
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("choose", "train", "table"))
    parser.add_argument("--glue", type=Path)
    parser.add_argument("--fits", type=Path)
    parser.add_argument("--masks", required=True, type=Path)
    parser.add_argument("--out", "--runs", dest="runs", type=Path)
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--steps", type=int, default=DISTILLED)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--name", default="full_finetuning")
    parser.add_argument("--float32", dest="bf16", action="store_false")
    options = parser.parse_args()
    if options.step == "choose":
        best: list[Wanted] = [("global", "smp-plus", 0.5, RECONSTRUCTED, options.steps)]
        choose(options.glue, options.fits, options.masks, best if options.best else WANTED, range(options.seeds))
    elif options.step == "train":
        train(options.glue, options.masks, options.runs, options.jobs, options.device, options.bf16, options.seconds)
    else:
        table(options.masks, options.runs, options.name)


if __name__ == "__main__":
    main()
