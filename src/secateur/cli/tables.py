"""The tables that the commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:  # each command waits for what its own table needs
    from secateur.comparing.summary import Summary
    from secateur.measuring.bench import Benchmark
    from secateur.meta_training.outcomes import Outcome
    from secateur.previewing import Preview
    from secateur.report.pruning_report import PruningReport
    from secateur.units.scores import Scores


def print_table(table: Table) -> None:
    """Print the title as plain lines and the table to stdout, as wide as the table needs where there is no terminal."""
    # Names come from models and files: a bracket in one is a bracket, and no style or emoji.
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    title, table.title = table.title, None
    if title:
        console.print(title, soft_wrap=True)
    if table.columns:
        console.print(table)


def info_table(facts: dict[str, Any]) -> Table:
    """Return one row for each attention site of `secateur info`."""
    title = f"{facts['model']}: {facts['class']}, {facts['parameters']:,} parameters"
    if not facts["prunable"]:
        return Table(title=f"{title}\nheads cannot be removed: {facts['reason']}")
    cost = facts["cost"]
    work = f"{cost['macs']:,} multiply-accumulates for {cost['batch']} x {cost['length']} tokens"
    others = "".join(f"\n{line}" for line in facts.get("others", []))
    table = Table(Column("attention site", no_wrap=True), title=f"{title}, {cost['heads']} heads, {work}{others}")
    for column in ("heads", "key-value heads", "removed before"):
        table.add_column(column, justify="right")
    for site in facts["sites"]:
        removed = site["original_heads"] - site["heads"]
        table.add_row(site["name"], str(site["heads"]), str(site["key_value_heads"]), str(removed))
    return table


def scores_table(scores: Scores) -> Table:
    """Return one row for each site of heads or layers, one column for each unit; higher = keep."""
    table = Table(Column("site", no_wrap=True), title=f"importance by {scores.scorer}, higher = keep")
    few = {site: vector for site, vector in scores.items() if scores.kinds[site] != "neurons"}
    for unit in range(max(map(len, few.values()), default=0)):
        table.add_column(str(unit), justify="right")
    for site, vector in few.items():
        table.add_row(site, *("-" if x == float("-inf") else f"{x:.3g}" for x in vector.tolist()))
    return table


def neurons_table(scores: Scores) -> Table:
    """Return one row for each site of neurons, of which there are thousands, with the quartiles of their scores."""
    import numpy as np

    table = Table(Column("site", no_wrap=True))
    for name in ("neurons", "lowest", "quarter", "median", "three quarters", "highest"):
        table.add_column(name, justify="right")
    for site, vector in scores.items():
        there = vector[vector > float("-inf")]
        if scores.kinds[site] == "neurons" and len(there):
            marks = np.quantile(there.numpy(), (0, 0.25, 0.5, 0.75, 1))
            table.add_row(site, str(len(there)), *(f"{mark:.3g}" for mark in marks))
    return table


def pruning_table(report: PruningReport) -> Table:
    """Return what a pruning removed: heads, parameters, multiply-accumulates."""
    from secateur.report.reading import cost_rows

    table = Table(Column("", no_wrap=True), title=f"{report.model}, scored by {report.scorer}")
    for column in ("before", "after", "ratio"):
        table.add_column(column, justify="right")
    for row in cost_rows(report.before.to_json(), report.after.to_json(), report.units):
        table.add_row(row["name"], f"{row['dense']:,}", f"{row['pruned']:,}", f"{row['pruned'] / row['dense']:.3f}")
    return table


def preview_table(found: Preview) -> Table:
    """Return one row for each budget: what would be left, and what that changes at the end of the model."""
    title = f"{found.model}, scored by {found.scorer} on {found.num_texts} texts; nothing is removed"
    table = Table(Column("budget", no_wrap=True), Column("macs left", justify="right"), title=title)
    timed = any(row.latency is not None for row in found.rows)
    for column in (*(["latency left"] if timed else []), "change", *found.rows[0].units):
        table.add_column(column, justify="right")
    for row in found.rows:
        shares = [row.macs] if row.latency is None else [row.macs, row.latency]
        kept = (f"{after} of {before}" for before, after in row.units.values())
        table.add_row(str(row.budget), *(f"{share:.3f}" for share in shares), f"{row.change:.4f}", *kept)
    return table


def benchmark_table(result: Benchmark) -> Table:
    """Return one row for each shape, kind of work and model: time, speed-up, its limit, memory."""
    from secateur.measuring.timing import quartiles

    machine = result.machine
    title = f"{machine['device']}, {machine['threads']} threads, {machine['clock']} clock; medians of rounds in turn"
    table = Table(*(Column(name, no_wrap=True) for name in ("work", "shape", "model")), title=title)
    for column in ("ms", "texts/s", "speed-up", "quartiles", "limit", "efficiency", "weights MB", "peak MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        low, speed_up, high = row.speed_up
        table.add_row(
            row.work,
            str(row.shape),
            row.model,
            f"{1000 * quartiles(row.seconds)[1]:.1f}",
            f"{row.texts_per_second:.1f}",
            f"{speed_up:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{row.limit:.3f}",
            f"{row.efficiency:.3f}",
            f"{result.weight_bytes[row.model] / 1e6:.1f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
        )
    return table


def demo_table(result: dict[str, Any]) -> Table:
    """Return the demo's one table: the dense model, half of its heads, and half of the model, with shares of dense."""
    table = Table(Column("", no_wrap=True), title=f"{result['model']} on {result['data']}")
    columns = {"dense": "dense", "heads": "half of the heads", "pruned": "half of the model"}
    for title in columns.values():
        table.add_column(title, justify="right")
    for row in result["rows"]:
        cells = [_shown(row["dense"], row["unit"])]
        cells += [f"{_shown(row[name], row['unit'])} ({row[name] / row['dense']:.2f})" for name in list(columns)[1:]]
        table.add_row(row["name"], *cells)
    return table


