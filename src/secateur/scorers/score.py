"""Every unit's score: texts, or ready batches, through one criterion."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from secateur.errors import InvalidInputError, invalid
from secateur.models.finite import check_pass
from secateur.models.offload import check_loaded
from secateur.models.state import bfloat16_passes, evaluation_mode, held
from secateur.pruners.tokens import special_ids_of
from secateur.scorers import DEFAULT_SCORER, DEFAULT_SCORERS, LAYER_SCORERS, SCORERS, make_scorer, option_names
from secateur.scorers.base import Scorer, ScoringTask, StreamingScorer, Supervision
from secateur.settings import Cut, Reading, settings_of
from secateur.sites.finding import check_units
from secateur.sites.layout import Site
from secateur.support.checks import nearest
from secateur.support.interrupts import interruptible
from secateur.texts.calibration import PreparedModel, is_pair, texts_of
from secateur.texts.data import Task
from secateur.texts.examples import are_rows
from secateur.texts.halving import in_batches_that_fit, smaller_batches
from secateur.texts.sources import ListedTexts, ReadyInputs, Source, StreamedTexts, by_length, reading_order
from secateur.texts.stopping import AGREEMENT, Settling
from secateur.texts.tokenization import Text
from secateur.units.scores import PresentScores, Scores
from secateur.units.select import select

Labels = Sequence[int] | Sequence[float]
AnyScorer = str | Scorer | Mapping[str, str | Scorer]
"""A criterion, or one for each kind of unit."""


@interruptible
def score(
    model: nn.Module | PreparedModel,
    texts: Iterable[Text] | None = None,
    scorer: AnyScorer = DEFAULT_SCORER,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    units: Collection[str] = ("heads",),
    labels: Labels | None = None,
    inputs: Sequence[Mapping[str, Tensor]] | None = None,
    cut: Cut | None = None,
    reading: Reading | None = None,
    **options: Any,
) -> Scores:
    """Score every unit of these kinds of `model`, which is left as it was.

    Args:
        model: a transformers model, or a SentenceTransformer; of a task model, the base model is scored.
        texts: calibration texts, unlabelled: strings, or pairs of strings. Not needed by every scorer. What is no
            sequence, such as a generator, is read in its own order, by scorers that stream one batch at a time, so that
            memory does not grow with their number.
        scorer: a registered name, with `options` for its constructor, or a `Scorer`: the criterion of the kinds of
            units that it can score, the others take their default; or one for each kind, `{"heads": …, "neurons": …}`.
        units: the kinds of units that are scored, each by itself: "heads", "neurons", "layers".
        tokenizer: of the model; looked up by the model's name where absent.
        labels: one for each text, for scorers that need them: classes from 0 up, or floats for a regression. Such
            scorers look at the loss of `model` where it has a classification head, and of a fine-tuned copy elsewhere.
        inputs: ready batches of keyword arguments instead of texts, for models that read something else.
        cut: what the scores will be selected with, for scorers that learn a subset of that size (`dsp`), and for
            `stop="auto"`.
        reading: how the texts are read (see `Reading`). Where a scorer reads each text by itself, texts of like length
            share a batch, which saves padding. `stop="auto"` (see `Settling`) takes a scorer that streams, a mean over
            texts from one dense pass, and of texts that are no sequence that they come in random order; of these a
            number for `stop` takes the first ones. The scores say how many texts were read.

    Raises `InvalidInputError` for bad arguments, missing texts or labels, and non-finite scores,
    `UnsupportedModelError` where heads cannot be told apart.
    """
    cut, reading = settings_of(cut, Cut), settings_of(reading, Reading)
    prepared = PreparedModel.of(model, tokenizer, reading)
    criteria = criteria_of(scorer, units, options)
    labels = None if labels is None else _plain_numbers(labels)
    texts = _listed_unless_streamed(texts_of(texts), criteria, labels, inputs)
    for criterion in criteria.values():
        _check_possible(criterion, prepared, texts, inputs, reading)
    cannot_repeat = ""
    if inputs is not None:
        cannot_repeat = "a batch of `inputs` does not fit into memory; make smaller ones"
    elif texts is not None and not isinstance(texts, Sequence) and reading.batch_size > 1:
        cannot_repeat = smaller_batches(reading.batch_size)
    found = []
    for kind, criterion in criteria.items():
        run = partial(_score, prepared, criterion, kind, texts, labels, inputs, cut)
        found.append(in_batches_that_fit(run, reading, cannot_repeat))
    return found[0] if len(found) == 1 else _joined(dict(zip(criteria, found, strict=True)))


def _joined(found: Mapping[str, Scores]) -> Scores:
    """Return scores of several kinds of units as one."""
    first = next(iter(found.values()))
    return Scores(
        {site: row for scores in found.values() for site, row in scores.items()},
        {site: count for scores in found.values() for site, count in scores.num_groups.items()},
        ",".join(f"{kind}={scores.scorer}" for kind, scores in found.items()),
        {site: matrix for scores in found.values() for site, matrix in scores.interactions.items()},
        {site: kind for scores in found.values() for site, kind in scores.kinds.items()},
        first.num_texts,
    )


def _score(
    prepared: PreparedModel,
    criterion: Scorer,
    kind: str,
    texts: Iterable[Text] | None,
    labels: Labels | None,
    inputs: Sequence[Mapping[str, Tensor]] | None,
    cut: Cut,
    reading: Reading,
) -> Scores:
    base, name = prepared.base, name_of(criterion)
    sites = prepared.sites_of([kind])
    with held(base), evaluation_mode(prepared.model), torch.inference_mode(False), torch.enable_grad():
        source: Source | None = None
        if inputs is not None:
            paired = isinstance(texts, Sequence) and is_pair(texts)
            source, texts = ReadyInputs(prepared, inputs, paired), None
        elif isinstance(texts, Sequence):
            texts, labels = _in_reading_order(texts, labels, criterion, reading)
            source = ListedTexts(prepared, texts, reading.batch_size)
        elif texts is not None:
            most = reading.stop if isinstance(reading.stop, int) else None
            source = StreamedTexts(prepared, itertools.islice(texts, most), reading.batch_size)
        reads_texts = isinstance(texts, Iterable) and not are_rows(texts)
        special_ids = special_ids_of(
            prepared.tokenizer if reads_texts or prepared.knows_tokenizer else prepared.text_config
        )
        task = ScoringTask(prepared.base, sites, source, reading, cut, special_ids)
        if criterion.needs_labels:
            task = replace(task, supervision=_supervision(prepared, task, labels, texts, name))
        if reading.stop == "auto" and source is not None:
            verdicts = _verdicts(task.sites, cut)
            task = replace(task, settling=Settling(verdicts, source.total, reading.seed, reading.accelerator))
        with bfloat16_passes(base, reading.bf16):
            found = criterion.score(task)
        _check_finite(found, task, name)
    scores = PresentScores.of(found, task.sites, name).original(task.sites)
    return replace(scores, **_what_was_read(task))


def criteria_of(scorer: AnyScorer, units: Collection[str], options: Mapping[str, Any]) -> dict[str, Scorer]:
    """Return the criterion of each kind of unit, in the order heads, neurons, layers.

    Raises `InvalidInputError` for a criterion that scores none of the kinds, and for options that are not one's alone.
    """
    check_units(units)
    check_options(options, score, scorer)
    named = scorer if isinstance(scorer, Mapping) else {}
    for kind in named:
        if kind not in units:
            raise invalid("scorer", f"name kinds among the `units` that are scored, {', '.join(units)}", kind)
    if named and options:
        raise InvalidInputError("`options` belong to one scorer; build the others with `make_scorer(name, …)`")
    chosen = {kind: scorer_of(one, {}) for kind, one in named.items()}
    if not named:
        single = scorer_of(scorer, options)  # type: ignore[arg-type]
        chosen = {kind: single for kind in units if kind in single.kinds}
        if not chosen and (options or not isinstance(scorer, str) or scorer != DEFAULT_SCORER):
            kinds = " and ".join(sorted(single.kinds))
            raise invalid("scorer", f"score {', '.join(units)}", name_of(single), f"{name_of(single)} scores {kinds}")
    for kind, one in chosen.items():
        if kind not in one.kinds:
            raise invalid("scorer", f"score {kind}", name_of(one))
    return {
        kind: chosen[kind] if kind in chosen else make_scorer(default)
        for kind, default in DEFAULT_SCORERS.items()
        if kind in units
    }


def check_options(options: Mapping[str, Any], call: Callable[..., Any], scorer: Any) -> None:
    """Raise `InvalidInputError` for what is no option of a scorer, but near a keyword of the `call`.

    The same goes for fields of a `Reading` or a `Cut`, and all that is near one.
    """
    meant_by = {name: f"`{name}`" for name in inspect.signature(call).parameters if name != "options"}
    for kind in (Reading, Cut):
        for one in fields(kind):
            meant_by.setdefault(one.name, f"{kind.__name__.lower()}=secateur.{kind.__name__}({one.name}=…)")
        if meant := sorted({one.name for one in fields(kind)} & set(options)):
            parameter = kind.__name__.lower()
            raise InvalidInputError(
                f"`{meant[0]}` belongs into `{parameter}`: {parameter}=secateur.{kind.__name__}({meant[0]}=…)"
            )
    own = option_names(scorer) if isinstance(scorer, str) else []
    for name in options:
        if name not in own and (near := nearest(name, [*own, *meant_by])):
            raise InvalidInputError(
                f"`{call.__name__}` has no `{name}`; did you mean {meant_by.get(near, f'`{near}`')}?"
            )


def scorer_of(scorer: str | Scorer, options: Mapping[str, Any]) -> Scorer:
    """Return a scorer as it is, or make the one registered under a name. Raises `TypeError` for anything else."""
    criterion = make_scorer(scorer, **options) if isinstance(scorer, str) else scorer
    if options and isinstance(scorer, Scorer):
        name = next(iter(options))
        raise InvalidInputError(f"`{name}` must belong to a scorer that is named; give it to `make_scorer` instead")
    if not isinstance(criterion, Scorer):
        raise TypeError(f"`scorer` must be a registered name or a Scorer, got {type(scorer).__name__}")
    return criterion


def name_of(scorer: Scorer) -> str:
    """Return the registered name of a scorer, or its class's."""
    place = f"{type(scorer).__module__}:{type(scorer).__qualname__}"
    return next((name for name, target in (SCORERS | LAYER_SCORERS).items() if target == place), type(scorer).__name__)


