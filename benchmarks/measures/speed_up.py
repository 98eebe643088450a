"""How much of the multiply-accumulates' limit pruned models reach in speed, and whether numbers of heads matter.

all-MiniLM-L6-v2 (12 heads of width 32 at 6 sites) on the CPU: half of its heads removed by contribution, the same share
of every site or over the whole model; then every number of heads from 12 to 1 at all sites at once. Models are measured
in turn. Prints the ratios, and writes raw seconds and the machine's load average too: quiet machines
 give the better numbers, and `fastest` compares the fastest rounds, which other work disturbs least.
"""

from __future__ import annotations

from typing import Any

from benchmarks.runs import Run

import secateur
from secateur.demo import demo_model, demo_task
from secateur.measuring.bench import SHAPES, Measured, benchmark
from secateur.measuring.latency_table import measure_latency
from secateur.measuring.timing import Clock, quartiles
from secateur.measuring.unit_costs import UnitCosts
from secateur.models.loading import load_model
from secateur.settings import Cut, Reading, Shape
from secateur.sites.attention import find_sites


def fastest(row: Measured, first: Measured) -> float:
    """Return the efficiency by the fastest rounds."""
    return min(first.seconds) / min(row.seconds) / row.limit


def by_number_of_heads(model: Any, shape: Shape, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """Return speed-up, limit and efficiency with 12, 11, … heads at every site."""
    costs = UnitCosts(model, find_sites(model), *shape)
    (kind,) = measure_latency(model, costs, shape, rounds, clock=clock).kinds
    whole = kind.levels[0].seconds
    rows = []
    for level in kind.levels:
        limit = costs.dense.macs / (costs.dense.macs - len(kind.sites) * level.saved_macs)
        ratios = quartiles([a / b for a, b in zip(whole, level.seconds, strict=True)])
        found = {"shape": str(shape), "heads": level.units, "limit": limit, "speed_up_quartiles": ratios}
        efficiency = {"efficiency": ratios[1] / limit, "fastest": min(whole) / min(level.seconds) / limit}
        rows.append({**found, **efficiency, "rounded": kind.rounded(level.units), "seconds": level.seconds})
        print(
            f"{shape!s:6s} {level.units:2d} heads: limit {limit:.3f}, efficiency {ratios[1] / limit:.3f}, "
            f"by the fastest rounds {efficiency['fastest']:.3f}; {rows[-1]['rounded']} heads measured faster",
            flush=True,
        )
    return rows


def measure(run: Run, *, rounds: int, training_rounds: int, level_rounds: int, clock: Clock) -> None:
    """No rounds: that part is left out."""
    texts = demo_task(0)[0].head(128, seed=0).texts
    models = {"dense": load_model(demo_model(), "cpu")}
    for allocation in ("uniform", "ranking"):
        models[f"half, allocation {allocation}"], _ = secateur.prune(
            demo_model(), texts, 0.5, cut=Cut(allocation=allocation), restore="none", reading=Reading(device="cpu")
        )
    result: dict[str, Any] = {"seed": 0, "load_average": [], "rows": [], "heads": []}
    for count, train in ((rounds, False), (training_rounds, True)):
        for shape in SHAPES if count else ():
            measured = benchmark(models, [shape], rounds=count, train=train, clock=clock)
            rows = [row for row in measured.rows if (row.work == "training step") is train]
            result |= {"machine": measured.machine, "weight_bytes": measured.weight_bytes}
            result["load_average"] += measured.load
            for row in rows:
                low, middle, high = row.speed_up
                result["rows"].append({**row.to_json(), "fastest": fastest(row, rows[0])})
                print(
                    f"{row.work:13s} {row.shape!s:6s} {row.model:18s} {middle:.3f} times as fast "
                    f"({low:.3f} to {high:.3f}), limit {row.limit:.3f}, efficiency {row.efficiency:.3f}, "
                    f"by the fastest rounds {fastest(row, rows[0]):.3f}",
                    flush=True,
                )
            run.write(**result)
    for shape in SHAPES if level_rounds else ():
        result["heads"] += by_number_of_heads(models["dense"], shape, level_rounds, clock)
        run.write(**result)
