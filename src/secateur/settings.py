"""What travels together, checked once where it is made: how texts are read, what may go, and what may remain."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from accelerate import Accelerator

from secateur.errors import InvalidInputError, invalid
from secateur.models.loading import SPREAD, check_device
from secateur.sites.finding import check_units
from secateur.support.checks import (
    check_accelerator,
    check_flag,
    check_path,
    check_seed,
    check_whole,
    did_you_mean,
    is_number,
)
from secateur.support.defaults import BATCH_SIZE, FLOOR, MAX_LENGTH, MULTIPLE, PRUNING_RATIO, UNITS
from secateur.units.scores import Scores
from secateur.units.select import Allocation, check_selection

Stop = int | Literal["all", "auto"]
"""How many texts to read: all that are passed in, a number of them, or as many as it takes."""

Restore = Literal["none", "reconstruct", "distill"]
"""How far quality is restored: not at all, by refitting what kept units write, or by teaching the model as well."""

AnyAllocation = Literal["uniform", "ranking", "sensitivity"]
"""How many units each site keeps: as `select` takes it, or by what each site alone changes at the end of the model."""

Quantity = Literal["heads", "neurons", "layers", "params", "macs", "latency", "similarity"]
_FORM = re.compile(r"(\w+)=([0-9.]+)x?(?:@(.+))?")
_NEARLY = re.compile(r"(\w+)=([0-9.]+)(x|%)?(?:@.+)?")
_SHAPED = ("macs", "latency")
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Reading:
    """How texts are read, wherever a function takes `reading`.

    Args:
        batch_size: texts a batch; halved, with a `SecateurWarning`, while a batch does not fit into memory.
        max_length: tokens a text, at most.
        seed: of everything that is drawn at random.
        stop: how many of the calibration texts are read: "all", a number, drawn with the seed, or "auto": in random
            order, until the units to keep have settled.
        bf16: whether matrix products are computed in bfloat16 (torch.autocast): faster where the device has it, far
            slower on a CPU that has not. What is read of a pass is summed in float32.
        device: where a model that is loaded by name goes, or where a training runs; None is a GPU where there is one,
            "auto" spreads a model over GPUs, memory and disk, as `device_map="auto"` does.
        accelerator: of the processes that `accelerate launch` or torchrun started, all of which make the same call:
            each reads a share of the batches, and all get what one process would have got, bit for bit.
        maps: whether the mean attention maps of the first few texts are kept, for a page; it takes a pass over them.
        progress: whether to show progress bars on stderr.

    Raises `InvalidInputError` for values outside their ranges.
    """

    batch_size: int = BATCH_SIZE
    max_length: int = MAX_LENGTH
    seed: int = 0
    stop: Stop = "all"
    bf16: bool = False
    device: str | None = None
    accelerator: Accelerator | None = None
    maps: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size)
        check_whole("max_length", self.max_length, 4)
        check_seed(self.seed)
        check_stop(self.stop)
        if self.device not in (None, SPREAD):
            check_device(self.device)
        check_accelerator(self.accelerator)
        for name in ("bf16", "maps", "progress"):
            check_flag(name, getattr(self, name))

    def with_batches_of(self, batch_size: int) -> Reading:
        """Return the same reading in batches of another size."""
        return replace(self, batch_size=batch_size)


def said_of(reading: Reading) -> dict[str, Any]:
    """Return what a result file says of how texts were read."""
    return {name: getattr(reading, name) for name in ("batch_size", "max_length", "seed", "bf16")}


def check_stop(stop: Any) -> None:
    """Raise `InvalidInputError` unless `stop` is "all", "auto" or a whole number from 1."""
    number = isinstance(stop, int) and not isinstance(stop, bool) and stop >= 1
    if not number and stop not in ("all", "auto"):
        raise invalid("stop", "be 'all', 'auto' or a whole number from 1", stop)


class Shape(NamedTuple):
    """Texts a batch, and tokens a text."""

    batch: int
    length: int

    def __str__(self) -> str:
        """Return the form that `parse_shape` reads."""
        return f"{self.batch}x{self.length}"


def parse_shape(text: str) -> Shape:
    """Read `8x128`, 8 texts of 128 tokens. Raises `InvalidInputError` for other forms."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip())
    if found is None:
        raise invalid("shape", "be BATCHxLENGTH, such as 8x128", text)
    return Shape(int(found[1]), int(found[2]))


_ONE_TEXT = Shape(1, 128)


