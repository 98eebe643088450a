"""Draw the comparisons for the docs from their raw files.

python benchmarks/plots.py   # → docs/representations.svg, docs/glue.svg, docs/growth.svg, docs/learning_curves.svg
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from secateur.support.files import read_json, read_lines

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
COLOURS = {
    "random": "#888888",
    "contribution": "#1b7837",
    "smp": "#762a83",
    "smp-plus": "#c51b7d",
    "smp-plus, task unseen": "#c51b7d",
    "leave_one_out": "#2166ac",
    "magnitude": "#b35806",
}


def representations() -> None:
    """Relational KL as a share of random heads', mean over tasks; the band is the standard deviation over draws."""
    rows = read_json(RESULTS / "representations.json")["rows"]
    kl = defaultdict(list)
    for row in rows:
        if row["allocation"] != "uniform":
            continue
        kl[row["scorer"], row["ratio"], row["task"]].append((row["seed"], row["kl"]))
    tasks, ratios = sorted({r["task"] for r in rows}), sorted({r["ratio"] for r in rows})
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for scorer, colour in COLOURS.items():
        means, spreads = [], []
        for ratio in ratios:
            shares = defaultdict(list)
            for task in tasks:
                chance = statistics.mean(v for _, v in kl["random", ratio, task])
                for seed, value in kl.get((scorer, ratio, task), []):
                    shares[seed].append(value / chance)
            draws = [statistics.mean(values) for values in shares.values() if len(values) == len(tasks)]
            if draws:
                means.append(statistics.mean(draws))
                spreads.append(statistics.stdev(draws) if len(draws) > 1 else 0.0)
        if len(means) == len(ratios):
            axes.plot(ratios, means, marker="o", color=colour, label=scorer)
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(ratios, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="fraction of every layer's heads removed", ylabel="relational KL / that of random heads")
    axes.set_xticks(ratios)
    axes.legend(frameon=False)
    _save(figure, "representations")


def glue() -> None:
    """Each run's metric less that of the dense model with the same seed."""
    rows = read_lines(RESULTS / "glue.jsonl")
    dense = {(r["task"], r["seed"]): r["value"] for r in rows if r["scorer"] == "dense"}
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    scorers = [s for s in COLOURS if any(r["scorer"] == s for r in rows)]
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for place, scorer in enumerate(scorers):
        found = [r for r in rows if r["scorer"] == scorer]
        x = [tasks.index(r["task"]) + (place - (len(scorers) - 1) / 2) * 0.15 for r in found]
        y = [100 * (r["value"] - dense[r["task"], r["seed"]]) for r in found]
        axes.scatter(x, y, color=COLOURS[scorer], label=scorer, s=28)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set(ylabel="pruned - dense, points; a dot a seed")
    axes.legend(frameon=False, ncols=2, fontsize=8)
    _save(figure, "glue")


def growth() -> None:
    """CPU seconds of scoring against texts and tokens, and a line through the counted operations."""
    rows = read_json(RESULTS / "growth.json")["rows"]
    figure, both = plt.subplots(1, 2, figsize=(8, 3.6))
    for axes, what, fixed in zip(both, ("texts", "tokens"), ("tokens", "texts"), strict=True):
        least = min(row[what] for row in rows)
        same = next(row[fixed] for row in rows if row[what] > least)
        for scorer, colour in (("contribution", COLOURS["contribution"]), ("entropy", COLOURS["leave_one_out"])):
            found = sorted((r for r in rows if r["scorer"] == scorer and r[fixed] == same), key=lambda r: r[what])
            x, middle = [r[what] for r in found], [statistics.median(r["cpu_seconds"]) for r in found]
            reach = [[m - min(r["cpu_seconds"]) for m, r in zip(middle, found, strict=True)],
                     [max(r["cpu_seconds"]) - m for m, r in zip(middle, found, strict=True)]]  # fmt: skip
            axes.errorbar(x, middle, yerr=reach, marker="o", color=colour, label=scorer, capsize=2)
        counted = [r["macs"] / found[0]["macs"] * middle[0] for r in found]
        axes.plot(x, counted, color="black", linewidth=0.8, linestyle=":", label="as multiply-accumulates")
        axes.plot(x, [middle[0] * n / x[0] for n in x], color="#888888", linewidth=0.8, label="linear")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(xlabel=f"{what} ({found[0][fixed]} {fixed})", ylabel="CPU seconds")
    both[0].legend(frameon=False, fontsize=8)
    _save(figure, "growth")


def learning_curves() -> None:
    """Relational KL of the deterministic mask on held-out texts, mean over tasks; and the loss of the steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, run in read_json(RESULTS / "learning_curves.json").items():
        steps = [step for step, _ in run["held_out"]]
        left.plot(steps, [statistics.mean(values.values()) for _, values in run["held_out"]], "o-", label=name)
        losses = [statistics.mean(values.values()) for _, values in run["losses"]]
        window = 25
        smooth = [statistics.mean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
        scale = smooth[min(window, len(smooth)) - 1]
        right.plot([step for step, _ in run["losses"]], [x / scale for x in smooth], label=name)
    left.set(title="deterministic mask, held-out texts", xlabel="step", ylabel="relational KL (lower is better)")
    right.set(title="loss of the steps, mean of 25", xlabel="step", ylabel="relative to step 25")
    right.set_ylim(0, 3)
    left.set_ylim(bottom=0)
    left.legend()
    figure.suptitle("Meta-training on all-MiniLM-L6-v2")
    _write(figure, "learning_curves")


def _save(figure: plt.Figure, name: str) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _write(figure, name)


def _write(figure: plt.Figure, name: str) -> None:
    # No date and fixed ids, so that the same numbers give the same file.
    plt.rcParams["svg.hashsalt"] = "secateur"
    figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})
    print(DOCS / f"{name}.svg")


if __name__ == "__main__":
    representations()
    if (RESULTS / "glue.jsonl").is_file():
        glue()
    if (RESULTS / "growth.json").is_file():
        growth()
    learning_curves()
