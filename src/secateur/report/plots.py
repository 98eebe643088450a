"""The page's pictures as files for papers, drawn by matplotlib from the same data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.comparing.summary import summarise
from secateur.errors import invalid
from secateur.report.agreement import agreement
from secateur.report.charts import DENSE_LOOK, RANDOM_LOOK, Chart
from secateur.report.curves import cost_charts, curves
from secateur.report.head_map import check_sites
from secateur.report.pruned import refinement_chart
from secateur.support.files import write_together
from secateur.units.picture import draw_grid, need_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "pdf")
COLOURS = ("#1b7548", "#2166ac", "#b35806", "#762a83", "#c51b7d", "#00798c", "#7a6a00", "#a4262c")
MARKERS = "s^DPvo_"


def write_plots(runs: Sequence[dict[str, Any]], folder: str | Path, kind: str = "svg") -> list[Path]:
    """Write every picture of `runs`, as `read_runs` returns them, to `folder`, all or none, and return the files.

    Raises what `draw_plots` raises, and `WriteError` where the disk does not take them.
    """
    drawn = draw_plots(runs, folder, kind)
    write_together(drawn)
    return list(drawn)


def draw_plots(runs: Sequence[dict[str, Any]], folder: str | Path, kind: str = "svg") -> dict[Path, bytes]:
    """Return every picture of `runs` by the file in `folder` that it belongs into.

    Names begin with the run's number where there are several. Raises `InvalidInputError` for an unknown format,
    for what is no folder, and where matplotlib is not installed.
    """
    if kind not in FORMATS:
        raise invalid("plot_format", f"be one of {', '.join(FORMATS)}", kind)
    if Path(folder).exists() and not Path(folder).is_dir():
        raise invalid("plots", "be a folder, or a name that is free for one", str(folder))
    need_matplotlib()
    import matplotlib

    # Text stays text, and the same data gives the same bytes.
    style: Any = {
        "text.parse_math": False,
        "svg.fonttype": "none",
        "pdf.fonttype": 42,
        "svg.hashsalt": "secateur",
        "axes.spines.top": False,
    }
    drawn: dict[Path, bytes] = {}
    seen: Counter[str] = Counter()
    with matplotlib.rc_context({**style, "axes.spines.right": False, "font.size": 9}):
        for number, run in enumerate(runs, 1):
            for name, figure in _figures(run):
                stem = f"{number}-{name}" if len(runs) > 1 else name
                seen[stem] += 1  # tasks such as a/b and a-b
                path = Path(folder) / f"{stem}{'' if seen[stem] == 1 else f'-{seen[stem]}'}.{kind}"
                drawn[path] = _rendered(figure, kind)
    return drawn


def _rendered(figure: Figure, kind: str) -> bytes:
    import io

    buffer = io.BytesIO()
    figure.savefig(
        buffer, format=kind, bbox_inches="tight", metadata={"Date" if kind == "svg" else "CreationDate": None}
    )
    return buffer.getvalue()


def _figures(run: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    if run["kind"] == "comparison":
        summaries = summarise(run["rows"])
        for chart in [*curves(run["rows"], summaries), *cost_charts(run["rows"], summaries)]:
            yield chart.slug, _chart(chart)
        for matrix in agreement(run["rows"], run["scores"]):
            yield matrix["slug"], _matrix(matrix)
        return
    sites = check_sites(run["sites"])
    yield "head-map", _head_map(sites, run["kind"] != "scores")
    if any(score is not None for site in sites for score in site["scores"]):
        yield "scores", _histogram(sites, run["kind"] != "scores")
    if len(run.get("refinement") or []) > 1:
        yield "refinement", _chart(refinement_chart(run["refinement"]))


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _chart(chart: Chart) -> Figure:
    figure, axes = _axes(4.2, 3)
    for series in chart.series:
        special = {DENSE_LOOK: ("black", "o"), RANDOM_LOOK: ("#777777", "_")}
        colour, marker = special.get(
            series.look, (COLOURS[series.look % len(COLOURS)], MARKERS[series.look % len(MARKERS)])
        )
        x, y = [p.x for p in series.points], [p.y for p in series.points]
        spread = [p.spread or 0.0 for p in series.points]
        marked = [n for n, p in enumerate(series.points) if p.marked]
        if series.line and len(x) > 1:
            drawn_as = "steps-post" if series.steps else "default"
            dashes = "--" if series.look == RANDOM_LOOK else "-"
            axes.plot(
                x, y, dashes, color=colour, drawstyle=drawn_as, marker=marker, markevery=marked, label=series.name
            )
            if any(spread):
                low, high = ([v + sign * s for v, s in zip(y, spread, strict=True)] for sign in (-1, 1))
                axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
        else:
            bars = spread if any(spread) else None
            size = 3 if series.small else 6
            axes.errorbar(x, y, bars, color=colour, fmt=marker, markersize=size, capsize=3, label=series.name)
    if chart.log_x:
        axes.set_xscale("log")
    if chart.x_at:
        axes.set_xticks(chart.x_at, [f"{value:.0%}" for value in chart.x_at])
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label, title=chart.title)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _head_map(sites: list[dict[str, Any]], decided: bool) -> Figure:
    names, scores, kept = ([site[key] for site in sites] for key in ("name", "scores", "kept"))
    figure, axes = _axes(1.5 + 0.3 * max(map(len, kept)), 0.8 + 0.3 * len(sites))
    image = draw_grid(axes, names, scores, kept if decided else None)
    axes.set(xlabel="head" + (" (x: removed)" if decided else ""))
    figure.colorbar(image, ax=axes, label="importance score")
    return figure


def _histogram(sites: list[dict[str, Any]], decided: bool) -> Figure:
    figure, axes = _axes(4.2, 3)
    sides = {True: "kept", False: "removed"} if decided else {True: "heads"}
    scores = [
        [
            score
            for site in sites
            for score, kept in zip(site["scores"], site["kept"], strict=True)
            if score is not None and (kept is side or not decided)
        ]
        for side in sides
    ]
    axes.hist(scores, bins=32, stacked=True, label=list(sides.values()), color=[COLOURS[0], "#c3cbc6"][: len(scores)])
    axes.set(xlabel="importance score", ylabel="heads")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _matrix(matrix: dict[str, Any]) -> Figure:
    names = matrix["names"]
    figure, axes = _axes(1.5 + 0.6 * len(names), 1 + 0.5 * len(names))
    values = [[float("nan") if x is None else x for x in row] for row in matrix["values"]]
    axes.imshow(values, cmap="Greens", vmin=0, vmax=1.6, aspect="auto")
    for i, row in enumerate(matrix["cells"]):
        for j, (shown, _) in enumerate(row):
            axes.text(j, i, shown, ha="center", va="center")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.spines[:].set_visible(False)
    axes.set(title=matrix["title"])
    return figure
