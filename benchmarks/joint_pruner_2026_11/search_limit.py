"""How much a long search on a task's own texts finds that one pass does not see.

    python benchmarks/search_limit.py --glue GLUE --fits DIR [--task cola] [--exchanges 60] [--jobs N]

Half of the heads go, ranked over the whole model. Heads are scored on the texts that `prune` draws unless told, and the
search of `--refine` goes on from each scorer's mask on the same texts. The draws, the fits without the task and the dev
texts that judge are those of other_texts.py. Prints 1000 times the relational KL, and writes results/search_limit.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from other_texts import DRAWS, SCORERS, other_loss
from provenance import provenance
from representations import LENGTH
from secateur.data import load_task
from secateur.demo import CALIBRATION_TEXTS, demo_model
from secateur.files import write_text
from secateur.model.loading import load_model, load_tokenizer
from secateur.refinement import refine_mask
from secateur.scoring import score_heads
from secateur.selection import select_heads
from secateur.workers import each, workers

RATIO = 0.5


def search_from(glue: Path, fits: Path, task: str, exchanges: int, scorer: str, seed: int) -> dict[str, Any]:
    """Return what the mask of a scorer costs, and the best that the search found, on its texts and on the others."""
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    judge = other_loss(model, tokenizer, load_task(glue / task, "dev"))
    texts = load_task(glue / task, "train").head(CALIBRATION_TEXTS, seed=seed).texts
    extra = {"pruner": str(fits / task)} if scorer == "smp-plus" else {}
    scores = score_heads(model, texts, scorer, tokenizer, max_length=LENGTH, seed=seed, progress=False, **extra)
    mask = select_heads(scores, RATIO, "global")
    found, losses = refine_mask(
        model, mask, texts, tokenizer, steps=exchanges, scope="global", max_length=LENGTH, seed=seed
    )
    return {
        "task": task, "scorer": scorer, "seed": seed, "exchanges": len(losses) - 1,
        "guiding kl": losses[0], "guiding kl, found": min(losses), "kl": judge(mask), "kl, found": judge(found),
        "exchanged": sum(int((a & ~found[site]).sum()) for site, a in mask.items()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", required=True, type=Path)
    parser.add_argument("--fits", required=True, type=Path)
    parser.add_argument("--task", default="cola")
    parser.add_argument("--exchanges", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    calls = [
        (options.glue, options.fits, options.task, options.exchanges, scorer, seed)
        for seed, scorer in itertools.product(DRAWS, SCORERS)
    ]
    with workers(options.jobs, 1, "cpu") as pool:
        rows = list(each(pool, search_from, calls, "searching", True))
    rows.sort(key=lambda row: (SCORERS.index(row["scorer"]), row["seed"]))
    result = {
        **provenance(
            "python benchmarks/search_limit.py --glue GLUE --fits DIR "
            f"--task {options.task} --exchanges {options.exchanges}"
        ),
        "rows": rows,
    }
    write_text(Path(__file__).parent / "results" / "search_limit.json", json.dumps(result, indent=1) + "\n")
    print(f"| {options.task}, from the mask of | scores alone | after the search | the same on the texts that led it |")
    print("|---|---|---|---|")
    for scorer in SCORERS:
        cells = [
            [1e3 * row[name] for row in rows if row["scorer"] == scorer]
            for name in ("kl", "kl, found", "guiding kl", "guiding kl, found")
        ]
        one, two, three, four = (f"{statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for c in cells)
        print(f"| {scorer} | {one} | {two} | {three}, then {four} |")


if __name__ == "__main__":
    main()
