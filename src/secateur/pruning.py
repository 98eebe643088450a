"""The whole path in two functions: `score_heads`, and `prune`, which also selects, removes and proves."""

from __future__ import annotations

import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from secateur.attention_maps import MAX_TEXTS, AttentionMaps, mean_maps
from secateur.budget import Budget, BudgetedSelection, BudgetOutcome
from secateur.checks import check_accelerator, check_flag, check_mapping, check_seed, check_whole
from secateur.data import StreamedBatches, Task, Text, check_texts
from secateur.errors import InvalidInputError, invalid
from secateur.files import write_text
from secateur.halving import halves_batches
from secateur.heads import HeadMask, HeadScores
from secateur.meta.search import MaskLoss, search
from secateur.model.cost import ModelCost, max_length, measure_cost
from secateur.model.finite import check_pass
from secateur.model.inputs import ForwardArguments, forward_arguments
from secateur.model.layout import AttentionSite
from secateur.model.loading import check_device, load_model, load_tokenizer
from secateur.model.offload import check_loaded, device_of
from secateur.model.proof import TOLERANCE
from secateur.model.removal import remove_heads_
from secateur.model.sites import find_sites
from secateur.model.state import base_of, evaluation_mode, held
from secateur.processes import is_shared
from secateur.scorers import DEFAULT_SCORER, make_scorer
from secateur.scorers.base import Batch, Scorer, ScoringTask, StreamingScorer, Supervision
from secateur.selection import Scope, check_pruning_ratio, select_heads
from secateur.sentence import transformer_of
from secateur.stopping import AGREEMENT, Settling, Stop, check_stop
from secateur.streams import BatchStream

_PROBE_TEXTS = 8


@dataclass(frozen=True)
class PruningReport:
    """What a pruning did and what it cost: plain values, ready for JSON.

    `pruning_ratio` is the fraction of the heads present before that went; `before` and `after` count heads, parameters
    and multiply-accumulates; `num_texts` were scored, and where scoring stopped by itself, `agreement` is the share of
    heads of which it is 95% sure; `budget` is what was asked for and reached where there was one, for which
    `requested_ratio` was found; `max_difference` is the proof's (float32, at most `tolerance`). `refinement` holds
    the relational KL of every mask that was tried to improve the one that the scores gave, which comes first; `mask` is
    the best of them. `command` is the command line that asked for it, where one did. `attention_maps` are those of the
    model before, where they were asked for; they have a file of their own.
    """

    model: str
    scorer: str
    scope: str
    requested_ratio: float
    seed: int
    num_texts: int
    mask: HeadMask
    scores: HeadScores
    before: ModelCost
    after: ModelCost
    max_difference: float
    scoring_seconds: float
    agreement: float | None = None
    budget: BudgetOutcome | None = None
    refinement: tuple[float, ...] = ()
    tolerance: float = TOLERANCE
    versions: dict[str, str] = field(default_factory=lambda: environment())
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
            "scope": self.scope,
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
            "scores": self.scores.to_json()["scores"],
            "kept_heads": self.mask.kept_heads,
            "versions": self.versions,
            "created": self.created,
            "command": self.command,
        }

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(path, json.dumps(self.to_json(), indent=1))


