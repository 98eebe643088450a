"""Every head's score: texts, or ready batches, through one criterion."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from secateur.errors import InvalidInputError, invalid
from secateur.models.finite import check_pass
from secateur.models.inputs import ForwardArguments
from secateur.models.inputs import max_length as longest
from secateur.models.offload import check_loaded
from secateur.models.sentence_transformers import transformer_of
from secateur.models.state import base_of, bfloat16_passes, evaluation_mode, held
from secateur.pruners.tokens import special_ids_of
from secateur.scorers import DEFAULT_SCORER, SCORERS, make_scorer
from secateur.scorers.base import Scorer, ScoringTask, StreamingScorer, Supervision
from secateur.sites.attention import find_sites
from secateur.sites.layout import AttentionSite
from secateur.support.checks import check_accelerator, check_flag, check_mapping, check_seed, check_whole
from secateur.texts.batches import Batch
from secateur.texts.calibration import (
    as_list,
    by_length,
    calibration_batches,
    own_tokenizer,
    reading_order,
    stream_batches,
    texts_of,
)
from secateur.texts.data import Task, Text
from secateur.texts.halving import halves_batches
from secateur.texts.stopping import AGREEMENT, Settling, Stop, check_stop
from secateur.units.scores import PresentScores, Scores
from secateur.units.select import Allocation, check_selection, select


@halves_batches
def score(
    model: nn.Module,
    texts: Iterable[Text] | None = None,
    scorer: str | Scorer = DEFAULT_SCORER,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    labels: Sequence[int] | Sequence[float] | None = None,
    inputs: Sequence[Mapping[str, Tensor]] | None = None,
    batch_size: int = 32,
    max_length: int = 128,
    seed: int = 0,
    pruning_ratio: float = 0.5,
    allocation: Allocation = "uniform",
    floor: int = 1,
    stop: Stop = "all",
    bf16: bool = False,
    accelerator: Accelerator | None = None,
    progress: bool = False,
    **options: Any,
) -> Scores:
    """Score every attention head of `model`, which is left as it was.

    Args:
        model: a transformers model, or a SentenceTransformer; of a task model, the base model is scored.
        texts: calibration texts, unlabelled: strings, or pairs of strings. Not needed by every scorer. What is no
            sequence, such as a generator, is read in its own order, by scorers that stream one batch at a time, so that
            memory does not grow with their number; a number for `stop` takes the first ones.
        scorer: a registered name, with `options` for its constructor, or a `Scorer`.
        tokenizer: of the model; looked up by the model's name where absent.
        labels: one for each text, for scorers that need them: classes from 0 up, or floats for a regression. Such
            scorers look at the loss of `model` where it has a classification head, and of a fine-tuned copy elsewhere.
        inputs: ready batches of keyword arguments instead of texts, for models that read something else.
        batch_size: texts a batch; halved, with a `SecateurWarning`, while a batch does not fit into memory. Where a
            scorer reads each text by itself, texts of like length share a batch, which saves padding.
        max_length: tokens a text, at most.
        seed: for scorers that draw random numbers.
        pruning_ratio: what the scores will be selected with, for scorers that learn a subset of that size (`dsp`), and
            for `stop="auto"`.
        allocation, floor: what the scores will be selected with, for `stop="auto"`.
        stop: "all" scores every text, a number that many, drawn with the seed; "auto" reads the texts in random order
            and stops when the heads to keep have settled (see `Settling`), which takes a scorer that
            streams: a mean over texts from one dense pass. Texts that are no sequence must come in random order for it.
            The scores say how many texts were scored.
        bf16: whether the passes compute matrix products in bfloat16 (torch.autocast): faster where the device has it,
            far slower on a CPU that has not, and the same scores but for rounding. What a scorer reads of a pass is
            summed in float32.
        accelerator: of the processes that `accelerate launch` or torchrun started, all of which make this call with the
            same arguments: each scores a share of the batches, and all return the scores of one process, bit for bit.
        progress: whether to show a progress bar on stderr.

    Raises `InvalidInputError` for bad arguments, missing texts or labels, and non-finite scores,
    `UnsupportedModelError` where heads cannot be told apart.
    """
    given, model = model, transformer_of(model)
    base = base_of(model)
    criterion = make_scorer(scorer, **options) if isinstance(scorer, str) else scorer
    if not isinstance(criterion, Scorer):
        raise TypeError(f"`scorer` must be a registered name or a Scorer, got {type(scorer).__name__}")
    check_seed(seed)
    check_whole("batch_size", batch_size)
    check_whole("max_length", max_length, 4)
    check_flag("bf16", bf16)
    check_flag("progress", progress)
    check_accelerator(accelerator)
    if labels is not None:
        if isinstance(labels, str) or not (isinstance(labels, Sequence) or hasattr(labels, "__array__")):
            raise invalid("labels", "be a list with a number for each text", labels)
        try:
            labels = [x.item() if hasattr(x, "item") else x for x in labels]  # of an array or a column of a table
        except (TypeError, ValueError):  # an array of no or two dimensions
            raise invalid("labels", "be a list with a number for each text", labels) from None
    if inputs is not None:
        _check_inputs(inputs)
    check_selection(pruning_ratio, allocation, floor)
    if criterion.needs_gradients:
        check_loaded(base, f"scorer {criterion_name(criterion)}, which back-propagates,")
    check_stop(stop)
    streams = isinstance(criterion, StreamingScorer)
    if stop == "auto" and not streams:
        raise invalid(
            "stop", f"be 'all' or a number with scorer {criterion_name(criterion)}, which does not stream", stop
        )
    if stop != "all" and (inputs is not None or texts is None):
        raise invalid("stop", "be 'all' where there are no `texts` to choose from", stop)
    texts = texts_of(texts)
    listed, stream = as_list(texts, streams and inputs is None and labels is None), None
    with held(base), evaluation_mode(model), torch.inference_mode(False), torch.enable_grad():
        made: Sequence[Mapping[str, Tensor]] = []
        if inputs is not None:
            made = [dict(batch) for batch in inputs]
        elif listed is not None:
            tokenizer = own_tokenizer(given) if tokenizer is None else tokenizer
            order = reading_order(listed, stop, seed)
            if labels is not None and criterion.needs_labels:
                if len(labels) != len(listed):
                    raise invalid("labels", f"hold one label for each of the {len(listed)} texts", len(labels))
                labels = [labels[i] for i in order]
            listed = [listed[i] for i in order]
            if criterion.texts_apart and stop != "auto" and not criterion.needs_labels:
                listed = by_length(listed)
            made = calibration_batches(model, listed, tokenizer, batch_size, max_length)
        elif texts is not None:
            tokenizer = own_tokenizer(given) if tokenizer is None else tokenizer
            first = itertools.islice(texts, stop if isinstance(stop, int) else None)
            stream = stream_batches(model, first, tokenizer, batch_size, max_length)
        elif criterion.needs_texts:
            raise InvalidInputError(f"scorer {criterion_name(criterion)} needs `texts`")
        arguments: Sequence[Batch] = ForwardArguments(base, made)
        if not streams:  # others read them more than once
            made, arguments = list(made), list(arguments)
        sample = stream.first if stream is not None else listed
        is_pair = sample is not None and len(sample) > 0 and not isinstance(sample[0], str)
        sites = find_sites(model)
        special_ids = special_ids_of(base.config.get_text_config() if tokenizer is None else tokenizer)
        taught = None
        if criterion.needs_labels:
            if labels is None:
                raise InvalidInputError(f"scorer {criterion_name(criterion)} needs `labels`, one for each text")
            taught = _supervise(model, made, labels, listed if inputs is None else None, tokenizer, max_length)
        settling = None
        if stop == "auto":
            selecting = _selecting(sites, pruning_ratio, allocation, floor)
            settling = Settling(selecting, math.inf if listed is None else len(listed), seed, accelerator)
        task = ScoringTask(
            base, sites, arguments, is_pair, seed, progress, special_ids, taught, pruning_ratio, settling, accelerator,
            stream,
        )  # fmt: skip
        with bfloat16_passes(base, bf16):
            found = criterion.score(task)
        if not all(bool(torch.isfinite(torch.as_tensor(row)).all()) for row in found.values()):
            for batch in arguments:
                check_pass(base, partial(base, **batch))
    _check_finite(found, criterion_name(criterion))
    scores = PresentScores.of(found, sites, criterion_name(criterion)).original(sites)
    if settling is not None:
        # A stream that ended before was read whole, which nobody could know at the last look.
        agreement = settling.agreement if settling.agreement >= AGREEMENT else 1.0
        return replace(scores, num_texts=settling.seen, agreement=agreement)
    if stream is not None:
        return replace(scores, num_texts=stream.seen)
    return scores if listed is None or inputs is not None else replace(scores, num_texts=len(listed))


def criterion_name(scorer: Scorer) -> str:
    """Return the registered name of a scorer, or its class's."""
    place = f"{type(scorer).__module__}:{type(scorer).__qualname__}"
    return next((name for name, target in SCORERS.items() if target == place), type(scorer).__name__)