@dataclass(frozen=True)
class Budget:
    """How much of a quantity of a model may remain: `limit`, in (0, 1], at `shape` where it depends on one.

    Of "similarity", the mean cosine of representations to those of the dense model, at least as much remains. Raises
    `InvalidInputError` for anything else.
    """

    quantity: Quantity
    limit: float
    shape: Shape = _ONE_TEXT

    def __post_init__(self) -> None:
        if not _can_be(self.quantity, self.limit) or not isinstance(self.shape, Shape):
            raise _refused(self)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `heads=0.5`, `params=0.9`, `macs=0.85`, `macs=0.85@1x512` or `latency=0.8x@8x128`; the `x` is optional.

        Multiply-accumulates are those of 1 x 128 tokens where no shape is named; latency needs one. Raises
        `InvalidInputError` for anything else.
        """
        found = _FORM.fullmatch(text.strip()) if isinstance(text, str) else None
        quantity, number, shape = found.groups() if found else ("", "", None)
        try:
            limit = float(number)
        except ValueError:
            limit = -1.0
        shaped = quantity in _SHAPED if shape is not None else quantity != "latency"
        if not _can_be(quantity, limit) or not shaped:
            raise _refused(text)
        return cls(quantity, limit, _ONE_TEXT if shape is None else parse_shape(shape))  # type: ignore[arg-type]

    @classmethod
    def of(cls, budget: str | Budget) -> Budget:
        """Return a budget as it is, and read one that is a text."""
        return budget if isinstance(budget, Budget) else cls.parse(budget)

    def __str__(self) -> str:
        """Return the form that `parse` reads."""
        return f"{self.quantity}={self.limit:g}" + (f"@{self.shape}" if self.quantity in _SHAPED else "")


def _can_be(quantity: Any, limit: Any) -> bool:
    return quantity in get_args(Quantity) and is_number(limit, above=0) and limit <= 1


def _refused(budget: object) -> InvalidInputError:
    *names, last = (f"{name}=" for name in get_args(Quantity))
    rule = f"be {', '.join(names)} or {last} with a number in (0, 1], and for latency a shape"
    return invalid("budget", f"{rule}, such as latency=0.8x@8x128", budget, _guess(budget))


def _guess(budget: object) -> str:
    """Return what may have been meant by a refused budget: a name near one, a percentage, or by how much less."""
    found = _NEARLY.fullmatch(budget.strip()) if isinstance(budget, str) else None
    if found is None:
        return ""
    quantity, number, unit = found.groups()
    if quantity not in get_args(Quantity):
        return did_you_mean(quantity, get_args(Quantity))
    try:
        limit = float(number)
    except ValueError:
        return ""
    if 1 < limit < 10 and (unit == "x" or quantity == "latency"):
        return f"did you mean {1 / limit:.3g}{unit or ''}?"
    is_percentage = unit == "%" or 10 <= limit <= 100
    return f"did you mean {limit / 100:g}?" if is_percentage else ""


AnyBudget = str | Budget | Sequence[Budget]
"""A budget, several, or the text of either: `heads=0.75,neurons=0.5`."""


def budgets_of(budget: AnyBudget) -> tuple[Budget, ...]:
    """Return budgets that hold together, from one, several, or a text with commas between them.

    Each kind of units has one at most, and so has what counts all of them: params, macs or latency; a similarity stands
    alone. Raises `InvalidInputError` for others.
    """
    if not isinstance(budget, str | Budget | list | tuple):
        raise _refused(budget)
    parts = budget.split(",") if isinstance(budget, str) else [budget] if isinstance(budget, Budget) else budget
    found = tuple(Budget.of(part) for part in parts)
    names = [one.quantity if one.quantity in UNITS else "all" for one in found]
    if not found or len(set(names)) < len(names):
        rule = f"name each of {', '.join(UNITS)} once at most, and one of params, macs and latency"
        raise invalid("budget", rule, budget)
    if len(found) > 1 and "similarity" in {one.quantity for one in found}:
        raise invalid("budget", "name nothing else beside similarity", budget)
    return found


@dataclass(frozen=True)
class Cut:
    """What may go: a share of the units, or as many as a budget asks for, and how that is spread over the sites.

    Args:
        pruning_ratio: fraction of units to remove, in [0, 1).
        allocation: "uniform", the same share at every site, "ranking", by one ranking of the whole model, or
            "sensitivity", by what each site alone changes at the end. None = "uniform", but for `prune` "sensitivity"
            with `plain` and where neurons or layers may go within a budget that counts all.
        floor: units that every site keeps at least, from 0.
        budget: what may remain of the model, as `budgets_of` takes it, each share in (0, 1]; the smallest pruning
            ratio within it takes the place of `pruning_ratio`.
        units: kinds of units that may go, of "heads", "neurons" and "layers". None = those that the budget names, heads
            and neurons for a budget that counts all, with `plain` layers too, and heads for a ratio.
        multiple: neurons that stay at a site are a multiple of this, from 1.
        exclude: patterns, as of file names, of sites that stay whole with their layers, such as `encoder.layer.0.*`.
        plain: whether the folder must load where secateur is not: all layers of a stack keep as many units, whose
            number the config can say, and layers may go too. The allocation is by sensitivity.
        refine: exchanges of heads that `prune` tries on the scored texts, as `refine_mask` does, from 0.
        latency_table: what units cost where the model is to run, a file of `secateur bench --table`, for a budget of
            latency. None = what they cost here, in PyTorch.

    Raises `InvalidInputError` for values outside their ranges.
    """

    pruning_ratio: float = PRUNING_RATIO
    allocation: AnyAllocation | None = None
    floor: int = FLOOR
    budget: AnyBudget | None = None
    units: Collection[str] | None = None
    multiple: int = MULTIPLE
    exclude: Sequence[str] = ()
    plain: bool = False
    refine: int = 0
    latency_table: str | Path | None = None

    def __post_init__(self) -> None:
        listed = isinstance(self.exclude, Sequence) and not isinstance(self.exclude, str)
        if not listed or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise invalid("exclude", "be a list of patterns, such as ['encoder.layer.0.*']", self.exclude)
        object.__setattr__(self, "exclude", tuple(self.exclude))
        if self.allocation not in (None, *get_args(AnyAllocation)):
            raise invalid("allocation", "be 'uniform', 'ranking' or 'sensitivity'", self.allocation)
        check_selection(self.pruning_ratio, self.ranked, self.floor)
        check_whole("multiple", self.multiple)
        check_flag("plain", self.plain)
        check_whole("refine", self.refine, 0)
        if self.units is not None:
            check_units(self.units)
        if self.budget is not None:
            object.__setattr__(self, "budget", budgets_of(self.budget))
        if self.latency_table is not None:
            check_path("latency_table", self.latency_table)
            if all(one.quantity != "latency" for one in self.budgets):
                raise invalid("budget", "be of latency with a latency table, such as latency=0.5x@8x128", self.budget)
        named = {one.quantity for one in self.budgets} & set(UNITS)
        if self.units is not None and not named <= set(self.units):
            raise invalid("units", f"hold what the budget names, {', '.join(sorted(named))}", self.units)

    @property
    def ranked(self) -> Allocation:
        """The allocation where scores alone say what goes: the same share everywhere, but for one ranking."""
        return "ranking" if self.allocation == "ranking" else "uniform"

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets, none where a ratio says what goes."""
        return () if self.budget is None else budgets_of(self.budget)

    def may_go(self, scores: Scores) -> Scores:
        """Return the scores of the sites that are not excluded; layers that hold an excluded site are among `staying`.

        Raises `InvalidInputError` where none is left, and for a pattern that matches none.
        """
        left = [site for site in scores if not any(fnmatch.fnmatchcase(site, pattern) for pattern in self.exclude)]
        unused = [p for p in self.exclude if not any(fnmatch.fnmatchcase(site, p) for site in scores)]
        if not left or unused:
            known = f"such as {next(iter(scores))!r}"
            raise invalid("exclude", f"leave some sites, and each pattern match one, {known}", unused or self.exclude)
        staying = {path: _holding(path, scores, left) for path in left if scores.kinds[path] == "layers"}
        return replace(scores.only(left), staying=staying)

    @property
    def similarity(self) -> Budget | None:
        """The mean cosine to the dense model that is to stay, if that is asked for."""
        return next((one for one in self.budgets if one.quantity == "similarity"), None)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of units that may go, in the order heads, neurons, layers."""
        if self.units is not None:
            return tuple(kind for kind in UNITS if kind in self.units)
        quantities = [one.quantity for one in self.budgets]
        of_all = any(quantity not in UNITS for quantity in quantities)
        of_budget = UNITS if self.plain else ("heads", "neurons")
        usual = of_budget if of_all else () if quantities else ("heads",)
        return tuple(kind for kind in UNITS if kind in quantities or kind in usual)


def _holding(path: str, scores: Scores, left: Sequence[str]) -> list[int]:
    """Return the layers of the list at `path`, by original number, that hold a site that is not `left`."""
    held = [site.removeprefix(f"{path}.") for site in scores if site not in left and site.startswith(f"{path}.")]
    there = (scores[path] > -math.inf).nonzero().flatten().tolist()  # names count the layers that are there now
    return sorted({there[int(name.partition(".")[0])] for name in held})


def cut_of(cut: Cut | None, **given: Any) -> Cut:
    """Return a cut, or the default one, with the fields that are given and not None in the place of its own."""
    return replace(settings_of(cut, Cut), **{name: value for name, value in given.items() if value is not None})


def settings_of(value: Any, kind: type[Settings]) -> Settings:
    """Return settings as they are, and the defaults for None. Raises `InvalidInputError` for anything else."""
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise invalid(kind.__name__.lower(), f"be a {kind.__name__}, such as secateur.{kind.__name__}()", value)
    return value