@halves_batches
def score_heads(
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
    scope: Scope = "site",
    min_heads: int = 1,
    stop: Stop = "all",
    accelerator: Accelerator | None = None,
    progress: bool = False,
    **options: Any,
) -> HeadScores:
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
        batch_size: texts a batch; halved, with a `SecateurWarning`, while a batch does not fit into memory.
        max_length: tokens a text, at most.
        seed: for scorers that draw random numbers.
        pruning_ratio: what the scores will be selected with, for scorers that learn a subset of that size (`dsp`), and
            for `stop="auto"`.
        scope, min_heads: what the scores will be selected with, for `stop="auto"`.
        stop: "all" scores every text, a number that many, drawn with the seed; "auto" reads the texts in random order
            and stops when the heads to keep have settled (see `secateur.stopping.Settling`), which takes a scorer that
            streams: a mean over texts from one dense pass. Texts that are no sequence must come in random order for it.
            The scores say how many texts were scored.
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
    check_flag("progress", progress)
    check_accelerator(accelerator)
    if labels is not None and (isinstance(labels, str) or not isinstance(labels, Sequence)):
        raise invalid("labels", "be a list with a number for each text", labels)
    if inputs is not None:
        _check_inputs(inputs)
    # A wrong ratio or scope must not cost a scoring pass: this dry run checks them.
    select_heads(HeadScores({"check": torch.zeros(1)}), pruning_ratio, scope, min_heads)
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
    listed, stream = _listed(texts, streams and inputs is None and labels is None), None
    with held(base), evaluation_mode(model), _not_inference(), torch.enable_grad():
        made: Sequence[Mapping[str, Tensor]] = []
        if inputs is not None:
            made = [dict(batch) for batch in inputs]
        elif listed is not None:
            tokenizer = _own_tokenizer(given) if tokenizer is None else tokenizer
            order = reading_order(listed, stop, seed)
            if labels is not None and len(labels) == len(listed):
                labels = [labels[i] for i in order]
            listed = [listed[i] for i in order]
            made = _streamed(model, listed, tokenizer, batch_size, max_length)
        elif texts is not None:
            tokenizer = _own_tokenizer(given) if tokenizer is None else tokenizer
            first = itertools.islice(texts, stop if isinstance(stop, int) else None)
            stream = _one_by_one(model, first, tokenizer, batch_size, max_length)
        elif criterion.needs_texts:
            raise InvalidInputError(f"scorer {criterion_name(criterion)} needs `texts`")
        arguments: Sequence[Batch] = ForwardArguments(base, made)
        if not streams:  # others read them more than once
            made, arguments = list(made), list(arguments)
        sample = stream.first if stream is not None else listed
        is_pair = sample is not None and len(sample) > 0 and not isinstance(sample[0], str)
        sites = find_sites(model)
        special_ids = _special_ids(base.config.get_text_config() if tokenizer is None else tokenizer)
        taught = None
        if criterion.needs_labels:
            if labels is None:
                raise InvalidInputError(f"scorer {criterion_name(criterion)} needs `labels`, one for each text")
            taught = _supervise(model, made, labels, listed if inputs is None else None, tokenizer, max_length)
        settling = None
        if stop == "auto":
            selecting = _selecting(sites, pruning_ratio, scope, min_heads)
            settling = Settling(selecting, math.inf if listed is None else len(listed), seed, accelerator)
        task = ScoringTask(
            base, sites, arguments, is_pair, seed, progress, special_ids, taught, pruning_ratio, settling, accelerator,
            stream,
        )  # fmt: skip
        found = criterion.score(task)
        if not all(bool(torch.isfinite(torch.as_tensor(row)).all()) for row in found.values()):
            for batch in arguments:
                check_pass(base, partial(base, **batch))
    scores = _in_original_numbering(found, sites, criterion_name(criterion))
    if settling is not None:
        # A stream that ended before was read whole, which nobody could know at the last look.
        agreement = settling.agreement if settling.agreement >= AGREEMENT else 1.0
        return replace(scores, num_texts=settling.seen, agreement=agreement)
    if stream is not None:
        return replace(scores, num_texts=stream.seen)
    return scores if listed is None or inputs is not None else replace(scores, num_texts=len(listed))


def _check_inputs(inputs: Any) -> None:
    if not isinstance(inputs, Sequence) or isinstance(inputs, str) or not inputs:
        raise invalid("inputs", "be a list of at least one batch", inputs)
    for number, batch in enumerate(inputs):
        check_mapping(f"inputs[{number}]", batch)


def reading_order(texts: Sequence[Text], stop: Stop, seed: int) -> list[int]:
    """Return which texts are scored, in which order: as given, or at random where they may not all be read."""
    check_texts(texts)
    if stop == "all":
        return list(range(len(texts)))
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    return order if stop == "auto" else order[:stop]


