"""How long something takes, said to a person."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """Say how long that is, in the unit that a person would take: "10 s", "5 min", "3.9 h"."""
    if seconds < 90:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.{int(seconds < 36000)}f} h"
