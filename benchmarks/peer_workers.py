"""What peers.py runs in processes of their own: one library prunes one model to given heads, or a folder is reloaded.

    python peer_workers.py prune JOB.json     # {"peer", "model", "masks", "inputs", "out", "rounds"}
    python peer_workers.py reload JOB.json    # {"ways", "folders", "inputs"}

`masks` gives for each mask the numbers of the heads that go, a list a layer. `inputs` is a file of torch tensors: token
ids and masks of texts, and for each mask the hidden states that are `wanted`, those of the gated model. Folders have
the names of masks. Prints one line of JSON, the last.
Each library is called by its public names, as its documentation says; this file imports nothing else of secateur's, as
it runs under transformers 4 too. Seconds are CPU time of one thread.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer
from transformers import AutoModel

Removed = list[list[int]]
REPEATS = 5


def mask_of(model: Any, removed: Removed) -> torch.Tensor:
    """Return `[layers, heads]`, 1 where a head stays."""
    mask = torch.ones(len(removed), model.config.num_attention_heads)
    for layer, heads in enumerate(removed):
        mask[layer, heads] = 0
    return mask


def channels(model: Any, heads: list[int]) -> list[int]:
    """Return the rows of queries, keys and values that belong to heads."""
    width = model.config.hidden_size // model.config.num_attention_heads
    return [h * width + i for h in heads for i in range(width)]


def zero_(model: Any, removed: Removed) -> None:
    """Set to zero what libraries that look for zeros are to find."""
    for layer, heads in zip(model.encoder.layer, removed, strict=True):
        rows = channels(model, heads)
        attention = layer.attention
        with torch.no_grad():
            for linear in (attention.self.query, attention.self.key, attention.self.value):
                linear.weight[rows], linear.bias[rows] = 0, 0
            attention.output.dense.weight[:, rows] = 0


def secateur(model: Any, removed: Removed, inputs: dict[str, Any], out: Path) -> Any:
    import secateur

    sites = secateur.find_sites(model)
    mask = secateur.Mask(dict(zip(sites, mask_of(model, removed).bool(), strict=True)))
    secateur.remove_(model, mask, sites=sites)
    return model, model.save_pretrained


def torch_pruning(model: Any, removed: Removed, inputs: dict[str, Any], out: Path) -> Any:
    """Groups of coupled channels for given indices, then the attributes, as its example for BERT sets them."""
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(
        model, example_inputs={k: v[:1] for k, v in inputs.items()}, output_transform=lambda o: o.pooler_output.sum()
    )
    for layer, heads in zip(model.encoder.layer, removed, strict=True):
        attention = layer.attention.self
        group = graph.get_pruning_group(attention.query, tp.prune_linear_out_channels, idxs=channels(model, heads))
        if not graph.check_pruning_group(group):
            raise RuntimeError("check_pruning_group refused the group")
        group.prune()
        attention.num_attention_heads -= len(heads)
        attention.all_head_size = attention.query.out_features
    model.zero_grad()
    return model, None


def textpruner(model: Any, removed: Removed, inputs: dict[str, Any], out: Path) -> Any:
    from textpruner import GeneralConfig, TransformerPruner

    pruner = TransformerPruner(model, general_config=GeneralConfig(use_device="cpu", output_dir=str(out.parent)))
    # Its `save_model` needs both masks; this one keeps every number of the feed-forward parts.
    ffn_mask = torch.ones(len(removed), model.config.intermediate_size)
    pruner.prune(head_mask=mask_of(model, removed), ffn_mask=ffn_mask, save_model=False)
    return model, lambda folder: pruner.save_model(dir_name=Path(folder).name)


def nn_pruning(model: Any, removed: Removed, inputs: dict[str, Any], out: Path) -> Any:
    """By the patcher inside its `optimize_model`, which asks for a model with a task head and 12 layers."""
    from nn_pruning.inference_model_patcher import InferenceModelPatcher

    zero_(model, removed)
    InferenceModelPatcher(prune_heads=True, mode="heads").patch_model(model)
    return model, model.save_pretrained


def neural_compressor(model: Any, removed: Removed, inputs: dict[str, Any], out: Path) -> Any:
    from neural_compressor.compression.pruner.model_slim.auto_slim import model_slim_mha

    zero_(model, removed)
    return model_slim_mha(model), None


def nni(model: Any, removed: Removed, inputs: dict[str, Any], out: Path) -> Any:
    """Masks into its speed-up, with its replacer for attention, as in its tutorial on BERT."""
    from nni.compression.speedup import ModelSpeedup
    from nni.compression.utils.external.external_replacer import TransformersAttentionReplacer

    masks = {}
    for number, heads in enumerate(removed):
        keep = torch.ones(model.config.hidden_size)
        keep[channels(model, heads)] = 0
        square = keep[:, None].expand(len(keep), len(keep))
        prefix = f"encoder.layer.{number}.attention"
        for name in ("query", "key", "value"):
            masks[f"{prefix}.self.{name}"] = {"weight": square.clone(), "bias": keep.clone()}
        masks[f"{prefix}.output.dense"] = {"weight": square.T.clone()}
    replacers = [TransformersAttentionReplacer(model)]
    example = {name: inputs[name][:1] for name in ("input_ids", "attention_mask", "token_type_ids")}  # as in forward
    speed_up = ModelSpeedup(model, example, masks, customized_replacers=replacers)
    return speed_up.speedup_model(), None


def torch_prune(model: Any, removed: Removed, inputs: dict[str, Any], out: Path) -> Any:
    """PyTorch's own: masks that become zeros; nothing gets smaller."""
    from torch.nn.utils import prune

    for layer, heads in zip(model.encoder.layer, removed, strict=True):
        dense = layer.attention.output.dense
        keep = torch.ones_like(dense.weight)
        keep[:, channels(model, heads)] = 0
        prune.custom_from_mask(dense, "weight", keep)
        prune.remove(dense, "weight")
    return model, model.save_pretrained


