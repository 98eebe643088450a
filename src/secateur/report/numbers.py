"""How the page writes numbers, and round numbers for its axes."""

from __future__ import annotations

import math

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def place(value: float, low: float, high: float) -> float:
    """Return where `value` lies between `low` (0) and `high` (1), and 0.5 where both are equal."""
    # Dividing first keeps the difference of two very large numbers finite.
    scale = max(abs(low), abs(high)) or 1.0
    span = high / scale - low / scale
    return (value / scale - low / scale) / span if span else 0.5


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return about five round numbers between `low` and `high`: their places from 0 to 1, and their labels."""
    span = high - low
    if low == high:
        return [(0.5, signed(f"{low:.3g}"))]
    if not max(1e-6 * max(abs(low), abs(high)), 1e-300) < span < math.inf:
        # Round numbers need a range that floating point resolves well; the ends serve for any other.
        return [(float(end), signed(f"{(low, high)[end]:.6g}")) for end in (0, 1)]
    exponent = math.floor(math.log10(span / 4))
    step = next(m for m in (1, 2, 5, 10) if m * 10.0**exponent >= span / 5) * 10.0**exponent
    values = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    decimals = max(0, -math.floor(math.log10(step)))
    form = f".{decimals}f" if decimals <= 4 and abs(high) < 1e6 else ".3g"
    return [(place(value, low, high), signed(f"{value:{form}}")) for value in values]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return the powers of ten from `low` to `high`, above 0, with 2 and 5 between them where there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(exponents) > 4 else (1, 3) if len(exponents) > 3 else (1, 2, 5)
    values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    return [(place(math.log10(v), math.log10(low), math.log10(high)), f"{v:g}") for v in values if low <= v <= high]


def amount(value: float | None, unit: str, like: float | None = None) -> str:
    """Return a number with its unit; times get the unit that suits `like`, so that two columns share one."""
    if value is None:
        return DASH
    if unit == "s":
        size = abs(value if like is None else like)
        factor, name = (1.0, "s") if size >= 1 or not size else (1e3, "ms") if size >= 1e-3 else (1e6, "µs")
        scaled = value * factor
        return f"{signed(f'{scaled:,.{2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0}f}')} {name}"
    shown = f"{int(value):,}" if value == int(value) else f"{value:,.4g}"
    return f"{signed(shown)} {unit}".strip()


def brief(value: float | None, unit: str, like: float | None = None) -> str:
    """Return three digits and a letter for thousands, millions and so on."""
    if value is None or unit == "s" or abs(value) < 1000:
        return amount(value, unit, like)
    power = min(int(math.log10(abs(value)) / 3), 5)
    return f"{signed(f'{value / 1000**power:.3g}')} {'kMGTP'[power - 1]} {unit}".strip()


def change(value: float, form: str) -> str:
    """Return a difference with its sign, and 0 without one."""
    shown = f"{value:+{form}}"
    return signed(shown if float(shown) else shown[1:])


def signed(number: str) -> str:
    """Write a leading hyphen as the minus sign that screens and fonts treat as a part of the number."""
    return MINUS + number[1:] if number.startswith("-") else number


def counted(number: int, word: str) -> str:
    """Return `1 seed`, `2 seeds`."""
    return f"{number} {word}" + ("" if number == 1 else "s")
