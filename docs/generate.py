"""The pages that follow from the code: every scorer of the registry, and the public names."""

from __future__ import annotations

import inspect
import math
import statistics
from pathlib import Path
from typing import Any

import secateur
from secateur.comparing.plan import DENSE
from secateur.comparing.summary import ALL_TASKS, summarise
from secateur.scorers import DEFAULT_SCORER, SCORERS, scorer_class
from secateur.support.files import read_json, read_lines

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

USES = {
    "Prune": ["prune", "PruningReport", "preview", "Preview"],
    "What may go, and how texts are read": ["Cut", "Reading"],
    "Score, select, remove": ["score", "Scores", "select", "allocate", "refine_mask", "Mask", "gated", "remove_"],
    "Look at a model": ["find_sites", "find_units"],
    "Restore": ["reconstruct_", "distill_"],
    "Scorers of your own": ["Scorer", "train_joint_pruner", "JointPruner", "train_meta_pruner", "MetaPruner"],
    "Errors": ["SecateurError", "InvalidInputError", "UnsupportedModelError", "RemovalError", "CheckpointError"],
}
"""What each public name is for: the order of the page of the API."""

MODULES = [
    "secateur.sites.attention_maps",
    "secateur.texts.data",
    "secateur.finetuning.finetune",
    "secateur.finetuning.evaluate",
    "secateur.comparing.compare",
    "secateur.comparing.plan",
    "secateur.comparing.protocols",
    "secateur.comparing.summary",
    "secateur.report",
    "secateur.report.reading",
    "secateur.scorers",
    "secateur.scorers.base",
    "secateur.scorers.labelled",
    "secateur.scorers.learned",
    "secateur.meta_training.config",
    "secateur.meta_training.subjects",
    "secateur.meta_training.held_out",
    "secateur.meta_training.paper",
    "secateur.meta_training.joint_config",
    "secateur.meta_training.joint_training",
    "secateur.meta_training.joint_held_out",
    "secateur.sites.gating",
    "secateur.measuring.cost",
]
"""What is of use beyond the names of the package itself."""


def scorers_page() -> str:
    """Return a page with a table of all registered scorers, and a section for each: what it says of itself."""
    lines = [
        "# Every scorer and its options",
        "",
        "Made from the code. [Scorers](../scorers.md) says what each reads.",
        "",
        "| scorer | scores | passes over the texts | labels | gradients |",
    ]
    lines += ["|---|---|---|---|---|"]
    for name in sorted(SCORERS):
        kind = scorer_class(name)
        needs = " | ".join("yes" if need else "no" for need in (kind.needs_labels, kind.needs_gradients))
        lines.append(f"| [`{name}`](#{name}) | {kind.description} | {kind.passes} | {needs} |")
    for name in sorted(SCORERS):
        lines += ["", f"({name})=", f"## {name}", "", *_section(name)]
    return "\n".join(lines) + "\n"


def _section(name: str) -> list[str]:
    kind = scorer_class(name)
    default = " The default." if name == DEFAULT_SCORER else ""
    lines = [f"{kind.description[0].upper()}{kind.description[1:]}.{default}", ""]
    lines += [f"- Source: {kind.source}", f"- Forward passes over the texts: {kind.passes}"]
    facts = [
        (kind.needs_texts, "texts"),
        (kind.needs_labels, "labels"),
        (kind.needs_gradients, "gradients"),
        (kind.needs_ratio, "the pruning ratio, for which alone its scores are good"),
    ]
    needed = [word for need, word in facts if need]
    lines += [f"- Needs: {', '.join(needed) if needed else 'nothing but the weights'}"]
    options = [] if kind.__init__ is object.__init__ else list(inspect.signature(kind).parameters.values())
    shown = ", ".join(f"`{option.name}={option.default!r}`" for option in options)
    lines += [f"- Options and their defaults: {shown or 'none'}", "", "```{eval-rst}"]
    return [*lines, f".. autoclass:: {kind.__module__}.{kind.__qualname__}", "   :no-index:", "```"]


def rivals_table(name: str) -> str:
    """Return what the rows of a comparison of rivals say, best first at each ratio: it follows from the raw file."""
    rows = read_lines(RESULTS / f"{name}.jsonl")
    found = {(s.scorer, s.ratio, s.task): s for s in summarise(rows)}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = ["| heads removed | scorer | " + " | ".join(tasks) + " | retention | scoring, s |"]
    lines.append("|---" * (len(tasks) + 4) + "|")
    # A cell that was not run on every task has no mean.
    every = [(s.ratio, s.scorer) for s in found.values() if s.task == ALL_TASKS]
    cells = sorted(every, key=lambda cell: (cell[0], -(found[cell[1], cell[0], ALL_TASKS].retention or 0)))
    for ratio, scorer in cells:
        marks = [found[scorer, ratio, task] for task in tasks]
        values = [f"{m.mean:.3f}" + (f" ± {m.std:.3f}" if m.std is not None else "") for m in marks]
        retention = found[scorer, ratio, ALL_TASKS].retention
        seconds = [
            r["cost"]["scoring_seconds"] for r in rows if (r["ratio"], r["scorer"]) == (ratio, scorer) != (0.0, DENSE)
        ]
        last = "" if retention is None else f"{retention:.1%}", f"{statistics.median(seconds):.1f}" if seconds else ""
        lines.append(
            f"| {ratio:.0%} | {scorer if scorer == DENSE else f'`{scorer}`'} | " + " | ".join([*values, *last]) + " |"
        )
    return "\n".join(lines) + "\n"


