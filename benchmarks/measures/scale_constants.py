"""Constants for planning large runs that need no large machine: what travels between processes, what a look costs.

- `round_bytes`: the pickled result of one batch of 32 texts, for 80 sites of 64 heads: scored to the end, and with
  `stop="auto"`, where the scores of every text travel.
- `looks`: CPU seconds of one look of `stop="auto"` (eigenvectors of the heads' covariance, 100 selections) against the
  number of heads, in sites of 64 heads over 8 key-value heads; and the bytes of that covariance.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping

import torch
from benchmarks.runs import Run
from torch import Tensor

from secateur.texts.stopping import Settling
from secateur.units.scores import PresentScores
from secateur.units.select import select as select_units

HEADS, GROUPS, TEXTS = 64, 8, 32
SITES = (2, 5, 10, 20)


def look(sites: int) -> dict[str, float]:
    """Time one look at scores in which heads differ about as much as texts do."""
    random = torch.Generator().manual_seed(0)
    names = [f"layers.{number}.self_attn" for number in range(sites)]

    def select(means: Mapping[str, Tensor]) -> Tensor:
        mask = select_units(PresentScores(dict(means), dict.fromkeys(names, GROUPS)))
        return torch.cat([mask[name] for name in names])

    settling = Settling(select, 10_000)
    level = torch.randn(sites, HEADS, generator=random, dtype=torch.float64)
    for _ in range(4):
        noise = torch.randn(sites, TEXTS, HEADS, generator=random, dtype=torch.float64)
        settling.add(dict(zip(names, level[:, None] + noise, strict=True)))
    start = time.process_time()
    settling.settled()
    heads = sites * HEADS
    return {"heads": heads, "cpu_seconds": time.process_time() - start, "covariance_mb": heads**2 * 8 / 2**20}


def measure(run: Run) -> None:
    total, rows = torch.rand(HEADS, dtype=torch.float64), torch.rand(TEXTS, HEADS, dtype=torch.float64)
    sent = {
        way: {f"layers.{n}.self_attn": (total.clone(), TEXTS, rows.clone() if texts else None) for n in range(80)}
        for way, texts in (("all", False), ("auto", True))
    }
    run.write(
        round_bytes={way: len(pickle.dumps(part)) for way, part in sent.items()},
        looks=[look(sites) for sites in SITES],
    )
    print(run.out.read_text())
