"""Which heads match words between two texts, and what fine-tuning makes of masks that lose them.

For each task of pairs: the matching of every head of all-MiniLM-L6-v2 on 96
training texts, as the `matching` scorer counts it; and for each weight that the scorer could give it, in how many of
36 cells (six tasks, three ratios, two allocations) the heads above a matching of .2 all stay. Then every run of
results/rivals.jsonl on such a task, `matching`'s own left out, is put with those whose mask keeps as many of the
heads above a matching of .2; what they kept of the dense model's quality is shown for each number.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from typing import Any

from benchmarks.runs import LENGTH, RESULTS, SCORED, Run, inputs, minilm
from torch import Tensor

from secateur.comparing.plan import DENSE
from secateur.pruners.evidence import gather_evidence
from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.support.files import read_lines
from secateur.units.select import select

MATCHES = 0.2


def matching_of(model: Any, tokenizer: Any, texts: list[Any]) -> dict[str, Tensor]:
    """Return each site's matching, `[heads]`."""
    special = frozenset(tokenizer.all_special_ids)
    made = inputs(model, tokenizer, texts)
    evidence = gather_evidence(model, find_sites(model), made, True, special_ids=special, maps=False)
    assert evidence.matching is not None  # asked for
    return evidence.split(evidence.matching)


def cells_that_keep(run: Run, heads: dict[str, dict[str, list[float]]], weight: float) -> int:
    """Return how many masks of `matching` (task x ratio x allocation) keep all heads that match, at that weight."""
    (model, tokenizer), kept = minilm(), 0
    for task, rows in heads.items():
        scores = score(
            model,
            run.texts(task),
            "matching",
            tokenizer,
            weight=weight,
            reading=Reading(max_length=LENGTH, progress=False),
        )
        for ratio, allocation in itertools.product((0.25, 0.5, 0.75), ("uniform", "ranking")):
            mask = select(scores, ratio, allocation)
            kept += all(bool(mask[site][h]) for site, row in rows.items() for h, v in enumerate(row) if v > MATCHES)
    return kept


def measure(run: Run) -> None:
    heads, groups = {}, defaultdict(list)
    for task in run.tasks:
        found = matching_of(*minilm(), run.texts(task))
        heads[task] = {site: row.tolist() for site, row in found.items()}
        top = sorted(
            ((float(v), n, h) for n, row in enumerate(found.values()) for h, v in enumerate(row)), reverse=True
        )
        print(task, "layer.head matching:", ", ".join(f"{n}.{h} {v:.2f}" for v, n, h in top[:5]))
    weights = {weight: cells_that_keep(run, heads, weight) for weight in (0, 1, 2, 4, 8, 16)}
    print("weight, and cells of 36 that keep the heads that match:", weights)
    runs = read_lines(RESULTS / "rivals.jsonl")
    dense = {(one["task"], one["seed"]): one["value"] for one in runs if one["scorer"] == DENSE}
    for one in runs:
        if one["task"] in run.tasks and one["scorer"] not in (DENSE, "matching"):
            those = [(site, h) for site, row in heads[one["task"]].items() for h, v in enumerate(row) if v > MATCHES]
            kept = sum(h in one["kept_heads"][site] for site, h in those)
            groups[one["task"], one["ratio"], kept].append(one["value"] / dense[one["task"], one["seed"]])
    rows = [
        {"task": task, "ratio": ratio, "matching_heads_kept": kept, "retention": values}
        for (task, ratio, kept), values in sorted(groups.items())
    ]
    for row in rows:
        values = row["retention"]
        print(
            f"{row['task']} {row['ratio']:.0%}, {row['matching_heads_kept']} kept: {statistics.mean(values):.3f} "
            f"({min(values):.3f} to {max(values):.3f}), {len(values)} runs"
        )
    run.write(
        texts={"split": "train", "number": SCORED, "tokens": LENGTH},
        counts_as_matching_above=MATCHES,
        heads=heads,
        cells_of_36_that_keep_them_by_weight=weights,
        runs=rows,
    )
