"""Where the time of scoring goes, operator by operator, and how near its dense pass is to what the machine can do.

    OMP_NUM_THREADS=1 python -m benchmarks.scoring_profile

96 pairs of film sentences, 64 tokens at most, padded to the longest of a batch of 32, all-MiniLM-L6-v2 on one thread.
Multiply-accumulates and bytes of the dense pass are worked out by hand from the model's sizes and set beside what
PyTorch counted. The floor is the time that the same products take alone, each of its shape, and copies of as many
bytes; it is measured in turn with the passes. Prints shares and writes results/scoring_profile.json.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.subjects import minilm_and_tokenizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from secateur.data import batches
from secateur.demo import demo_task
from secateur.files import write_text
from secateur.model.inputs import forward_arguments
from secateur.model.memory import cpu_allocations
from secateur.model.probe import probe
from secateur.model.sites import find_sites
from secateur.model.timing import median_ratio, quartiles, time_in_turn
from secateur.pruning import environment
from secateur.scorers import make_scorer
from secateur.scorers.base import ScoringTask

SCORERS = ["contribution", "entropy", "smp", "smp-plus"]
ROUNDS = 7
KINDS = {
    "products with weights": ("addmm", "mm", "linear"),
    "products of a head's own": ("bmm", "baddbmm"),
    "fused attention": ("attention",),
    "activation": ("gelu", "relu", "tanh"),
    "normalisation": ("native_layer_norm", "batch_norm"),
    "softmax": ("softmax",),
    "convolution": ("convolution", "conv"),
    "sums and element by element": ("add", "mul", "sub", "div", "sum", "mean", "sqrt", "pow", "clamp", "log", "exp"),
    "copies": ("copy_", "cat", "clone", "index", "gather", "stack", "contiguous"),
}


def kind_of(operator: str) -> str:
    name = operator.removeprefix("aten::").removeprefix("mkldnn_").strip("_")
    for kind, words in KINDS.items():
        if name.strip("_") in {w.strip("_") for w in words} or (
            kind in ("fused attention", "convolution", "softmax", "copies") and any(w.strip("_") in name for w in words)
        ):
            return kind
    return "others"


def shares(run: Callable[[], Any]) -> dict[str, float]:
    """Return each kind's part of the time of `run()`; what no operator accounts for is Python's and the profiler's."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        run()
        wall = time.perf_counter() - start
    found: dict[str, float] = {}
    for event in recorded.key_averages():
        kind = kind_of(event.key)
        found[kind] = found.get(kind, 0.0) + event.self_cpu_time_total / 1e6 / wall
    found["between operators"] = 1 - sum(found.values())
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def by_hand(config: Any, shapes: list[tuple[int, int]]) -> dict[str, int]:
    """Return multiply-accumulates and bytes of dense passes over batches of texts × tokens, padding included.

    A layer multiplies each token's d numbers with 4 matrices of d x d and 2 of d x f, and attention the queries with
    the keys of the text and the maps with the values, d each for a token. It writes 10 d + 2 f numbers a token: query,
    key, value and attention; twice a product, its sum with the residual and the normalised sum; and the feed-forward
    part before and after its activation. Weights are read once a batch. Embeddings are left out.
    """
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    products = heads = written = 0
    for texts, tokens in shapes:
        products += layers * texts * tokens * (4 * d * d + 2 * d * f) + texts * d * d  # the last: the pooler
        heads += layers * texts * tokens * 2 * tokens * d
        written += 4 * layers * texts * tokens * (10 * d + 2 * f)
    macs = products + heads
    weights = 4 * len(shapes) * layers * (4 * d * d + 2 * d * f)
    return {"macs": macs, "of weights": products, "of heads": heads, "bytes written": written, "weights read": weights}


def floor(config: Any, shapes: list[tuple[int, int]], moved: int) -> Callable[[], Any]:
    """Return a call that does the products of the passes, each of its shape, and copies as many bytes; nothing else."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    square, up, down = torch.randn(d, d), torch.randn(d, f), torch.randn(f, d)
    parts = []
    for texts, tokens in shapes:
        x, y = torch.randn(texts * tokens, d), torch.randn(texts * tokens, f)
        q, maps = torch.randn(texts * heads, tokens, d // heads), torch.randn(texts * heads, tokens, tokens)
        parts.append((x, y, q, maps))
    source = torch.empty(min(moved // 4, 1 << 22))
    target = torch.empty_like(source)
    copies = round(moved / (4 * source.numel()))

    def run() -> None:
        for x, y, q, maps in parts:
            for _ in range(config.num_hidden_layers):
                for _ in range(4):
                    torch.mm(x, square)
                torch.mm(x, up)
                torch.mm(y, down)
                torch.bmm(q, q.transpose(1, 2))
                torch.bmm(maps, q)
        for _ in range(copies // 2):  # a copy reads as many bytes as it writes
            target.copy_(source)

    return run


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    model, tokenizer = minilm_and_tokenizer()
    texts = demo_task()[0].texts
    pairs = [(texts[2 * i], texts[2 * i + 1]) for i in range(96)]
    made = forward_arguments(model, batches(tokenizer, pairs, 32, 64))
    shapes = [tuple(batch["input_ids"].shape) for batch in made]
    task = ScoringTask(model, find_sites(model), made, is_pair=True)

    def dense() -> None:
        for batch in made:
            model(**batch)

    counter = FlopCounterMode(display=False)
    with probe(model, weights=True), counter:
        dense()
    hand = by_hand(model.config, shapes)
    counted = counter.get_total_flops() // 2
    written = sum(change for change in cpu_allocations(dense) if change > 0)
    print(f"multiply-accumulates by hand {hand['macs']:,}, counted {counted:,}")
    print(f"bytes written by hand {hand['bytes written']:,}, allocated {written:,}")
    moved = 2 * hand["bytes written"] + hand["weights read"]
    scorers = {name: make_scorer(name) for name in SCORERS}
    runs: dict[str, Callable[[], Any]] = {"floor": floor(model.config, shapes, moved), "dense": dense}
    runs |= {name: lambda scorer=scorer: scorer.score(task) for name, scorer in scorers.items()}
    dense()
    seconds = time_in_turn(runs, ROUNDS)
    parts = {name: shares(run) for name, run in runs.items() if name != "floor"}
    load = os.getloadavg()[0]
    for name in runs:
        ratio = quartiles([a / b for a, b in zip(seconds[name], seconds["floor"], strict=True)])
        spread = f"({ratio[0]:.2f} to {ratio[2]:.2f})"
        print(f"{name}: {statistics.median(seconds[name]):.3f} s, {ratio[1]:.2f} times the floor {spread}")
        for kind, share in parts.get(name, {}).items():
            print(f"    {share:6.1%} {kind}")
    result = {
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.scoring_profile",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, no GPU",
        "load_average": load,
        "versions": environment(),
        "threads": torch.get_num_threads(),
        "batches": shapes,
        "by_hand": hand,
        "counted_macs": counted,
        "allocated_bytes": written,
        "seconds": seconds,
        "times_the_floor": {name: median_ratio(seconds[name], seconds["floor"]) for name in runs},
        "macs_per_second": {"floor": counted / min(seconds["floor"]), "dense": counted / min(seconds["dense"])},
        "shares": parts,
    }
    write_text(Path(__file__).parent / "results" / "scoring_profile.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