def _check_inputs(inputs: Any) -> None:
    if not isinstance(inputs, Sequence) or isinstance(inputs, str) or not inputs:
        raise invalid("inputs", "be a list of at least one batch", inputs)
    for number, batch in enumerate(inputs):
        check_mapping(f"inputs[{number}]", batch)


def _check_finite(found: Mapping[str, Tensor], scorer: str) -> None:
    for name, row in found.items():
        if not bool(torch.isfinite(torch.as_tensor(row)).all()):
            raise InvalidInputError(f"scorer {scorer}: the scores of site {name} are not finite: {row.tolist()}")


def _supervise(
    model: Any,
    made: Sequence[Mapping[str, Tensor]],
    labels: Sequence[int] | Sequence[float],
    texts: Sequence[Text] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int,
) -> Supervision:
    """Lay the labels beside the batches. Raises `InvalidInputError` unless there is one valid label for each text."""
    sizes = [len(next(iter(batch.values()))) for batch in made]
    task = Task("calibration", [""] * sum(sizes) if texts is None else list(texts), list(labels))
    dtype = torch.float32 if task.is_regression else torch.int64
    rows = torch.tensor(task.labels, dtype=dtype, device=model.device).split(sizes)
    own = None if texts is None else tokenizer
    return Supervision(model, rows, task, own, min(length, longest(model, length)))


def _selecting(
    sites: Mapping[str, AttentionSite], pruning_ratio: float, allocation: Allocation, floor: int
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Return what selects among means `[heads]` of the sites: the verdict on every head that is there."""
    empty = {name: torch.zeros(0) for name in sites}

    def verdicts(means: Mapping[str, Tensor]) -> Tensor:
        mask = select(PresentScores.of({**empty, **means}, sites), pruning_ratio, allocation, floor)
        return torch.cat(list(mask.values()))

    return verdicts