def transformers_4(model: Any, removed: Removed, inputs: dict[str, Any], out: Path) -> Any:
    model.prune_heads(dict(enumerate(removed)))
    return model, model.save_pretrained


PEERS: dict[str, Callable[..., Any]] = {
    "secateur": secateur,
    "torch-pruning": torch_pruning,
    "neural-compressor": neural_compressor,
    "transformers": transformers_4,
    "textpruner": textpruner,
    "nn_pruning": nn_pruning,
    "nni": nni,
    "torch.nn.utils.prune": torch_prune,
}
"""Each takes the model, the heads to remove, inputs and a folder, and returns the smaller model, and what saves it into
a folder for `from_pretrained`; None where the library names no such way and `save_pretrained` is tried."""


def load(folder: str) -> Any:
    return AutoModel.from_pretrained(folder).eval()


def outputs(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def status_kilobytes(field: str) -> int:
    """Return a number of /proc/self/status, which Linux keeps."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def in_turn(models: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of a pass over 8 texts of 128 tokens, models in turn, every second round backwards."""
    ids = torch.randint(1000, 2000, (8, 128), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    timers = {
        name: Timer("outputs(model, inputs)", globals={"outputs": outputs, "model": m, "inputs": inputs},
                    timer=time.process_time, num_threads=1)
        for name, m in models.items()
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds):
        for name in timers if number % 2 == 0 else reversed(timers):
            seconds[name].append(timers[name].blocked_autorange(min_run_time=0.2).median)
    return seconds


def prune(job: dict[str, Any]) -> dict[str, Any]:
    inputs = torch.load(job["inputs"])
    wanted = inputs.pop("wanted")
    dense = load(job["model"])
    # Imports and what a first pass sets up are not the removal's.
    PEERS[job["peer"]](load(job["model"]), next(iter(job["masks"].values())), inputs, Path(job["out"]))
    return {
        name: or_failed(prune_to, job, removed, inputs, wanted[name], dense, Path(job["out"]) / name)
        for name, removed in job["masks"].items()
    }


def prune_to(
    job: dict[str, Any], removed: Removed, inputs: dict[str, Any], wanted: torch.Tensor, dense: Any, out: Path
) -> dict[str, Any]:
    """Prune fresh copies; compare, save and time the last."""
    found: dict[str, Any] = {"cpu_seconds": [], "wall_seconds": [], "peak_mb_above": []}
    for _ in range(REPEATS):
        model = load(job["model"])
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status_kilobytes("VmRSS")
        cpu, wall = time.process_time(), time.perf_counter()
        pruned, save = PEERS[job["peer"]](model, removed, inputs, out)
        found["cpu_seconds"].append(time.process_time() - cpu)
        found["wall_seconds"].append(time.perf_counter() - wall)
        found["peak_mb_above"].append((status_kilobytes("VmHWM") - before) / 1024)
    pruned.eval()
    found["largest_difference"] = float((outputs(pruned, inputs) - wanted).abs().max())
    found["parameters"] = sum(p.numel() for p in pruned.parameters())
    found["saved"] = or_failed(done, save or pruned.save_pretrained, str(out))
    found["pickled"] = or_failed(done, torch.save, pruned, out.with_suffix(".pickle"))
    found["seconds_8x128"] = in_turn({"dense": dense, "pruned": pruned}, job["rounds"])
    return found


def reload(job: dict[str, Any]) -> dict[str, Any]:
    """Load each folder by each of `ways`: by AutoModel, "plain" or with secateur "imported", and "pickled" objects."""
    inputs = torch.load(job["inputs"])
    wanted = inputs.pop("wanted")
    return {
        way: {
            folder: or_failed(reload_one, folder, way, inputs, wanted[Path(folder).name]) for folder in job["folders"]
        }
        for way in job["ways"]
    }


def reload_one(folder: str, way: str, inputs: dict[str, Any], wanted: torch.Tensor) -> dict[str, Any]:
    if way == "imported":
        import secateur  # noqa: F401
    pickled = Path(folder).with_suffix(".pickle")
    model = torch.load(pickled, weights_only=False).eval() if way == "pickled" else load(folder)
    difference = float((outputs(model, inputs) - wanted).abs().max())
    return {"largest_difference": difference, "parameters": sum(p.numel() for p in model.parameters())}


def done(call: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    call(*arguments)
    return {"done": True}


def or_failed(call: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return what the call does, or the last line of its error."""
    try:
        return call(*arguments)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"failed": f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    job = json.loads(Path(sys.argv[2]).read_text())
    found = or_failed({"prune": prune, "reload": reload}[sys.argv[1]], job)
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
