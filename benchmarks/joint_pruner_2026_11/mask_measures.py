"""Which measure of a mask on the frozen model, without labels, foretells what fine-tuning makes of it?

    OMP_NUM_THREADS=1 python benchmarks/mask_measures.py --glue GLUE

Every mask of results/rivals.jsonl is measured on 128 training texts of its task (GLUE: a folder with one folder a
task): the relational KL, and how far the token vectors lie from the dense model's, as a share of their variance: of the
last layer, of all layers, and of the last layer after the linear map that best restores them, found on one half of the
tokens and judged on the other; and, of pairs, the share of the heads' matching (the `matching` scorer's) that the mask
removes. Each measure's rank correlation, over scorers, with what the mask keeps of the dense
model's quality after fine-tuning (mean over seeds) is taken for each task and ratio. Writes results/mask_measures.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from provenance import provenance
from secateur.compare import DENSE
from secateur.data import batches, load_task
from secateur.demo import demo_model
from secateur.files import read_lines, write_text
from secateur.heads import HeadMask
from secateur.meta.objective import relational_kl, represent
from secateur.model.inputs import forward_arguments
from secateur.model.loading import load_model, load_tokenizer
from secateur.model.removal import gated_heads
from secateur.model.sites import find_sites
from secateur.scoring import score_heads

RESULTS = Path(__file__).parent / "results"
TEXTS, BATCH, LENGTH = 128, 64, 64
MATCHING = "matching lost"
TRIVIAL = ("random", "magnitude")  # what any measure tells from the others


class Measures:
    """The frozen model and its dense passes over a task's texts."""

    def __init__(self, glue: Path, task: str) -> None:
        self.model = load_model(demo_model(), "cpu").eval()
        self.sites = find_sites(self.model)
        texts = load_task(glue / task, "train").head(TEXTS, seed=0)
        self.is_pair = texts.is_pair
        tokenizer = load_tokenizer(demo_model())
        self.batches = list(forward_arguments(self.model, batches(tokenizer, texts.texts, BATCH, LENGTH)))
        self.layers, self.representations = self.run(None)
        self.matching: dict[str, Tensor] = {}
        if self.is_pair:
            plain, more = (
                score_heads(
                    self.model, texts.texts, name, tokenizer, max_length=LENGTH, batch_size=BATCH, progress=False
                )
                for name in ("contribution", "matching")
            )
            self.matching = {site: more[site] / plain[site] - 1 for site in plain}

    @torch.no_grad()
    def run(self, mask: HeadMask | None) -> tuple[list[Tensor], list[Tensor]]:
        """Return every layer's vectors of all real tokens, and each batch's text representations."""
        layers, representations = [], []
        with nullcontext() if mask is None else gated_heads(self.model, mask, self.sites):
            for batch in self.batches:
                out = self.model(**batch, output_hidden_states=True)
                real = batch["attention_mask"].bool()
                layers.append([hidden[real].double() for hidden in out.hidden_states[1:]])
                representations.append(represent(self.model, out, batch, self.is_pair))
        return [torch.cat(parts) for parts in zip(*layers, strict=True)], representations

    def __call__(self, mask: HeadMask) -> dict[str, float]:
        layers, representations = self.run(mask)
        away = [lost(pruned, dense) for pruned, dense in zip(layers, self.layers, strict=True)]
        pairs = zip(self.representations, representations, strict=True)
        return {
            "relational KL": statistics.mean(float(relational_kl(dense, pruned)) for dense, pruned in pairs),
            "last layer": away[-1],
            "all layers": statistics.mean(away),
            "last layer, restored": lost(*restored(layers[-1], self.layers[-1])),
        } | ({MATCHING: self.matching_lost(mask)} if self.is_pair else {})

    def matching_lost(self, mask: HeadMask) -> float:
        """Return the share of all heads' matching, in [0, 1], that the mask's heads had."""
        lost = sum(float(row[~mask[site]].sum()) for site, row in self.matching.items())
        return lost / sum(float(row.sum()) for row in self.matching.values())


def lost(pruned: Tensor, dense: Tensor) -> float:
    """Return the squared distance of token vectors `[tokens, width]` as a share of the dense ones' variance."""
    return float((pruned - dense).square().sum() / (dense - dense.mean(dim=0)).square().sum())


def restored(pruned: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return the second half after the linear map that turns the first half into the dense one best, and the dense."""
    half = len(pruned) // 2
    centre, wanted = pruned[:half].mean(dim=0), dense[:half].mean(dim=0)
    known = pruned[:half] - centre
    products = known.T @ known
    ridge = 0.01 * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype)
    found = torch.linalg.solve(products + ridge, known.T @ (dense[:half] - wanted))
    return (pruned[half:] - centre) @ found + wanted, dense[half:]


def correlations(rows: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Return, for each task and ratio, the rank correlation of each measure with what is kept; lower = foretells."""
    means = defaultdict(lambda: defaultdict(list))
    for row in rows:
        means[row["task"], row["ratio"]][row["scorer"]].append(row)
    found = []
    for (task, ratio), scorers in sorted(means.items()):
        kept = [name for name in scorers if name not in TRIVIAL]
        for name in [name for name in names if all(name in row["measures"] for row in scorers[kept[0]])]:
            measured = [statistics.mean(row["measures"][name] for row in scorers[s]) for s in kept]
            quality = [statistics.mean(row["retention"] for row in scorers[s]) for s in kept]
            rho = float(spearmanr(measured, quality).statistic)
            found.append({"task": task, "ratio": ratio, "measure": name, "rank_correlation": rho})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", required=True, type=Path)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    runs = read_lines(RESULTS / "rivals.jsonl")
    dense = {(run["task"], run["seed"]): run["value"] for run in runs if run["scorer"] == DENSE}
    rows: list[dict[str, Any]] = []
    for task in sorted({run["task"] for run in runs}):
        measure, known = Measures(options.glue, task), {}
        for run in tqdm([run for run in runs if run["task"] == task and run["scorer"] != DENSE], desc=task):
            kept = run["kept_heads"]
            if str(kept) not in known:
                heads = {site: torch.arange(measure.sites[site].num_heads) for site in kept}
                mask = HeadMask({site: torch.isin(heads[site], torch.tensor(kept[site])) for site in kept})
                known[str(kept)] = measure(mask)
            about = {key: run[key] for key in ("task", "scorer", "ratio", "seed")}
            rows.append({**about, "measures": known[str(kept)], "retention": run["value"] / dense[task, run["seed"]]})
    names = list(dict.fromkeys(name for row in rows for name in row["measures"]))
    found = correlations(rows, names)
    result = {
        **provenance("OMP_NUM_THREADS=1 python benchmarks/mask_measures.py --glue GLUE"),
        "texts": {"split": "train", "number": TEXTS, "tokens": LENGTH},
        "left_out_of_correlations": TRIVIAL,
        "correlations": found,
        "rows": rows,
    }
    write_text(RESULTS / "mask_measures.json", json.dumps(result, indent=1) + "\n")
    for ratio in sorted({row["ratio"] for row in rows}):
        for name in names:
            chosen = [c["rank_correlation"] for c in found if (c["ratio"], c["measure"]) == (ratio, name)]
            print(f"{ratio:.0%} {name}: {statistics.mean(chosen):.2f} ({min(chosen):.2f} to {max(chosen):.2f})")


if __name__ == "__main__":
    main()