@torch.inference_mode(False)  # a copy that is made in it could not be trained
def prune(
    model: str | Path | nn.Module,
    texts: Iterable[Text] | None = None,
    pruning_ratio: float = 0.5,
    *,
    budget: str | Budget | None = None,
    scorer: str | Scorer = DEFAULT_SCORER,
    scope: Scope = "site",
    min_heads: int = 1,
    stop: Stop = "all",
    refine: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    labels: Sequence[int] | Sequence[float] | None = None,
    batch_size: int = 32,
    max_length: int = 128,
    seed: int = 0,
    device: str | None = None,
    maps: bool = False,
    accelerator: Accelerator | None = None,
    progress: bool = False,
    **options: Any,
) -> tuple[Any, PruningReport]:
    """Score, select, remove and prove; return the smaller model and a report.

    `model` is a folder, a Hub id, or a loaded model, which stays whole: a copy is pruned and returned. A
    SentenceTransformer is returned as one, with the transformer in it pruned and its other modules as they were.
    `budget` says how much of the model may remain, such as "macs=0.85" or "latency=0.8x@8x128" (see
    `secateur.budget.Budget.parse`); the smallest pruning ratio within it takes the place of `pruning_ratio`.
    `refine` is the number of exchanges that `refine_mask` tries on the scored texts. `maps` keeps the mean
    attention maps of the first few texts in the report; it takes a pass over them. The other arguments are those of
    `score_heads` and `select_heads`. The proof runs on the first few of the texts.
    """
    check_whole("refine", refine, 0)
    check_flag("maps", maps)
    check_pruning_ratio(pruning_ratio)
    if device is not None:
        check_device(device)
    check_accelerator(accelerator)
    wanted = budget if budget is None or isinstance(budget, Budget) else Budget.parse(budget)
    if isinstance(model, str | Path):
        name = str(model)
        tokenizer = load_tokenizer(model) if tokenizer is None and texts is not None else tokenizer
        smaller = pruned = load_model(model, device)
    else:
        inner = transformer_of(model)
        base_of(inner)
        name = str(getattr(inner, "name_or_path", "") or type(inner).__name__)
        if tokenizer is None and texts is not None:
            tokenizer = _own_tokenizer(model)
        smaller = copy.deepcopy(model)
        pruned = transformer_of(smaller)
    check_loaded(pruned, "pruning")
    before = measure_cost(pruned)
    if refine and not isinstance(texts, Sequence):
        raise InvalidInputError("`refine` needs `texts` to judge masks by, in a list, as it reads them again and again")
    if refine and scope == "global" and wanted is not None and wanted.quantity != "heads":
        raise invalid("refine", f"be 0 at scope 'global' with the budget {wanted}, which exchanges may exceed", refine)
    if wanted is not None and wanted.quantity == "latency" and is_shared(accelerator):
        raise invalid("budget", "be of another kind under a launcher, whose processes would time each other", wanted)
    within = None if wanted is None else BudgetedSelection(pruned, wanted, scope, min_heads, progress)
    if within is not None:
        pruning_ratio = within.expected_ratio
    first: Sequence[Text] | None = None
    if texts is not None and not isinstance(texts, Sequence) and isinstance(texts, Iterable):
        left = iter(texts)
        first = list(itertools.islice(left, MAX_TEXTS))
        texts = itertools.chain(first, left)
    start = time.perf_counter()
    scores = score_heads(
        pruned,
        texts,
        scorer,
        tokenizer,
        labels=labels,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        pruning_ratio=pruning_ratio,
        scope=scope,
        min_heads=min_heads,
        stop=stop,
        accelerator=accelerator,
        progress=progress,
        **options,
    )
    seconds = time.perf_counter() - start
    if within is None:
        mask = select_heads(scores, pruning_ratio, scope, min_heads)
    else:
        mask, pruning_ratio = within.select(scores)
    refinement: list[float] = []
    if isinstance(texts, Sequence):
        first = [texts[i] for i in reading_order(texts, stop, seed)[: scores.num_texts]]
    if refine and first is not None:
        mask, refinement = refine_mask(
            pruned, mask, first, tokenizer, steps=refine, scope=scope, min_heads=min_heads, batch_size=batch_size,
            max_length=max_length, seed=seed, accelerator=accelerator, progress=progress,
        )  # fmt: skip
    attention = None
    if maps and first is not None and tokenizer is not None:
        made = _tokenise(pruned, first[:MAX_TEXTS], tokenizer, MAX_TEXTS, max_length)
        attention = mean_maps(pruned, find_sites(pruned), forward_arguments(base_of(pruned), made)[0])
    inputs = None
    if first is not None and tokenizer is not None:
        made = _tokenise(pruned, first[:_PROBE_TEXTS], tokenizer, _PROBE_TEXTS, max_length)
        inputs = forward_arguments(base_of(pruned), made)[0]
    record = {"scorer": scores.scorer, "scope": scope, "base_model": name, "secateur_version": version("secateur")}
    removal = remove_heads_(pruned, mask, inputs=inputs, record=record)
    report = PruningReport(
        model=name,
        scorer=scores.scorer,
        scope=scope,
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
        attention_maps=attention,
    )
    return smaller, report


