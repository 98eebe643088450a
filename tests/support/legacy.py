"""Folders as transformers 4 saved them."""

import json

import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny import tiny_model


def rows(tensor, pruned, width=8, heads=4, axis=0):
    """Keep what transformers 4 kept: the kept heads' blocks, in order."""
    kept = [i for h in range(heads) if h not in pruned for i in range(h * width, (h + 1) * width)]
    return tensor.index_select(axis, torch.tensor(kept)).contiguous()


def v4_folder(folder, pruned, model=None):
    """Write a BERT as transformers 4 saved it after `prune_heads`: by plain slicing, with none of secateur's code."""
    model = tiny_model("bert") if model is None else model
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in list(tensors):
        for layer, heads in pruned.items():
            if f"encoder.layer.{layer}.attention." not in name:
                continue
            if any(f".self.{part}." in name for part in ("query", "key", "value")):
                tensors[name] = rows(tensors[name], heads)
            elif name.endswith("output.dense.weight"):
                tensors[name] = rows(tensors[name], heads, axis=1)
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["pruned_heads"] = {str(k): sorted(v) for k, v in pruned.items()}
    (folder / "config.json").write_text(json.dumps(config))