def _plain_numbers(labels: Any) -> Labels:
    """Return the labels of a list, an array or a column of a table as a list."""
    if isinstance(labels, str) or not (isinstance(labels, Sequence) or hasattr(labels, "__array__")):
        raise invalid("labels", "be a list with a number for each text", labels)
    try:
        return [x.item() if hasattr(x, "item") else x for x in labels]
    except (TypeError, ValueError):  # an array of no or two dimensions
        raise invalid("labels", "be a list with a number for each text", labels) from None


def _listed_unless_streamed(
    texts: Any, criteria: Mapping[str, Scorer], labels: Any, inputs: Any
) -> Iterable[Text] | None:
    """Return texts that come one by one as they are where a lone criterion can read them so, and else in a list."""
    if texts is None or isinstance(texts, Sequence):
        return texts
    one = len(criteria) == 1 and isinstance(next(iter(criteria.values())), StreamingScorer)
    streams = one and labels is None and inputs is None
    return texts if streams else list(texts)


def _check_possible(criterion: Scorer, prepared: PreparedModel, texts: Any, inputs: Any, reading: Reading) -> None:
    """Raise `InvalidInputError` for what this criterion cannot do, before anything is read."""
    name = name_of(criterion)
    if criterion.needs_gradients:
        check_loaded(prepared.base, f"scorer {name}, which back-propagates,")
    if reading.stop == "auto" and not isinstance(criterion, StreamingScorer):
        raise invalid("stop", f"be 'all' or a number with scorer {name}, which does not stream", reading.stop)
    if reading.stop != "all" and (inputs is not None or texts is None):
        raise invalid("stop", "be 'all' where there are no `texts` to choose from", reading.stop)
    if criterion.needs_texts and texts is None and inputs is None:
        raise InvalidInputError(f"scorer {name} needs `texts`")