def comparison_table(summaries: list[Summary]) -> Table:
    """Return one row for each ratio and scorer, one column for each task: mean ± std, and the difference to dense."""
    by_cell = {(s.scorer, s.ratio, s.task): s for s in summaries}
    tasks = list(dict.fromkeys(s.task for s in summaries))
    title = "main metric over seeds (pruned - dense; * = unlikely to be chance, paired t-test, p < 0.05)"
    table = Table(Column("heads removed", no_wrap=True), Column("scorer", no_wrap=True), title=title)
    for task in [*tasks, "retention"]:
        table.add_column(task, justify="right")
    for scorer, ratio in dict.fromkeys((s.scorer, s.ratio) for s in summaries):
        cells = [by_cell.get((scorer, ratio, task)) for task in tasks]
        table.add_row(f"{ratio:.0%}", scorer, *map(_compared, cells), _retention(cells[-1]))
    return table


def held_out_table(rows: list[dict[str, Any]]) -> Table:
    """Return what the masks of the contribution and of a joint pruner cost on texts that it did not learn from."""
    title = "1000 times the relational KL on dev texts, half of the heads removed; lower is better"
    table = Table(*(Column(name, no_wrap=True) for name in ("model", "task", "allocation")), title=title)
    criteria = ("contribution", "joint_pruner")
    for name in criteria:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        values = (f"{1000 * row[name]:.1f}" for name in criteria)
        table.add_row(row["model"], row["task"], row["allocation"], *values)
    return table


def outcome_table(outcome: Outcome) -> Table:
    """Return what a meta-pruner's masks cost on held-out texts at start, best and last, beside the contribution's."""
    title = "1000 times the relational KL on dev texts; lower is better; contribution needs no training"
    table = Table(Column("task", no_wrap=True), title=title)
    looks = {"start": outcome.start, f"best ({outcome.best.step} updates)": outcome.best, "last": outcome.last}
    columns = {name: look.relational_kl for name, look in looks.items()}
    if outcome.contribution:
        columns["contribution"] = outcome.contribution
    for name in columns:
        table.add_column(name, justify="right")
    for task in outcome.start.relational_kl:
        table.add_row(task, *(f"{1000 * values[task]:.1f}" for values in columns.values()))
    means = (sum(values.values()) / len(values) for values in columns.values())
    table.add_row("mean", *(f"{1000 * mean:.1f}" for mean in means))
    return table


def markdown(table: Table) -> str:
    """Return a table as Markdown, for pages that keep results."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    lines = ["| " + " | ".join(row) + " |" for row in zip(*columns, strict=True)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def _compared(summary: Summary | None) -> str:
    if summary is None:
        return ""
    spread = "" if summary.std is None else f" ± {summary.std:.3f}"
    if summary.difference is None:
        return f"{summary.mean:.3f}{spread}"
    star = "*" if summary.is_noise is False else ""
    return f"{summary.mean:.3f}{spread} ({summary.difference:+.3f}{star})"


def _retention(summary: Summary | None) -> str:
    if summary is None or summary.retention is None:
        return "\N{EN DASH}" if summary is not None and summary.left_out else ""
    return f"{summary.retention:.1%}"


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if not unit else f"{value:.3f} {unit}" if value < 10 else f"{value:.1f} {unit}"
