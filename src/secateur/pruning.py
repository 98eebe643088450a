"""The whole path in one call: score, select, remove and prove, and what a pruning says of itself."""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from secateur.choosing.budget import Budget, BudgetedSelection, BudgetOutcome
from secateur.choosing.refinement import refine_mask
from secateur.errors import InvalidInputError, invalid
from secateur.measuring.cost import ModelCost, check_heads, measure_cost
from secateur.models.inputs import forward_arguments
from secateur.models.loading import check_device, load_model, load_tokenizer
from secateur.models.offload import check_loaded
from secateur.models.sentence_transformers import transformer_of
from secateur.models.state import base_of, check_plain_weights
from secateur.removal.proof import TOLERANCE
from secateur.removal.remove import remove_
from secateur.restoring.reconstruction import reconstruct_
from secateur.scorers import DEFAULT_SCORER
from secateur.scorers.base import Scorer
from secateur.scorers.score import score
from secateur.sites.attention import find_sites
from secateur.sites.attention_maps import MAX_TEXTS, AttentionMaps, mean_maps
from secateur.support.checks import check_accelerator, check_flag, check_whole
from secateur.support.files import write_text
from secateur.support.processes import is_shared
from secateur.support.versions import environment
from secateur.texts.calibration import calibration_batches, own_tokenizer, reading_order, texts_of
from secateur.texts.data import Text
from secateur.texts.stopping import Stop
from secateur.units.masks import Mask
from secateur.units.scores import Scores
from secateur.units.select import Allocation, check_pruning_ratio, select

_PROBE_TEXTS = 8


@dataclass(frozen=True)
class PruningReport:
    """What a pruning did and what it cost: plain values, ready for JSON.

    `pruning_ratio` is the fraction of the heads present before that went; `before` and `after` count heads, parameters
    and multiply-accumulates; `num_texts` were scored, and where scoring stopped by itself, `agreement` is the share of
    heads of which it is 95% sure; `budget` is what was asked for and reached where there was one, for which
    `requested_ratio` was found; `max_difference` is the proof's (float32, at most `tolerance`). `refinement` holds
    the relational KL of every mask that was tried to improve the one that the scores gave, which comes first; `mask` is
    the best of them. `reconstruction` holds the relational KL of that mask without reconstruction and with it, where it
    was asked for. `command` is the command line that asked for it, where one did. `attention_maps` are those of the
    model before, where they were asked for; they have a file of their own.
    """

    model: str
    scorer: str
    allocation: str
    requested_ratio: float
    seed: int
    num_texts: int
    mask: Mask
    scores: Scores
    before: ModelCost
    after: ModelCost
    max_difference: float
    scoring_seconds: float
    agreement: float | None = None
    budget: BudgetOutcome | None = None
    refinement: tuple[float, ...] = ()
    reconstruction: tuple[float, ...] = ()
    tolerance: float = TOLERANCE
    versions: dict[str, str] = field(default_factory=environment)
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))
    command: str = ""
    attention_maps: AttentionMaps | None = None

    @property
    def pruning_ratio(self) -> float:
        """Fraction of the heads present before that were removed."""
        return 1 - self.after.heads / self.before.heads

    def __str__(self) -> str:
        """Say in one line what was kept."""
        kept = f"kept {self.after.heads} of {self.before.heads} heads (pruning ratio {self.pruning_ratio:.2f})"
        return kept if self.budget is None else f"{kept}, {self.budget}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "kind": "pruning_report",
            "model": self.model,
            "scorer": self.scorer,
            "allocation": self.allocation,
            "requested_ratio": self.requested_ratio,
            "pruning_ratio": self.pruning_ratio,
            "seed": self.seed,
            "num_texts": self.num_texts,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "max_difference": self.max_difference,
            "tolerance": self.tolerance,
            "scoring_seconds": self.scoring_seconds,
            "agreement": self.agreement,
            "budget": None if self.budget is None else self.budget.to_json(),
            "refinement": list(self.refinement),
            "reconstruction": list(self.reconstruction),
            "scores": self.scores.to_json()["scores"],
            "kept_heads": self.mask.kept,
            "versions": self.versions,
            "created": self.created,
            "command": self.command,
        }

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(path, json.dumps(self.to_json(), indent=1))


