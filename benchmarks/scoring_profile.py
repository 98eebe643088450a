"""Where the time of a scoring pass goes, operator by operator, and how near it is to what the machine can do.

    OMP_NUM_THREADS=1 python -m benchmarks.scoring_profile

128 film sentences, 64 tokens at most, batches of 32 padded to their longest, all-MiniLM-L6-v2, one thread. The passes
are measured in turn, in CPU seconds, with the dense pass and with the floor: the same products of matrices alone, each
of its shape. A profile then splits every pass: by kind of operator, and by who runs it, the model or the scorer's
reading of a site. Operations are counted by hand from the model's sizes and by PyTorch; bytes are those of tensors that
operators write, and of weights, read once a batch. `leave_one_out` gets 8 sentences. Writes
results/scoring_profile.json.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.provenance import provenance
from benchmarks.subjects import minilm_and_tokenizer
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from secateur.demo import demo_task
from secateur.measuring.memory import cpu_allocations
from secateur.measuring.timing import quartiles, time_in_turn
from secateur.models.inputs import forward_arguments
from secateur.pruners.site_sums import SiteSums
from secateur.scorers import make_scorer
from secateur.scorers.base import ScoringTask
from secateur.sites.attention import find_sites
from secateur.sites.gating import probe
from secateur.support.files import write_text
from secateur.texts.data import batches

SCORERS = ["contribution", "smp", "smp-plus", "leave_one_out"]
ROUNDS = 5
PROFILES = 2
READING = "a scorer reads"
KINDS = {
    "products with weights": ("addmm", "mm"),
    "products of a head's own": ("bmm", "baddbmm"),
    "fused attention": ("scaled_dot_product",),
    "softmax": ("softmax",),
    "convolutions": ("conv",),
    "activations": ("gelu", "relu", "tanh", "sigmoid", "log", "sqrt"),
    "normalisations": ("layer_norm", "batch_norm"),
    "copies": ("copy", "cat", "clone", "index", "gather", "stack", "contiguous", "fill", "zero", "embedding", "pad"),
}
"""The first kind with a word that begins the operator's name (for the products, is it) has it."""


def kind_of(operator: str) -> str:
    name = operator.removeprefix("aten::").removeprefix("mkldnn_").strip("_")
    for kind, words in KINDS.items():
        if name in words or (not kind.startswith("products") and any(word in name for word in words)):
            return kind
    return "sums and others, element by element"


@contextmanager
def readings_marked(scorer: Any) -> Iterator[None]:
    """Mark in profiles what a scorer does with the reading of a site."""
    owner = type(scorer) if hasattr(scorer, "read") else SiteSums
    original = owner.read

    def read(*arguments: Any) -> Any:
        with record_function(READING):
            return original(*arguments)

    owner.read = read
    try:
        yield
    finally:
        owner.read = original


