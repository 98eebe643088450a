"""Where torch.compile pays: passes, training steps and scoring, dense and pruned, as they are and compiled, in turn.

all-MiniLM-L6-v2 and a copy without half of its heads (the default scorer, the same share of every site) on the CPU,
with PyTorch's own compiler (inductor, which needs a C++ compiler), nothing taken from its caches. For each model and
shape: the seconds of the first compiled call, how many times as fast later ones are, after how many texts the first
call is paid back, and how many times as fast as the dense model the pruned one is, as they are and compiled. Then
film sentences in batches of like length, so that nearly every batch has another length, as scoring reads them:
compiled for each shape, and once for all. Reading a site breaks a compiled graph, so what is compiled there is the
dense pass alone: all that compiling could save of a scoring.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.runs import Run, minilm

import secateur
from secateur.demo import demo_model, demo_task
from secateur.measuring.cost import forward_pass
from secateur.measuring.timing import quartiles, time_in_turn
from secateur.models.inputs import example_inputs
from secateur.settings import Reading, Shape
from secateur.texts.calibration import PreparedModel
from secateur.texts.sources import by_length

SHAPES = (Shape(1, 128), Shape(8, 128))
TEXTS = 512


def compiled_copy(model: Any, **options: Any) -> Any:
    twin = copy.deepcopy(model)
    twin.compile(**options)
    return twin


def training_step(model: Any, batch: int, length: int) -> Callable[[], None]:
    """Return a call of a forward and a backward pass."""
    inputs = example_inputs(model, batch, length, padding=0)

    def step() -> None:
        model(**inputs)[0].float().square().mean().backward()
        model.zero_grad()

    return step


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(one: list[float], other: list[float]) -> tuple[float, float, float]:
    """Return the quartiles of how many times as fast the second is, round by round."""
    return quartiles([a / b for a, b in zip(one, other, strict=True)])


def at_shape(models: dict[str, Any], work: str, shape: Shape, rounds: int) -> dict[str, Any]:
    torch.compiler.reset()
    prepared = forward_pass if work == "pass" else training_step
    runs, first = {}, {}
    with torch.set_grad_enabled(work != "pass"):
        for name, model in models.items():
            for label, one in ((name, model), (f"{name}, compiled", compiled_copy(model))):
                runs[label] = prepared(one.train(work != "pass"), *shape)
                first[label] = seconds_of(runs[label])
        seconds = time_in_turn(runs, rounds)
    found: dict[str, Any] = {"work": work, "shape": str(shape), "seconds": seconds, "first_call_seconds": first}
    for name in models:
        plain, fast = seconds[name], seconds[f"{name}, compiled"]
        found[name] = {"speed_up_quartiles": ratios(plain, fast)}
        saved = (quartiles(plain)[1] - quartiles(fast)[1]) / shape.batch
        found[name]["texts_to_pay_back"] = first[f"{name}, compiled"] / saved if saved > 0 else None
    for label in ("", ", compiled"):
        found[f"half beside dense{label}"] = ratios(seconds[f"dense{label}"], seconds[f"half{label}"])
    print(json.dumps({name: value for name, value in found.items() if name != "seconds"}), flush=True)
    return found


@torch.no_grad()
def scoring(model: Any, tokenizer: Any, rounds: int) -> dict[str, Any]:
    """Time a reading of `TEXTS` sentences: `contribution`, and the dense pass in it, as it is and compiled."""
    torch.compiler.reset()
    texts = demo_task(0)[0].head(TEXTS, seed=0).texts
    made = list(PreparedModel(model, tokenizer).batches(by_length(texts), 32))
    ways = {
        "dense pass": model.eval(),
        "compiled for each shape": compiled_copy(model, dynamic=False).eval(),
        "compiled once": compiled_copy(model, dynamic=True).eval(),
    }

    def reading(way: Any) -> Callable[[], None]:
        def read() -> None:
            for batch in made:
                way(**batch)

        return read

    runs: dict[str, Callable[[], Any]] = {name: reading(way) for name, way in ways.items()}
    first = {name: seconds_of(run) for name, run in runs.items()}
    runs["contribution"] = lambda: secateur.score(model, texts, "contribution", tokenizer)
    found = {
        "texts": TEXTS,
        "lengths": sorted({batch["input_ids"].shape[1] for batch in made}),
        "first_call_seconds": first,
        "seconds": time_in_turn(runs, rounds),
    }
    print(json.dumps(found), flush=True)
    return found


def measure(run: Run, *, rounds: int) -> None:
    torch._dynamo.config.recompile_limit = 64  # batches of so many lengths
    torch._inductor.config.force_disable_caches = True
    load = os.getloadavg()[0]
    dense, tokenizer = minilm()
    texts = demo_task(0)[0].head(96, seed=0).texts
    half, _ = secateur.prune(demo_model(), texts, 0.5, restore="none", reading=Reading(device="cpu"))
    models = {"dense": dense, "half": half}
    rows = [at_shape(models, work, shape, rounds) for work in ("pass", "training step") for shape in SHAPES]
    found = scoring(dense, tokenizer, rounds)
    run.write(rows=rows, scoring=found, load_average=[load, os.getloadavg()[0]])
