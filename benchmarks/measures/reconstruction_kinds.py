"""Reconstruction on every model type that loses heads: does the loss fall, and does nothing else change?

Each type of results/sweep.json whose heads came off is built tiny, with random weights, in a process of its own. Its
output projections are refitted on 24 texts of drawn words, and the heads removed. Exits with 1 where a type came out
wrong: weights of something else changed, or any after a refusal. `only`: model types; null: all of them.
"""

from __future__ import annotations

import collections
import sys
from typing import Any

import torch
from benchmarks.runs import RESULTS, Run
from benchmarks.sweep import build, first_line, in_child, uneven_mask
from tests.support.tiny import tiny_texts, tiny_tokenizer

from secateur.errors import SecateurError
from secateur.models.base_model import base_of
from secateur.removal.remove import remove_
from secateur.restoring.reconstruction import reconstruct_
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.support.files import read_json


def check_type(model_type: str) -> dict[str, Any]:
    """Return what became of one model type: its loss is lower, or the same, or it was refused, or does not run."""
    model = build(model_type)
    base = base_of(model)
    sites = find_sites(model)
    mask = uneven_mask(sites)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    row: dict[str, Any] = {"type": model_type}
    try:
        without, after = reconstruct_(
            model, mask, tiny_texts(24), tiny_tokenizer(), reading=Reading(batch_size=8, max_length=16)
        )
        row |= {"outcome": "lower" if after < without else "same", "without": without, "after": after}
    except SecateurError as error:
        row |= {"outcome": "refused", "reason": first_line(error)}
    except Exception as error:
        row |= {"outcome": "does not run on texts alone", "reason": f"{type(error).__name__}: {first_line(error)}"}
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, weights[name])}
    may = {piece.parameter for site in sites.values() for piece in site.slices_of("output")}
    if not changed <= (may if row["outcome"] == "lower" else set()):
        return {**row, "outcome": "WRONG", "reason": f"{sorted(changed - may)[:3]} changed"}
    if row["outcome"] in ("lower", "same"):
        try:
            row["proof"] = remove_(model, mask).max_difference
        except SecateurError as error:
            row |= {"outcome": "WRONG", "reason": first_line(error)}
    return row


def measure(run: Run, *, timeout: float, only: list[str] | None) -> None:
    swept = [
        row["type"] for row in read_json(RESULTS / "sweep.json")["types"] if row["outcome"] in ("removed", "reloaded")
    ]
    rows = []
    for model_type in only or swept:
        rows.append(in_child(check_type, model_type, timeout))
        print(f"{model_type:32} {rows[-1]['outcome']:10} {rows[-1].get('reason', '')[:200]}", flush=True)
    counts = dict(collections.Counter(row["outcome"] for row in rows))
    print(counts)
    run.write(counts=counts, types=rows)
    sys.exit("WRONG" in counts)