@halves_batches
def refine_mask(
    model: nn.Module,
    mask: HeadMask,
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    steps: int = 100,
    scope: Scope = "site",
    min_heads: int = 1,
    batch_size: int = 32,
    max_length: int = 128,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> tuple[HeadMask, list[float]]:
    """Improve a mask on a task's own texts: exchange heads and keep what lowers the relational KL to the dense model.

    No labels and no gradients; each of the `steps` costs a gated pass over the texts. At scope "site" every site keeps
    as many heads as in `mask`; at scope "global" the model does, and every site at least `min_heads`. Returns the best
    mask found, never worse than `mask` on these texts, and the losses of all masks tried, `mask` first. The model is
    left as it was.

    Raises `InvalidInputError` for fewer than two texts, steps below 0, and a mask that does not fit the model.
    """
    check_whole("steps", steps, 0)
    check_whole("batch_size", batch_size)
    check_whole("max_length", max_length, 4)
    check_seed(seed)
    check_flag("progress", progress)
    check_accelerator(accelerator)
    if not isinstance(mask, HeadMask):
        raise invalid("mask", "be a HeadMask", mask)
    select_heads(HeadScores({"check": torch.zeros(1)}), 0, scope, min_heads)  # checks them
    check_texts(texts)
    tokenizer = _own_tokenizer(model) if tokenizer is None else tokenizer
    base, sites = base_of(model), find_sites(model)
    there = {name: list(site.heads) for name, site in sites.items() if site.num_heads}
    for name, heads in there.items():
        if name not in mask or mask[name].numel() != sites[name].original_num_heads:
            raise invalid("mask", f"have {sites[name].original_num_heads} entries for site {name}", mask.shape)
        if bool(mask[name].sum() > mask[name][heads].sum()):
            raise invalid("mask", f"keep no head of site {name} that is gone already", mask[name].nonzero().flatten())
    with held(base), evaluation_mode(base), _not_inference():
        made = forward_arguments(base, _tokenise(model, texts, tokenizer, batch_size, max_length))
        loss = MaskLoss(base, made, not isinstance(texts[0], str), accelerator)
        trials = search(
            loss,
            HeadMask({name: mask[name][heads] for name, heads in there.items()}),
            {name: sites[name].num_key_value_heads for name in there},
            steps,
            torch.Generator().manual_seed(seed),
            scope,
            min_heads,
            progress,
        )
    best = min(trials, key=lambda trial: trial[1])[0]
    rows = {name: row.clone() for name, row in mask.items()}
    for name, heads in there.items():
        rows[name][heads] = best[name]
    return HeadMask(rows), [value for _, value in trials]


def criterion_name(scorer: Scorer) -> str:
    """Return the registered name of a scorer, or its class's."""
    from secateur.scorers import SCORERS

    place = f"{type(scorer).__module__}:{type(scorer).__qualname__}"
    return next((name for name, target in SCORERS.items() if target == place), type(scorer).__name__)


def environment() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {package: version(package) for package in ("secateur", "torch", "transformers")}


def _in_original_numbering(found: Mapping[str, Tensor], sites: Mapping[str, AttentionSite], scorer: str) -> HeadScores:
    values, interactions = {}, {}
    for name, site in sites.items():
        count, heads = site.original_num_heads, torch.tensor(site.heads, dtype=torch.int64)
        vector = torch.full((count,), -math.inf, dtype=torch.float64)
        row = torch.as_tensor(found[name], dtype=torch.float64).detach().cpu()
        if not bool(torch.isfinite(row).all()):
            raise InvalidInputError(f"scorer {scorer}: the scores of site {name} are not finite: {row.tolist()}")
        if row.ndim == 2:
            interactions[name] = torch.zeros(count, count, dtype=torch.float64)
            interactions[name][heads[:, None], heads] = row
            row = row.diagonal()
        vector[heads] = row
        values[name] = vector
    kv_heads = {name: site.original_num_key_value_heads for name, site in sites.items()}
    return HeadScores(values, kv_heads, scorer, interactions)


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
    return Supervision(model, rows, task, own, min(length, max_length(model, length)))


def _streamed(
    model: nn.Module, texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, batch_size: int, length: int
) -> StreamedBatches:
    device = device_of(base_of(model))
    return StreamedBatches(tokenizer, texts, batch_size, min(length, max_length(model, length)), device)


def _one_by_one(
    model: nn.Module, texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase, batch_size: int, length: int
) -> BatchStream:
    base = base_of(model)
    tokens = min(length, max_length(model, length))
    return BatchStream(tokenizer, texts, batch_size, tokens, device_of(base), ForwardArguments(base, []).of)


def _listed(texts: Iterable[Text] | None, may_come_one_by_one: bool) -> Sequence[Text] | None:
    """Return the texts where they are a sequence, or must become one; None where there are none or they may not."""
    if texts is None or isinstance(texts, Sequence):
        return texts
    if not isinstance(texts, Iterable):
        raise invalid("texts", "be strings or pairs of strings, in a list or one after the other", texts)
    return None if may_come_one_by_one else list(texts)


def _tokenise(*arguments: Any) -> list[dict[str, Tensor]]:
    return list(_streamed(*arguments))


def _selecting(
    sites: Mapping[str, AttentionSite], pruning_ratio: float, scope: Scope, min_heads: int
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Return what selects among means `[heads]` of the sites: the verdict on every head that is there."""
    empty = {name: torch.zeros(0) for name in sites}

    def select(means: Mapping[str, Tensor]) -> Tensor:
        mask = select_heads(_in_original_numbering({**empty, **means}, sites, ""), pruning_ratio, scope, min_heads)
        return torch.cat([mask[name][list(site.heads)] for name, site in sites.items()])

    return select


def _special_ids(source: Any) -> frozenset[int]:
    """Return the ids of the tokens that stand for no word, as a tokenizer or a config names them."""
    found: set[Any] = set()
    for kind in ("bos", "eos", "cls", "sep", "pad"):
        value = getattr(source, f"{kind}_token_id", None)
        found.update(value if isinstance(value, list | tuple) else [value])
    return frozenset(found - {None})


def _own_tokenizer(model: nn.Module) -> PreTrainedTokenizerBase:
    inner = transformer_of(model)
    if inner is not model and isinstance(found := getattr(model, "tokenizer", None), PreTrainedTokenizerBase):
        return found
    name = getattr(inner, "name_or_path", "")
    if not name:
        raise InvalidInputError("`tokenizer` must be given for a model that was not loaded by name")
    return load_tokenizer(name)


@contextmanager
def _not_inference() -> Iterator[None]:
    """Let scorers that need gradients work although the caller is inside `torch.inference_mode`."""
    with torch.inference_mode(False):
        yield