@torch.inference_mode(False)  # a copy that is made in it could not be trained
def prune(
    model: str | Path | nn.Module,
    texts: Iterable[Text] | None = None,
    pruning_ratio: float = 0.5,
    *,
    budget: str | Budget | None = None,
    scorer: str | Scorer = DEFAULT_SCORER,
    allocation: Allocation = "uniform",
    floor: int = 1,
    stop: Stop = "all",
    refine: int = 0,
    reconstruct: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    labels: Sequence[int] | Sequence[float] | None = None,
    batch_size: int = 32,
    max_length: int = 128,
    seed: int = 0,
    device: str | None = None,
    bf16: bool = False,
    maps: bool = False,
    accelerator: Accelerator | None = None,
    progress: bool = False,
    **options: Any,
) -> tuple[Any, PruningReport]:
    """Score, select, remove and prove; return the smaller model and a report.

    `model` is a folder, a Hub id, or a loaded model, which stays whole: a copy is pruned and returned. A
    SentenceTransformer is returned as one, with the transformer in it pruned and its other modules as they were.
    `budget` says how much of the model may remain, such as "macs=0.85" or "latency=0.8x@8x128" (see
    `secateur.choosing.budget.Budget.parse`); the smallest pruning ratio within it takes the place of `pruning_ratio`.
    `refine` is the number of exchanges that `refine_mask` tries on the scored texts. `reconstruct` refits the output
    projections of the heads that stay on these texts, as `reconstruct_` does. `maps` keeps the mean
    attention maps of the first few texts in the report; it takes a pass over them. The other arguments are those of
    `score` and `select`. The proof runs on the first few of the texts.
    """
    check_whole("refine", refine, 0)
    check_flag("reconstruct", reconstruct)
    check_flag("maps", maps)
    check_pruning_ratio(pruning_ratio)
    if device is not None:
        check_device(device)
    check_accelerator(accelerator)
    texts = texts_of(texts)
    wanted = None if budget is None else Budget.of(budget)
    if isinstance(model, str | Path):
        name = str(model)
        tokenizer = load_tokenizer(model) if tokenizer is None and texts is not None else tokenizer
        smaller = pruned = load_model(model, device)
    else:
        inner = transformer_of(model)
        base_of(inner)
        name = str(getattr(inner, "name_or_path", "") or type(inner).__name__)
        if tokenizer is None and texts is not None:
            tokenizer = own_tokenizer(model)
        smaller = copy.deepcopy(model)
        pruned = transformer_of(smaller)
    check_loaded(pruned, "pruning")
    check_plain_weights(base_of(pruned))
    before = measure_cost(pruned)
    check_heads(pruned, before.heads)
    if (refine or reconstruct) and not isinstance(texts, Sequence):
        needs = "`refine` needs `texts` to judge masks by" if refine else "`reconstruct` needs `texts` to fit on"
        raise InvalidInputError(f"{needs}, in a list, as it reads them again")
    if refine and allocation == "ranking" and wanted is not None and wanted.quantity != "heads":
        raise invalid(
            "refine", f"be 0 with allocation 'ranking' with the budget {wanted}, which exchanges may exceed", refine
        )
    if wanted is not None and wanted.quantity == "latency" and is_shared(accelerator):
        raise invalid("budget", "be of another kind under a launcher, whose processes would time each other", wanted)
    within = None if wanted is None else BudgetedSelection(pruned, wanted, allocation, floor, progress)
    if within is not None:
        pruning_ratio = within.expected_ratio
    first: Sequence[Text] | None = None
    if texts is not None and not isinstance(texts, Sequence) and isinstance(texts, Iterable):
        left = iter(texts)
        first = list(itertools.islice(left, MAX_TEXTS))
        texts = itertools.chain(first, left)
    start = time.perf_counter()
    scores = score(
        pruned,
        texts,
        scorer,
        tokenizer,
        labels=labels,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        pruning_ratio=pruning_ratio,
        allocation=allocation,
        floor=floor,
        stop=stop,
        bf16=bf16,
        accelerator=accelerator,
        progress=progress,
        **options,
    )
    seconds = time.perf_counter() - start
    if within is None:
        mask = select(scores, pruning_ratio, allocation, floor)
    else:
        mask, pruning_ratio = within.select(scores)
    refinement: list[float] = []
    if isinstance(texts, Sequence):
        first = [texts[i] for i in reading_order(texts, stop, seed)[: scores.num_texts]]
    if refine and first is not None:
        mask, refinement = refine_mask(
            pruned, mask, first, tokenizer, steps=refine, allocation=allocation, floor=floor, batch_size=batch_size,
            max_length=max_length, seed=seed, accelerator=accelerator, progress=progress,
        )  # fmt: skip
    attention = None
    if maps and first is not None and tokenizer is not None:
        made = list(calibration_batches(pruned, first[:MAX_TEXTS], tokenizer, MAX_TEXTS, max_length))
        attention = mean_maps(pruned, find_sites(pruned), forward_arguments(base_of(pruned), made)[0])
    inputs = None
    if first is not None and tokenizer is not None:
        made = list(calibration_batches(pruned, first[:_PROBE_TEXTS], tokenizer, _PROBE_TEXTS, max_length))
        inputs = forward_arguments(base_of(pruned), made)[0]
    record: dict[str, Any] = {
        "scorer": scores.scorer,
        "allocation": allocation,
        "base_model": name,
        "secateur_version": environment()["secateur"],
    }
    reconstruction: tuple[float, ...] = ()
    if reconstruct and first is not None:
        reconstruction = reconstruct_(
            pruned, mask, first, tokenizer, batch_size=batch_size, max_length=max_length, accelerator=accelerator,
            progress=progress,
        )  # fmt: skip
        if reconstruction[1] < reconstruction[0]:
            record["reconstructed"] = True
    removal = remove_(pruned, mask, inputs=inputs, record=record)
    report = PruningReport(
        model=name,
        scorer=scores.scorer,
        allocation=allocation,
        requested_ratio=pruning_ratio,
        seed=seed,
        num_texts=scores.num_texts or 0,
        mask=removal.mask,
        scores=scores,
        before=before,
        after=measure_cost(pruned),
        max_difference=removal.max_difference,
        scoring_seconds=seconds,
        agreement=scores.agreement,
        budget=None if within is None else within.outcome(mask, pruned),
        refinement=tuple(refinement),
        reconstruction=reconstruction,
        attention_maps=attention,
    )
    return smaller, report