def _in_reading_order(
    texts: Sequence[Text], labels: Labels | None, criterion: Scorer, reading: Reading
) -> tuple[Sequence[Text], Labels | None]:
    """Return the texts that are read, in their order, with their labels where the criterion looks at these."""
    order = reading_order(texts, reading)
    if criterion.needs_labels:
        if labels is not None and len(labels) != len(texts):
            raise invalid("labels", f"hold one label for each of the {len(texts)} texts", len(labels))
        return [texts[i] for i in order], None if labels is None else [labels[i] for i in order]
    chosen = [texts[i] for i in order]
    return (by_length(chosen) if criterion.texts_apart and reading.stop != "auto" else chosen), labels


def _supervision(
    prepared: PreparedModel, task: ScoringTask, labels: Labels | None, texts: Any, scorer: str
) -> Supervision:
    """Lay the labels beside the batches. Raises `InvalidInputError` unless there is one valid label for each text."""
    if labels is None:
        raise InvalidInputError(f"scorer {scorer} needs `labels`, one for each text")
    sizes = [len(next(iter(batch.values()))) for batch in task.batches]
    reads_texts = texts is not None and not are_rows(texts)
    labelled = Task("calibration", list(texts) if reads_texts else [""] * sum(sizes), list(labels))
    dtype = torch.float32 if labelled.is_regression else torch.int64
    rows = torch.tensor(labelled.labels, dtype=dtype, device=prepared.base.device).split(sizes)
    tokenizer = prepared.tokenizer if reads_texts else None
    return Supervision(prepared.model, rows, labelled, tokenizer, prepared.longest)


