"""Units in a grid as a figure of matplotlib, a row a site: how they were scored, and which stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from secateur.errors import InvalidInputError
from secateur.units.grid import MOST_CELLS, short_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDE = 20
"""As many cells as this is a panel wide at least that has more units than get a cell of their own size."""


def need_matplotlib() -> None:
    """Raise `InvalidInputError` where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InvalidInputError("plots need matplotlib; install it with: pip install 'secateur[plots]'") from None


def mask_figure(kept: Mapping[str, Tensor]) -> Figure:
    """Draw which units stay, `kept` bool `[units]`: dark cells, and crosses where units go.

    Sites with more units than have a cross each are a panel of their own.
    """
    panels: dict[str, list[str]] = {}
    for site, row in kept.items():
        panels.setdefault("unit (x: removed)" if len(row) <= MOST_CELLS else "unit (dark: kept)", []).append(site)
    figure, all_axes = _panels(kept, list(panels.values()))
    for axes, (label, sites) in zip(all_axes, panels.items(), strict=True):
        rows = [kept[site].tolist() for site in sites]
        draw_grid(axes, sites, rows, rows if "x:" in label else None).set_clim(0, 1.2)
        axes.set(xlabel=label)
    return figure


def scores_figure(scores: Mapping[str, Tensor], kinds: Mapping[str, str]) -> Figure:
    """Draw scores, float `[units]`: a panel and a scale for each kind of units, and no cell where the score is -inf."""
    panels: dict[str, list[str]] = {}
    for site in scores:
        panels.setdefault(kinds[site], []).append(site)
    figure, all_axes = _panels(scores, list(panels.values()))
    for axes, (kind, sites) in zip(all_axes, panels.items(), strict=True):
        image = draw_grid(axes, sites, [[x if x > -float("inf") else None for x in scores[s].tolist()] for s in sites])
        axes.set(xlabel=kind.removesuffix("s"))
        figure.colorbar(image, ax=axes, label="importance score")
    return figure


def draw_grid(
    axes: Any,
    sites: Sequence[str],
    values: Sequence[Sequence[float | None]],
    kept: Sequence[Sequence[bool]] | None = None,
) -> Any:
    """Draw a row of cells for each of `sites`, the darker the higher its value; return the image.

    `values` and `kept` have a row for each site, and rows may be of unlike lengths. None is left blank, and what is not
    `kept` has a cross.
    """
    import numpy as np

    cells = np.full((len(sites), max(map(len, values))), np.nan)
    for number, row in enumerate(values):
        cells[number, : len(row)] = [np.nan if value is None else value for value in row]
    image = axes.imshow(cells, cmap="Greens", aspect="auto")
    for number, row in enumerate(kept or []):
        for unit, stays in enumerate(row):
            if not stays:
                axes.plot(unit, number, "x", color="black", markersize=6)
    axes.set_yticks(range(len(sites)), short_labels(list(sites)))
    axes.spines[:].set_visible(False)
    return image


def _panels(rows: Mapping[str, Tensor], panels: Sequence[Sequence[str]]) -> tuple[Figure, list[Any]]:
    """Return a figure with axes for each list of sites, one below the other."""
    need_matplotlib()
    from matplotlib import pyplot

    columns = max(len(row) if len(row) <= MOST_CELLS else _WIDE for row in rows.values())
    heights = [0.8 + 0.3 * len(sites) for sites in panels]
    # Made by pyplot, as notebooks show its figures; closed, as they would show it twice and pyplot would keep it.
    figure = pyplot.figure(figsize=(2.5 + 0.3 * columns, sum(heights)), layout="constrained")
    pyplot.close(figure)
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
    return figure, list(axes[:, 0])