def shares(run: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Return each kind's part of the operators' time in `run()`, the model's and the scorer's apart."""
    found: dict[str, dict[str, float]] = {"model": defaultdict(float), "scorer": defaultdict(float)}
    for _ in range(PROFILES):
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            run()
        for event in recorded.events():
            above = event
            while above is not None and above.name != READING:
                above = above.cpu_parent
            if event.name.startswith("aten::"):
                found["model" if above is None else "scorer"][kind_of(event.name)] += event.self_cpu_time_total
    total = sum(sum(kinds.values()) for kinds in found.values())
    return {
        who: {kind: time / total for kind, time in sorted(kinds.items(), key=lambda pair: -pair[1])}
        for who, kinds in found.items()
    }


def by_hand(config: Any, shapes: list[tuple[int, int]]) -> dict[str, int]:
    """Return multiply-accumulates and bytes of dense passes over batches of texts x tokens, padding included.

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
    weights = 4 * len(shapes) * layers * (4 * d * d + 2 * d * f)
    return {"macs": products + heads, "of weights": products, "of heads": heads, "bytes written": written,
            "weights read": weights}  # fmt: skip


def floor(config: Any, shapes: list[tuple[int, int]]) -> Callable[[], Any]:
    """Return a call that does the products of the dense passes, each of its shape, and nothing else."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    square, up, down = torch.randn(d, d), torch.randn(f, d), torch.randn(d, f)
    parts = []
    for texts, tokens in shapes:
        x, y = torch.randn(texts * tokens, d), torch.randn(texts * tokens, f)
        q, maps = torch.randn(texts * heads, tokens, d // heads), torch.randn(texts * heads, tokens, tokens)
        parts.append((x, y, q, maps))

    def run() -> None:
        for x, y, q, maps in parts:
            for _ in range(config.num_hidden_layers):
                for _ in range(4):
                    torch.nn.functional.linear(x, square)
                torch.nn.functional.linear(x, up)
                torch.nn.functional.linear(y, down)
                torch.bmm(q, q.transpose(1, 2))
                torch.bmm(maps, q)

    return run


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    model, tokenizer = minilm_and_tokenizer()
    texts = demo_task()[0].texts[:128]
    made = forward_arguments(model, batches(tokenizer, texts, 32, 64))
    shapes = [tuple(batch["input_ids"].shape) for batch in made]
    sites = find_sites(model)
    few = forward_arguments(model, batches(tokenizer, texts[:8], 8, 64))
    task, small = ScoringTask(model, sites, made), ScoringTask(model, sites, few)

    def dense(given: Any = made) -> None:
        for batch in given:
            model(**batch)

    counter = FlopCounterMode(display=False)
    with probe(model, weights=True), counter:
        dense()
    hand = by_hand(model.config, shapes)
    counted = counter.get_total_flops() // 2
    scorers = {name: make_scorer(name) for name in SCORERS}
    runs: dict[str, Callable[[], Any]] = {"floor": floor(model.config, shapes), "dense": dense}
    runs |= {n: lambda s=s: s.score(task) for n, s in scorers.items() if n != "leave_one_out"}
    seconds = time_in_turn(runs, ROUNDS, clock="cpu")
    runs["leave_one_out"] = lambda: scorers["leave_one_out"].score(small)
    one = time_in_turn({"dense": lambda: dense(few), "leave_one_out": runs["leave_one_out"]}, 2, clock="cpu")
    written = {
        name: sum(change for change in cpu_allocations(run) if change > 0)
        for name, run in runs.items()
        if name not in ("floor", "leave_one_out")
    }
    parts = {"dense": shares(dense)}
    for name, scorer in scorers.items():
        with readings_marked(scorer):
            parts[name] = shares(runs[name])
    passes = {
        name: quartiles([a / b for a, b in zip(values, seconds["dense"], strict=True)])
        for name, values in seconds.items()
    }
    passes["leave_one_out"] = quartiles([a / b for a, b in zip(one["leave_one_out"], one["dense"], strict=True)])
    print(f"multiply-accumulates by hand {hand['macs']:,}, counted {counted:,}; written {written}")
    for name, (low, middle, high) in passes.items():
        print(f"{name}: {middle:.2f} dense passes ({low:.2f} to {high:.2f})")
        for who, kinds in parts.get(name, {}).items():
            for kind, share in kinds.items():
                print(f"    {share:6.1%} {who}: {kind}")
    result = {
        **provenance("OMP_NUM_THREADS=1 python -m benchmarks.scoring_profile", "CPU time"),
        "load_average": os.getloadavg()[0],
        "batches": shapes,
        "by_hand": hand,
        "counted_macs": counted,
        "bytes_written": written,
        "seconds": seconds,
        "seconds_8_texts": one,
        "dense_passes": passes,
        "macs_per_second": {n: counted / statistics.median(seconds[n]) for n in ("floor", "dense")},
        "shares_of_operators": parts,
    }
    write_text(Path(__file__).parent / "results" / "scoring_profile.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
