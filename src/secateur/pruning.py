"""The whole path in one call: score, select, remove and prove."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from secateur.choosing.allocation import SensitivitySelection
from secateur.choosing.budget import BudgetOutcome
from secateur.choosing.by_cut import kinds_there, selection_of
from secateur.choosing.refinement import refine_mask
from secateur.errors import InvalidInputError, UnsupportedModelError
from secateur.measuring.cost import check_heads, measure_cost
from secateur.models.base_model import base_of
from secateur.models.loading import load_model, load_tokenizer
from secateur.models.names import original_name
from secateur.models.offload import check_loaded
from secateur.models.sentence_transformers import transformer_of
from secateur.models.state import check_plain_weights
from secateur.models.tokenizer_saving import note_tokenizer_
from secateur.pruning_plan import SCORED_TEXTS, check_steps, recommended, too_few, without_held_out
from secateur.pruning_report import PruningReport
from secateur.pruning_time import planned, tell_duration
from secateur.removal.plain import check_plain
from secateur.removal.remove import remove_
from secateur.restoring.distillation import distill_
from secateur.restoring.keeping import smallest_keeping
from secateur.restoring.quality import QualityJudge
from secateur.restoring.reconstruction import FEWEST, reconstruct_
from secateur.scorers import DEFAULT_SCORER
from secateur.scorers.score import AnyScorer, Labels, check_options, criteria_of, score
from secateur.settings import AnyBudget, Budget, Cut, Reading, Restore, cut_of, settings_of
from secateur.sites.attention_maps import MAX_TEXTS, mean_maps
from secateur.sites.recipe import TRAINED, read_recipe
from secateur.support.defaults import DISTILLATION_STEPS
from secateur.support.versions import __version__
from secateur.texts.calibration import PreparedModel, texts_of
from secateur.texts.examples import Example, are_rows, examples_of
from secateur.texts.sources import reading_order
from secateur.texts.tokenization import Text
from secateur.units.masks import Mask, units_left
from secateur.units.scores import Scores
from secateur.units.select import select

_PROOF_TEXTS = 8


@torch.inference_mode(False)  # a copy that is made in it could not be trained
def prune(
    model: str | Path | nn.Module,
    texts: Iterable[Text] | None = None,
    pruning_ratio: float | None = None,
    *,
    budget: AnyBudget | None = None,
    units: Collection[str] | None = None,
    scorer: AnyScorer = DEFAULT_SCORER,
    restore: Restore | None = None,
    steps: int = DISTILLATION_STEPS,
    labels: Labels | None = None,
    inputs: Sequence[Mapping[str, Tensor]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cut: Cut | None = None,
    reading: Reading | None = None,
    **options: Any,
) -> tuple[Any, PruningReport]:
    """Score, select, refine, reconstruct, remove and prove; return the smaller model and a report.

    Args:
        model: a folder, a Hub id, or a loaded model, which stays whole: a copy is pruned and returned. A
            SentenceTransformer is returned as one, its transformer pruned and its other modules as they were.
        texts: calibration texts, as `score` takes them; the proof runs on the first few.
        pruning_ratio: fraction of the units that go, in [0, 1). None = that of `cut`, by default a half.
        budget: how much of the model may remain, such as "macs=0.5", "latency=0.8x@8x128" or "heads=0.75,neurons=0.5"
            (see `budgets_of`); the smallest pruning ratio within it takes the place of `pruning_ratio`. Or how near the
            model stays to the dense one, "similarity=0.98": the least work with which the mean cosine of
            representations, on texts held out, is as high before distillation (`smallest_keeping`).
        units: kinds of units that may go, of "heads", "neurons", "layers". None = those of `cut`, by default those that
            the budget names, heads and neurons for one that counts all (if plain, layers too), heads for a ratio.
        scorer: the criterion, or one for each kind of unit, as `score` takes it, with `options` for its constructor.
        restore: "reconstruct" refits what the kept units write on up to 1,024 of the texts scored, as `reconstruct_`
            does, "distill" also teaches the smaller model on all, as `distill_` does, and "none" does neither. None =
            "distill" where the allocation is by sensitivity by default, "none" where layers alone go or there are no
            texts in a list, "reconstruct" elsewhere. A step that needs more texts is left out, and so is a refit that
            nobody asked for and the model or the batches do not allow; the report's `left_out` says which and why.
        steps: optimiser updates of the distillation.
        labels: one for each text, for scorers that need them.
        inputs: ready batches of keyword arguments instead of texts, for models that read images or sound. Every tensor
            has a row for each example, and each step chooses among these, and reads them in batches of its own, as it
            does with texts; examples of unlike shapes share none.
        tokenizer: of the model; looked up by its name where absent.
        cut: what else may go (see `Cut`): the allocation, the floor of a site, sites that stay whole, a plain folder,
            exchanges of heads. `pruning_ratio`, `budget` and `units` take the place of its own where they are given.
        reading: how the texts are read, and on which device.

    Raises what the steps raise, before or after which `model` is what it was.
    """
    reading = settings_of(reading, Reading)
    texts = texts_of(texts) if inputs is None else cast(Any, examples_of(cast(Any, texts), inputs))
    check_options(options)
    is_asked = restore is not None
    cut = cut_of(cut, pruning_ratio=pruning_ratio, budget=budget, units=units)
    cut, restore, left_out = recommended(cut, restore, texts)
    check_steps(texts, cut, restore, steps, reading)
    judged: Restore = "distill" if cut.similarity else restore
    texts, labels, held_out, reading = without_held_out(texts, labels, judged, reading)
    work = _Pruning(model, texts, tokenizer, cut, restore, held_out, reading)
    work.facts["left_out"] = left_out
    work.tell_duration(scorer, options, steps)
    mask = work.refine(work.select(work.score(scorer, labels, options)))
    work.reconstruct(mask, is_asked)
    work.remove(mask)
    work.distill(steps)
    work.judge()
    return work.smaller, PruningReport(**work.facts)


def _copied(model: Any, tokenizer: Any, reads: bool, reading: Reading) -> tuple[str, Any, Any]:
    """Return the name of the model, a copy that may get smaller, and the tokenizer, if any is known yet."""
    if not isinstance(model, str | Path):
        inner = transformer_of(model)
        base_of(inner)
        return original_name(inner) or type(inner).__name__, copy.deepcopy(model), tokenizer
    if tokenizer is None:
        with nullcontext() if reads else suppress(InvalidInputError):  # else it is only saved
            tokenizer = load_tokenizer(model)
    return str(model), load_model(model, reading.device), tokenizer


class _Pruning:
    """A pruning on its way: the copy that gets smaller, prepared once, and the report's `facts` so far.

    Steps that are not wanted do nothing. Texts `held_out` are read by nothing but the judge.
    """

    def __init__(
        self,
        model: Any,
        texts: Any,
        tokenizer: Any,
        cut: Cut,
        restore: Restore,
        held_out: Sequence[Example],
        reading: Reading,
    ) -> None:
        self.restore = restore
        self.reads_texts = texts is not None and not are_rows(texts)
        self.name, self.smaller, tokenizer = _copied(model, tokenizer, self.reads_texts, reading)
        self.prepared = PreparedModel(self.smaller, tokenizer, reading)
        self.similarity = cut.similarity
        if self.similarity is not None:
            cut = replace(cut, budget=Budget("macs", 1.0))
        self.model, self.cut, self.reading = self.prepared.model, cut, reading
        self.read: Sequence[Example] = []  # what was read of the texts, in that order; of a stream the first few
        if texts is None or isinstance(texts, Sequence):
            self.texts: Iterable[Any] | None = texts
        else:
            left = iter(texts)
            self.read = list(itertools.islice(left, MAX_TEXTS))
            self.texts = itertools.chain(self.read, left)
        self.prepared.keeps = frozenset(cast(Any, self.read)) if self.read else None
        if self.reads_texts:
            self.prepared.tokenizer  # noqa: B018 - a model without one is refused before any work
        check_loaded(self.model, "pruning")
        check_plain_weights(self.prepared.base)
        before = measure_cost(self.model)
        self.cut = cut = replace(cut, units=kinds_there(self.prepared, cut))
        self.sites = self.prepared.sites_of(cut.kinds)
        if "heads" in cut.kinds:
            check_heads(self.model, before.heads)
        self.teacher = copy.deepcopy(self.model) if restore == "distill" else None
        self.within = selection_of(self.prepared, cut, self.texts, reading, self.sites)
        if self.within is not None:
            self.cut = replace(cut, pruning_ratio=self.within.expected_ratio)
        self.facts: dict[str, Any] = {
            "model": self.name, "allocation": cut.allocation, "seed": reading.seed, "before": before,
        }  # fmt: skip
        self.record: dict[str, Any] = {}
        self.quality = QualityJudge(self.prepared, held_out, reading) if held_out else None

    def tell_duration(self, scorer: AnyScorer, options: Mapping[str, Any], steps: int) -> None:
        """Say how long all of it will take, where progress is shown."""
        if self.reading.progress:
            criteria = criteria_of(scorer, self.cut.kinds, options)
            plan = partial(planned, cut=self.cut, criteria=criteria, restore=self.restore, steps=steps)
            tell_duration(self.prepared, self.texts, self.reading, plan)

    def score(self, scorer: AnyScorer, labels: Any, options: Mapping[str, Any]) -> Scores:
        """Score every unit that may go, and see which texts that took."""
        start = time.perf_counter()
        scores = score(
            self.prepared, self.texts, scorer, units=self.cut.kinds, labels=labels, cut=self.cut, reading=self.reading,
            **options
        )  # fmt: skip
        seconds = time.perf_counter() - start
        if isinstance(self.texts, Sequence):
            self.read = [self.texts[i] for i in reading_order(self.texts, self.reading)[: scores.num_texts]]
        self.facts |= {
            "scorer": scores.scorer, "scores": scores, "num_texts": scores.num_texts or 0,
            "agreement": scores.agreement, "scoring_seconds": seconds,
        }  # fmt: skip
        if self.reading.maps and self.read:
            batch = self.prepared.batches(self.read[:MAX_TEXTS], MAX_TEXTS)[0]
            self.facts["attention_maps"] = mean_maps(self.model, self.prepared.sites, batch)
        return scores

    def select(self, scores: Scores) -> Mask:
        """Select by the pruning ratio, by the smallest one within the budget, or as few as keep a similarity."""
        if self.similarity is not None:
            return self._search(scores, self.similarity)
        ratio = self.cut.pruning_ratio
        if self.within is None:
            may_go = self.cut.may_go(scores)
            mask = select(may_go, ratio, self.cut.ranked, self.cut.floor, self.cut.multiple)
        else:
            mask, ratio = self.within.select(scores)
        self.facts["requested_ratio"] = ratio
        return mask

    def _search(self, scores: Scores, similarity: Budget) -> Mask:
        assert isinstance(self.within, SensitivitySelection)
        assert self.quality is not None
        restores = self.restore != "none"
        budget, mask, cosine = smallest_keeping(self.within, scores, self.quality, similarity, restores)
        self.within = self.within.at(budget)
        self.expected = cosine
        self.facts["requested_ratio"] = mask.pruning_ratio
        return mask

    def refine(self, mask: Mask) -> Mask:
        """Exchange heads while that helps."""
        if not self.cut.refine:
            return mask
        mask, losses = refine_mask(
            self.prepared, mask, cast(Any, self.read), steps=self.cut.refine, allocation=self.cut.ranked,
            floor=self.cut.floor, reading=self.reading,
        )  # fmt: skip
        self.facts["refinement"] = tuple(losses)
        return mask

    def reconstruct(self, mask: Mask, is_asked: bool) -> None:
        """Refit what the kept units write; a refusal of what nobody asked for is noted, and stops nothing."""
        if self.restore == "none":
            return
        fitted = cast(Any, self.read[:: math.ceil(len(self.read) / SCORED_TEXTS) or 1])
        if line := too_few("reconstructed", fitted, FEWEST):
            self.facts["left_out"] += (line,)
            return
        try:
            before, after = reconstruct_(self.prepared, mask, fitted, reading=self.reading)
        except (InvalidInputError, UnsupportedModelError) as error:
            if is_asked:
                raise
            self.facts["left_out"] += (f"not reconstructed: {error}",)
            return
        self.facts["reconstruction"] = (before, after)
        if after < before:
            self.record["reconstructed"] = True

    def distill(self, steps: int) -> None:
        """Teach the smaller model what the dense one computes, on all texts but those held out."""
        if self.teacher is None:
            return
        assert isinstance(self.texts, Sequence)
        kept = self.facts["mask"].present(self.sites).kept
        layers = {name: kept[name] for name, site in self.sites.items() if site.kind == "layers"}
        tokenizer = self.prepared.tokenizer if self.reads_texts else None
        before, after = distill_(
            self.model, self.teacher, self.texts, tokenizer, steps=steps, layers=layers or None,
            reading=replace(self.reading, stop="all"),
        )  # fmt: skip
        self.facts |= {"distillation": (before, after), "steps": steps}
        self.teacher = None

    def judge(self) -> None:
        """See what is left of the model on the texts held out."""
        if self.quality is not None:
            quality = self.facts["quality"] = self.quality()
            if self.similarity is not None:
                outcome = BudgetOutcome(self.similarity, self.expected, quality.cosine)
                self.facts["budget"] = (outcome, *self.facts["budget"])

    def remove(self, mask: Mask) -> None:
        """Remove what the mask drops, prove it, and measure what is left."""
        inputs = self.prepared.batches(self.read[:_PROOF_TEXTS], _PROOF_TEXTS)[0] if self.read else None
        about = {"scorer": self.facts["scorer"], "allocation": self.cut.allocation, "base_model": self.name}
        # Of the model that is named here, which may be a pruned one, nothing was trained since.
        earlier = read_recipe(self.prepared.base.config)
        since = {name: False for name in TRAINED if earlier is not None and name in earlier.record}
        record = {**about, "secateur_version": __version__, **since, **self.record}
        counts = units_left(self.sites, mask)
        removal = remove_(self.model, mask, inputs=inputs, sites=self.sites, record=record)
        if self.cut.plain:
            check_plain(self.model)
        if self.prepared.knows_tokenizer:
            note_tokenizer_(self.model, self.prepared.tokenizer)
        self.facts |= {
            "mask": removal.mask, "max_difference": removal.max_difference, "after": measure_cost(self.model),
            "budget": () if self.within is None else self.within.outcomes(mask, self.model), "units": counts,
        }  # fmt: skip
