"""What budgets would leave of a model, and what that changes, before anything is cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from secateur.choosing.allocation import SensitivitySelection
from secateur.choosing.by_cut import kinds_there, selection_of
from secateur.errors import InvalidInputError, invalid
from secateur.models.loading import load_model
from secateur.models.names import original_name
from secateur.models.state import check_plain_weights
from secateur.pruning_plan import check_steps, recommended, without_held_out
from secateur.scorers import DEFAULT_SCORER
from secateur.scorers.given import check_given, fitting
from secateur.scorers.score import AnyScorer, Labels, check_options, score
from secateur.settings import Budget, Cut, Reading, cut_of, settings_of
from secateur.support.defaults import PREVIEW_SHARES
from secateur.support.interrupts import interruptible
from secateur.texts.calibration import PreparedModel, texts_of
from secateur.texts.examples import examples_of
from secateur.texts.tokenization import Text
from secateur.units.masks import Mask, units_left
from secateur.units.scores import Scores

COUNT_ALL = ("macs", "params", "latency")
USUAL_BUDGETS = tuple(f"macs={share}" for share in PREVIEW_SHARES)


@dataclass(frozen=True)
class PreviewRow:
    """What one budget would leave.

    `macs` is the share of the multiply-accumulates that stays, `latency` that of the time, as its table says, None for
    a budget of another kind. `change` is predicted: what the end of the model moves by before it is taught, as a share
    of the variance of its last hidden states, summed over what each site changes alone; 0 = nothing. `units` has, for
    each kind, how many there are and how many would stay, `mask` which.
    """

    budget: Budget
    macs: float
    latency: float | None
    change: float
    units: dict[str, tuple[int, int]]
    mask: Mask

    def __str__(self) -> str:
        """Say it in one line."""
        kept = ", ".join(f"{after} of {before} {kind}" for kind, (before, after) in self.units.items())
        time = "" if self.latency is None else f", latency {self.latency:.3f}"
        return f"{self.budget}: macs {self.macs:.3f}{time}, change {self.change:.4f}, {kept}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, without the mask."""
        units = {kind: list(counts) for kind, counts in self.units.items()}
        numbers = {"macs": self.macs, "latency": self.latency, "change": self.change}
        return {"budget": str(self.budget), **numbers, "units": units}


@dataclass(frozen=True)
class Preview:
    """What each of several budgets would leave of a model, from the largest that was asked for; those in reach."""

    model: str
    scorer: str
    num_texts: int
    rows: tuple[PreviewRow, ...]

    def __str__(self) -> str:
        """Say it in a line for each budget."""
        return "\n".join(map(str, self.rows))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        about = {"model": self.model, "scorer": self.scorer, "num_texts": self.num_texts}
        return {"kind": "preview", **about, "rows": [row.to_json() for row in self.rows]}


@interruptible
def preview(
    model: str | Path | nn.Module,
    texts: Iterable[Text] | None = None,
    budgets: Sequence[str | Budget] = USUAL_BUDGETS,
    *,
    scorer: AnyScorer | Scores = DEFAULT_SCORER,
    labels: Labels | None = None,
    inputs: Sequence[Mapping[str, Tensor]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cut: Cut | None = None,
    reading: Reading | None = None,
    **options: Any,
) -> Preview:
    """Predict what `prune` would leave of a model within each of several budgets, and what that changes.

    Nothing is cut, and the model stays as it is. Scores and sensitivities are those that `prune` finds by allocation
    "sensitivity", each measured once, for all budgets.

    Args:
        model: as `prune` takes it.
        texts: calibration texts, 8 or more, in a list.
        budgets: of what counts all units, such as "macs=0.5", all of one quantity and shape. What cannot be reached is
            left out.
        cut: what else may go, as `prune` takes it, by allocation "sensitivity": by default heads and neurons, and
            layers too where it is plain. `budgets` take the place of its ratio and its budget, and no heads are
            exchanged.

    The other arguments are those of `prune`. Raises `InvalidInputError` for what `prune` refuses, for budgets of
    several quantities, and where none can be reached.
    """
    reading = settings_of(reading, Reading)
    texts = texts_of(texts) if inputs is None else cast(Any, examples_of(cast(Any, texts), inputs))
    asked = _of_one_quantity(budgets)
    check_options(options, preview, scorer)
    check_given(scorer, options, reading)
    cut = cut_of(cut, pruning_ratio=0, budget=replace(asked[0], limit=1.0))
    if cut.allocation not in (None, "sensitivity"):
        raise invalid("allocation", "be None or 'sensitivity' in a preview", cut.allocation)
    restore = recommended(cut, None, texts)[1]
    cut = replace(cut, allocation="sensitivity")
    check_steps(texts, cut, "none", 1, reading)
    texts, labels, _, reading = without_held_out(texts, labels, restore, reading)  # what `prune` scores, unasked
    there = load_model(model, reading.device) if isinstance(model, str | Path) else model
    prepared = PreparedModel(there, tokenizer, reading)
    check_plain_weights(prepared.base)
    cut = replace(cut, units=kinds_there(prepared, cut))
    selection = cast(
        SensitivitySelection, selection_of(prepared, cut, texts, reading, prepared.sites_of(cut.kinds))
    )  # fmt: skip
    if isinstance(scorer, Scores):
        scores = fitting(scorer, prepared.sites_of(cut.kinds))
    else:
        scores = score(prepared, texts, scorer, units=cut.kinds, labels=labels, cut=cut, reading=reading, **options)
    rows = _rows(selection, scores, asked)
    name = original_name(prepared.model) or type(prepared.model).__name__
    return Preview(name, scores.scorer, scores.num_texts or 0, tuple(rows))


def _of_one_quantity(budgets: Any) -> list[Budget]:
    """Return the budgets, the largest first. Raises `InvalidInputError` where they do not go together."""
    rule = "be a list of budgets that count all units, of one quantity and shape, such as ['macs=0.75', 'macs=0.5']"
    if not isinstance(budgets, list | tuple) or not budgets:
        raise invalid("budgets", rule, budgets)
    found = sorted(map(Budget.of, budgets), key=lambda budget: -budget.limit)
    if len({(one.quantity, one.shape) for one in found}) > 1 or found[0].quantity not in COUNT_ALL:
        raise invalid("budgets", rule, [str(one) for one in found])
    return list(dict.fromkeys(found))


def _rows(selection: SensitivitySelection, scores: Scores, asked: Sequence[Budget]) -> list[PreviewRow]:
    """Return a row for each budget in reach. Raises `InvalidInputError` where none is."""
    measured = selection.measure(scores)
    rows: list[PreviewRow] = []
    for budget in asked:
        within = selection.at(budget)
        try:
            mask, change = within.choose(scores, measured)
        except InvalidInputError:
            if not rows:
                raise
            continue
        macs = within.costs.after(mask).macs / within.costs.dense.macs
        latency = within.share(mask) if budget.quantity == "latency" else None
        rows.append(PreviewRow(budget, macs, latency, change, units_left(within.sites, mask), mask))
    return rows