def _verdicts(sites: Mapping[str, Site], cut: Cut) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Return what selects among means `[units]` of the sites: the verdict on every unit that is there."""
    empty = {name: torch.zeros(0) for name in sites}

    def verdicts(means: Mapping[str, Tensor]) -> Tensor:
        scores = PresentScores.of({**empty, **means}, sites)
        mask = select(scores, cut.pruning_ratio, cut.ranked, cut.floor, cut.multiple)
        return torch.cat(list(mask.values()))

    return verdicts


def _check_finite(found: Mapping[str, Tensor], task: ScoringTask, scorer: str) -> None:
    """Raise `InvalidInputError` for scores that are not finite, naming the module of the model where that begins."""
    wrong = {name: row for name, row in found.items() if not bool(torch.isfinite(torch.as_tensor(row)).all())}
    if not wrong:
        return
    if not isinstance(task.source, StreamedTexts):
        for batch in task.batches:
            check_pass(task.model, partial(task.model, **batch))
    name, row = next(iter(wrong.items()))
    raise InvalidInputError(f"scorer {scorer}: the scores of site {name} are not finite: {row.tolist()}")


def _what_was_read(task: ScoringTask) -> dict[str, Any]:
    """Return how many texts the scores are of, and how sure they are where the reading stopped by itself."""
    if task.settling is not None:
        # A stream that ended before was read whole, which nobody could know at the last look.
        sure = task.settling.agreement >= AGREEMENT
        return {"num_texts": task.settling.seen, "agreement": task.settling.agreement if sure else 1.0}
    return {"num_texts": None if task.source is None else task.source.seen}
