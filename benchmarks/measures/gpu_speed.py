"""What half of the heads gives on a GPU, by the size of the model and of the batch.

Models of well-known shapes with random weights (time does not depend on them), in bfloat16: each whole, and without
half of the heads of every layer, in passes and training steps, measured in turn. Prints a table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.runs import Run
from transformers import AutoModel, BertConfig, LlamaConfig, PreTrainedConfig

import secateur
from secateur.measuring.bench import benchmark
from secateur.measuring.timing import quartiles
from secateur.settings import Shape

SHAPES = (Shape(1, 128), Shape(8, 128), Shape(1, 512), Shape(64, 128), Shape(32, 512))
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "all-MiniLM-L6-v2": lambda: BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "BERT-base": BertConfig,
    "BERT-large": lambda: BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "Llama-3.2-1B": lambda: LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192
    ),
}


def without_half(model: Any) -> Any:
    """Return a copy that keeps the first half of every layer's heads, whole groups of them."""
    pruned = copy.deepcopy(model)
    sites = secateur.find_sites(model)
    keep = {name: torch.arange(site.num_units) < site.num_units // 2 for name, site in sites.items()}
    secateur.remove_(pruned, secateur.Mask(keep))
    return pruned


def measure(run: Run, *, models: list[str], rounds: int) -> None:
    rows: list[dict[str, Any]] = []
    print("| model | work | shape | dense, ms | limit | speed-up | efficiency | peak MB, dense | pruned |")
    for name in models:
        torch.manual_seed(0)
        with torch.device(run.device):  # a CPU takes a minute to draw a billion weights
            model = AutoModel.from_config(MODELS[name](), dtype=torch.bfloat16).eval()
        pair = {"dense": model, "half": without_half(model)}
        measured = benchmark(pair, SHAPES, rounds=rounds, train=True)
        for dense, half in zip(measured.rows[::2], measured.rows[1::2], strict=True):
            rows += [{"of": name, **row.to_json()} for row in (dense, half)]
            low, middle, high = half.speed_up
            cells = [name, dense.work, str(dense.shape)]
            cells += [f"{1000 * quartiles(dense.seconds)[1]:.2f}", f"{half.limit:.3f}"]
            cells += [f"{middle:.3f} ({low:.3f} to {high:.3f})", f"{half.efficiency:.3f}"]
            cells += [f"{(row.peak_bytes or 0) / 1e6:.0f}" for row in (dense, half)]
            print("| " + " | ".join(cells) + " |", flush=True)
        run.write(rows=rows, machine=measured.machine)
        del pair, model