def rivals_together() -> str:
    """Return what each scorer keeps over the tasks of both comparisons of rivals, by ratio, the best mean first."""
    rows = [row for name in ("rivals", "rivals_mnli_qnli") for row in read_lines(RESULTS / f"{name}.jsonl")]
    kept = {(s.scorer, s.ratio): s.retention or 0.0 for s in summarise(rows) if s.task == ALL_TASKS}
    ratios = sorted({ratio for _, ratio in kept} - {0.0})
    scorers = sorted({name for name, _ in kept} - {DENSE}, key=lambda name: -sum(kept[name, r] for r in ratios))
    lines = ["| scorer | " + " | ".join(f"{ratio:.0%} of the heads removed" for ratio in ratios) + " |"]
    lines.append("|---" * (1 + len(ratios)) + "|")
    lines += [f"| `{name}` | " + " | ".join(f"{kept[name, ratio]:.1%}" for ratio in ratios) + " |" for name in scorers]
    return "\n".join(lines) + "\n"


def all_texts_table() -> str:
    """Return what each scorer keeps with all training texts, where all tasks were run thrice, the best first."""
    rows = read_lines(RESULTS / "full_finetuning.jsonl")

    def label(row: dict[str, Any]) -> str:
        restored = [word for key, word in (("reconstruct", "reconstructed"), ("distill", "distilled")) if key in row]
        return f"{row['allocation']} | `{row['scorer']}`{''.join(f', {word}' for word in restored)}"

    named = [{**row, "scorer": label(row) if row["allocation"] else DENSE} for row in rows]
    found = {(s.scorer, s.task): s for s in summarise(named)}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = ["| allocation | scorer | " + " | ".join(tasks) + " | retention |", "|---" * (len(tasks) + 3) + "|"]
    whole = [s for s in found.values() if s.task == ALL_TASKS and s.runs == 3]
    for one in sorted(whole, key=lambda s: -(s.retention or math.inf)):
        values = [f"{found[one.scorer, task].mean:.3f} ± {found[one.scorer, task].std:.3f}" for task in tasks]
        kept = "" if one.retention is None else f"{one.retention:.1%}"
        lines.append(f"| {'| ' * (one.scorer == DENSE)}{one.scorer} | " + " | ".join([*values, kept]) + " |")
    return "\n".join(lines) + "\n"


def mutation_tables() -> str:
    """Return what each module's mutants came to, and every survivor with its reason: it follows from the raw file."""
    found = read_json(RESULTS / "mutation.json")
    lines = ["| module | mutants | killed | too slow, so killed | survived |", "|---|---|---|---|---|"]
    for module, row in found["modules"].items():
        counts = [row.get(outcome, 0) for outcome in ("killed", "timeout", "survived")]
        tried = row["mutants"] - row.get("untested", 0)
        lines.append(f"| `{module}` | " + " | ".join(map(str, [tried or "not run", *counts])) + " |")
    lines += ["", "| survivor in | the mistake | why no test notices |", "|---|---|---|"]
    for one in found["survivors"]:
        where, *changes = one["diff"].splitlines()
        is_left_out = one["operator"] in ("LeaveOut", "RemoveDecorator")
        wanted = "-" if is_left_out else "+"
        shown = " ".join(line[1:].strip() for line in changes if line.startswith(wanted)).replace("|", "\\|").strip()
        shown = f"`` {shown} ``"  # a line may hold backticks of its own
        what = f"left out: {shown}" if is_left_out else shown
        lines.append(f"| `{one['module']}`, {where} | {what} | {one['reason'] or 'NOT EXPLAINED'} |")
    return "\n".join(lines) + "\n"


def api_page() -> str:
    """Return a page with the public names of the package by their use, then those of its modules."""
    lines = ["# API", "", "From the code's own docstrings. `import secateur` is enough for all but the modules."]
    for use, names in USES.items():
        lines += ["", f"## {use}", "", "```{eval-rst}"]
        for name in names:
            if inspect.isclass(getattr(secateur, name)):
                lines += [f".. autoclass:: secateur.{name}", "   :members:", "   :no-undoc-members:", ""]
            else:
                lines += [f".. autofunction:: secateur.{name}", ""]
        lines += ["```"]
    lines += ["", "## Modules"]
    for name in MODULES:
        lines += ["", f"### {name}", "", "```{eval-rst}", f".. automodule:: {name}", "   :members:"]
        lines += ["   :no-index:", "```"]
    return "\n".join(lines) + "\n"
