"""The whole path in one call: score, select, remove, prove and save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from secateur.errors import InvalidInputError
from secateur.models.names import original_name
from secateur.models.sentence_transformers import transformer_of
from secateur.pruning_plan import check_steps, recommended, without_held_out
from secateur.pruning_steps import Steps
from secateur.pruning_work import Pruning
from secateur.report.pruning_files import save_all
from secateur.report.pruning_report import PruningReport
from secateur.scorers import DEFAULT_SCORER
from secateur.scorers.given import check_given, fitting
from secateur.scorers.score import AnyScorer, Labels, check_options
from secateur.settings import AnyBudget, Cut, Reading, Restore, cut_of, settings_of
from secateur.support.checks import check_path
from secateur.support.defaults import DISTILLATION_STEPS
from secateur.support.files import new_folder
from secateur.support.interrupts import interruptible
from secateur.texts.calibration import own_tokenizer, texts_of
from secateur.texts.examples import examples_of
from secateur.texts.tokenization import Text
from secateur.units.scores import Scores


@interruptible
def prune(
    model: str | Path | nn.Module,
    texts: Iterable[Text] | None = None,
    pruning_ratio: float | None = None,
    *,
    budget: AnyBudget | None = None,
    scorer: AnyScorer | Scores = DEFAULT_SCORER,
    restore: Restore | None = None,
    steps: int = DISTILLATION_STEPS,
    labels: Labels | None = None,
    inputs: Sequence[Mapping[str, Tensor]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cut: Cut | None = None,
    reading: Reading | None = None,
    out: str | Path | None = None,
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
        scorer: the criterion, or one for each kind of unit, as `score` takes it, with `options` for its constructor. Or
            the scores themselves, of this model, which `score` returned and `Scores.load` reads.
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
        cut: what else may go (see `Cut`): the kinds of units, the allocation, the floor of a site, sites that stay
            whole, a plain folder, exchanges of heads. `pruning_ratio` and `budget` take the place of its own where they
            are given.
        reading: how the texts are read, and on which device.
        out: a new or empty folder for all that `secateur prune` saves: the model, its tokenizer, the report and its
            page, whole or not at all. None saves nothing.

    Raises what the steps raise, before or after which `model` is what it was, and `WriteError` where the disk does not
    take the result.
    """
    cut = cut_of(cut, pruning_ratio=pruning_ratio, budget=budget)
    with _folder(out, settings_of(reading, Reading)) as folder:
        smaller, report = prune_in_steps(
            Steps(), model, texts, cut, scorer=scorer, restore=restore, steps=steps, labels=labels, inputs=inputs,
            tokenizer=tokenizer, reading=reading, options=options,
        )  # fmt: skip
        if folder is not None:
            save_all(smaller, *_beside(model, tokenizer), report, folder)
    return smaller, report


def _folder(out: str | Path | None, reading: Reading) -> AbstractContextManager[Path | None]:
    """Return the folder that is filled, None where nothing is saved, or another process does it."""
    place = None if out is None else check_path("out", out).expanduser()
    is_main = reading.accelerator is None or reading.accelerator.is_main_process
    return nullcontext() if place is None or not is_main else new_folder(place)


def _beside(
    model: str | Path | nn.Module, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedTokenizerBase | None, str]:
    """Return the tokenizer of a model, where it has one that is not saved with it anyway, and where it came from."""
    if isinstance(model, str | Path):
        return tokenizer, str(model)
    if tokenizer is None:
        with suppress(InvalidInputError):  # it may read no texts, or have no name
            tokenizer = own_tokenizer(model)
    return tokenizer, original_name(transformer_of(model))


@interruptible
@torch.inference_mode(False)  # a copy that is made in it could not be trained
def prune_in_steps(
    kept: Steps,
    model: str | Path | nn.Module,
    texts: Iterable[Text] | None,
    cut: Cut,
    *,
    scorer: AnyScorer | Scores,
    restore: Restore | None,
    steps: int,
    labels: Labels | None,
    tokenizer: PreTrainedTokenizerBase | None,
    reading: Reading | None,
    inputs: Sequence[Mapping[str, Tensor]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Any, PruningReport]:
    """Prune as `prune` does, from where the steps `kept` by an earlier run of the same call end."""
    options = dict(options or {})
    reading = settings_of(reading, Reading)
    texts = texts_of(texts) if inputs is None else cast(Any, examples_of(cast(Any, texts), inputs))
    check_options(options, prune, scorer)
    check_given(scorer, options, reading)
    is_asked = restore is not None
    cut, restore, left_out = recommended(cut, restore, texts)
    check_steps(texts, cut, restore, steps, reading)
    judged: Restore = "distill" if cut.similarity else restore
    texts, labels, held_out, reading = without_held_out(texts, labels, judged, reading)
    work = Pruning(
        kept, model, texts, tokenizer, cut, restore, held_out, reading, is_asked=is_asked, left_out=left_out
    )  # fmt: skip
    scorer = fitting(scorer, work.sites) if isinstance(scorer, Scores) else scorer
    work.tell_duration(scorer, options, steps)
    mask = work.choose(scorer, labels, options)
    work.reconstruct(mask)
    work.remove(mask)
    work.distill(steps)
    work.judge()
    return work.smaller, PruningReport(**work.facts)
