"""A pruning on its way: each step, and what the report says of it."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from secateur.choosing.allocation import SensitivitySelection
from secateur.choosing.budget import BudgetOutcome
from secateur.choosing.by_cut import kinds_there, selection_of
from secateur.choosing.refinement import refine_mask
from secateur.errors import InvalidInputError, UnsupportedModelError, shown
from secateur.measuring.cost import check_heads, measure_cost
from secateur.models.base_model import base_of
from secateur.models.fetched import set_values_
from secateur.models.loading import load_model, load_tokenizer
from secateur.models.names import original_name
from secateur.models.offload import check_loaded, is_offloaded
from secateur.models.sentence_transformers import transformer_of
from secateur.models.state import check_plain_weights
from secateur.models.tokenizer_saving import note_tokenizer_
from secateur.pruning_plan import SCORED_TEXTS, too_few
from secateur.pruning_steps import Steps
from secateur.pruning_time import planned, tell_duration
from secateur.removal.plain import check_plain
from secateur.removal.remove import remove_
from secateur.restoring.distillation import distill_
from secateur.restoring.keeping import smallest_keeping
from secateur.restoring.quality import QualityJudge
from secateur.restoring.reconstruction import FEWEST, reconstruct_
from secateur.scorers.score import AnyScorer, criteria_of, score
from secateur.settings import Budget, Cut, Reading, Restore
from secateur.sites.attention_maps import MAX_TEXTS, mean_maps
from secateur.sites.recipe import TRAINED, read_recipe
from secateur.support.checks import is_number
from secateur.support.versions import __version__
from secateur.texts.calibration import PreparedModel
from secateur.texts.examples import Example, are_rows
from secateur.texts.sources import reading_order
from secateur.units.masks import Mask, units_left
from secateur.units.scores import Scores
from secateur.units.select import select

_PROOF_TEXTS = 8


def _copied(model: Any, tokenizer: Any, reads: bool, reading: Reading) -> tuple[str, Any, Any]:
    """Return the name of the model, a copy that may get smaller, and the tokenizer, if any is known yet."""
    if not isinstance(model, str | Path):
        inner = transformer_of(model)
        check_loaded(base_of(inner), "a copy of a model")
        return original_name(inner) or type(inner).__name__, copy.deepcopy(model), tokenizer
    if tokenizer is None:
        with nullcontext() if reads else suppress(InvalidInputError):  # else it is only saved
            tokenizer = load_tokenizer(model)
    return str(model), load_model(model, reading.device), tokenizer


def _check_numbers(values: Iterable[Any]) -> None:
    """Raise `ValueError` unless each value that an earlier run kept is a finite number."""
    for value in values:
        if not is_number(value):
            raise ValueError(f"{shown(value)} is no number")


class Pruning:
    """A pruning on its way: the copy that gets smaller, prepared once, and the report's `facts` so far.

    Steps that are not wanted do nothing, and those that the model does not allow neither, unless one `is_asked` for.
    Texts `held_out` are read by nothing but the judge.
    """

    def __init__(
        self,
        kept: Steps,
        model: Any,
        texts: Any,
        tokenizer: Any,
        cut: Cut,
        restore: Restore,
        held_out: Sequence[Example],
        reading: Reading,
        *,
        is_asked: bool = False,
        left_out: tuple[str, ...] = (),
    ) -> None:
        self.is_asked = is_asked
        self.kept, self.restore = kept, restore
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
        check_plain_weights(self.prepared.base)
        if restore == "distill" and is_offloaded(self.model):
            if is_asked:
                check_loaded(self.model, "distillation")
            restore = self.restore = "reconstruct"
            left_out += ("not distilled: `device_map` left some weights on CPU or disk",)
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
            "left_out": left_out,
        }  # fmt: skip
        self.record: dict[str, Any] = {}
        self.quality = QualityJudge(self.prepared, held_out, reading) if held_out else None

    def tell_duration(self, scorer: AnyScorer | Scores, options: Mapping[str, Any], steps: int) -> None:
        """Say how long all of it will take, where progress is shown."""
        if self.reading.progress and not self.kept.names():
            criteria = {} if isinstance(scorer, Scores) else criteria_of(scorer, self.cut.kinds, options)
            plan = partial(planned, cut=self.cut, criteria=criteria, restore=self.restore, steps=steps)
            tell_duration(self.prepared, self.texts, self.reading, plan)

    def choose(self, scorer: AnyScorer | Scores, labels: Any, options: Mapping[str, Any]) -> Mask:
        """Score, select and refine; or read what an earlier run came to."""
        known = ("requested_ratio", "refinement", "scoring_seconds")
        if (found := self.kept.read("mask")) is not None:
            with self.kept.reading("mask"):
                facts = {name: value for name, value in found["facts"].items() if name in known}
                facts |= {"refinement": tuple(facts["refinement"])} if "refinement" in facts else {}
                for value in facts.values():
                    _check_numbers(value if isinstance(value, tuple) else [value])
                before, mask = Scores.from_json(found["scores"]), Mask.from_json(found["mask"])
                if self.similarity is not None:
                    _check_numbers([found["expected"]])
                    self._settle(Budget.parse(found["budget"]), found["expected"])
            self.facts |= facts
            self.note(before, isinstance(scorer, Scores))
            return mask
        scores = self.score(scorer, labels, options)
        mask = self.refine(self.select(scores))
        found = {"scores": scores.to_json(), "mask": mask.to_json()}
        found["facts"] = {name: self.facts[name] for name in known if name in self.facts}
        if self.similarity is not None and self.within is not None:
            found |= {"budget": str(self.within.joint), "expected": self.expected}
        self.kept.write("mask", found)
        return mask

    def score(self, scorer: AnyScorer | Scores, labels: Any, options: Mapping[str, Any]) -> Scores:
        """Score every unit that may go, and see which texts that took; or take scores that are there."""
        if isinstance(scorer, Scores):
            self.facts["scoring_seconds"] = 0.0
            self.note(scorer, True)
            return scorer
        start = time.perf_counter()
        scores = score(
            self.prepared, self.texts, scorer, units=self.cut.kinds, labels=labels, cut=self.cut, reading=self.reading,
            **options
        )  # fmt: skip
        self.facts["scoring_seconds"] = time.perf_counter() - start
        self.note(scores)
        return scores

    def note(self, scores: Scores, are_given: bool = False) -> None:
        """Note what the report says of scores, and which texts they took; those that are given took none of these."""
        if isinstance(self.texts, Sequence):
            count = None if are_given else scores.num_texts
            self.read = [self.texts[i] for i in reading_order(self.texts, self.reading)[:count]]
        self.facts |= {
            "scorer": scores.scorer or "given", "scores": scores, "num_texts": scores.num_texts or 0,
            "agreement": scores.agreement,
        }  # fmt: skip
        if self.reading.maps and self.read:
            batch = self.prepared.batches(self.read[:MAX_TEXTS], MAX_TEXTS)[0]
            self.facts["attention_maps"] = mean_maps(self.model, self.prepared.sites, batch)

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
        self._settle(budget, cosine)
        self.facts["requested_ratio"] = mask.pruning_ratio
        return mask

    def _settle(self, budget: Budget, cosine: float) -> None:
        assert isinstance(self.within, SensitivitySelection)
        self.within, self.expected = self.within.at(budget), cosine

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

    def reconstruct(self, mask: Mask) -> None:
        """Refit what the kept units write; a refusal of what nobody asked for is noted, and stops nothing."""
        if self.restore == "none":
            return
        if (found := self.kept.read("refit")) is not None:
            with self.kept.reading("refit"):
                before, after = found
                _check_numbers(found)
                for name, weight in self.kept.tensors("refit").items():
                    path, _, own = name.rpartition(".")
                    module, parameter = self.prepared.base.get_submodule(path), self.prepared.base.get_parameter(name)
                    if weight.shape != parameter.shape:
                        raise ValueError(f"{name} has another shape")
                    set_values_(module, {own: weight if parameter.is_meta else weight.to(parameter)})
            self._note_refit(before, after)
            return
        fitted = cast(Any, self.read[:: math.ceil(len(self.read) / SCORED_TEXTS) or 1])
        if line := too_few("reconstructed", fitted, FEWEST):
            self.facts["left_out"] += (line,)
            return
        there = [(name, parameter, parameter.data) for name, parameter in self.prepared.base.named_parameters()]
        try:
            before, after = reconstruct_(self.prepared, mask, fitted, reading=self.reading)
        except (InvalidInputError, UnsupportedModelError) as error:
            if self.is_asked:
                raise
            self.facts["left_out"] += (f"not reconstructed: {error}",)
            return
        self._note_refit(before, after)
        if not is_offloaded(self.model):  # whose weights are others whenever they are fetched
            refitted = {name: parameter for name, parameter, data in there if parameter.data_ptr() != data.data_ptr()}
            self.kept.write("refit", [before, after], refitted)

    def _note_refit(self, before: float, after: float) -> None:
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
            reading=replace(self.reading, stop="all"), checkpoints=self.kept.training,
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
