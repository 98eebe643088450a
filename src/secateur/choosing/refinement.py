"""A mask, improved on a task's own texts without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from secateur.choosing.mask_loss import MaskLoss
from secateur.choosing.search import Trial, search
from secateur.errors import invalid
from secateur.models.state import evaluation_mode, held
from secateur.pruners.tokens import special_ids_of
from secateur.scorers.base import ScoringTask
from secateur.scorers.matching import heads_that_match
from secateur.settings import Reading, settings_of
from secateur.support.checks import check_whole
from secateur.support.interrupts import interruptible
from secateur.texts.calibration import PreparedModel, is_pair, listed_examples
from secateur.texts.examples import Example, are_rows
from secateur.texts.halving import in_batches_that_fit
from secateur.texts.sources import ReadyInputs
from secateur.texts.tokenization import Text
from secateur.units.masks import Mask, PresentMask, check_mask
from secateur.units.select import Allocation, check_selection


@interruptible
def refine_mask(
    model: nn.Module | PreparedModel,
    mask: Mask,
    texts: Sequence[Text] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    inputs: Sequence[Mapping[str, Tensor]] | None = None,
    steps: int = 100,
    allocation: Allocation = "uniform",
    floor: int = 1,
    reading: Reading | None = None,
) -> tuple[Mask, list[float]]:
    """Improve a mask on a task's own texts: exchange heads and keep what lowers the relational KL to the dense model.

    No labels. The gradient on the gates says which exchange to try next, and each of the `steps` costs a gated pass
    over the texts; each gradient, one at the start and one after each exchange that helped, takes about as long as
    three. Models without gradients (weights fetched layer by layer, some quantised ones) have their exchanges drawn.
    With allocation "uniform" every site keeps as many heads as in `mask`; with "ranking" the model does, and every site
    at least `floor`. Heads that match words between the two texts of pairs stay where `mask` keeps them, which takes a
    pass with attention maps: the loss hardly needs them, and fine-tuning does (docs/matching.md). `inputs` are ready
    batches of keyword arguments instead of texts, whose tensors have a row for each example. Returns the best mask
    found, never worse than `mask` on these texts, and the losses of all masks tried, `mask` first: fewer than `steps`
    where none is left to try. The model is left as it was.

    Raises `InvalidInputError` for fewer than three texts a batch, steps below 0, and a mask that does not fit.
    """
    check_whole("steps", steps, 0)
    check_selection(0, allocation, floor)
    reading, examples = settings_of(reading, Reading), listed_examples(texts, inputs)
    check_mask(mask)
    prepared = PreparedModel.of(model, tokenizer, reading)
    for name, site in prepared.sites.items():
        if name not in mask:
            raise invalid("mask", f"have {site.original_num_units} entries for site {name}", mask.shape)
    start = mask.present(prepared.sites)
    run = partial(_trials, prepared, start, examples, steps, allocation, floor)
    trials = in_batches_that_fit(run, reading)
    best = min(trials, key=lambda trial: trial[1])[0]
    return PresentMask({**start, **best}).original(prepared.sites), [loss for _, loss in trials]


def _trials(
    prepared: PreparedModel,
    start: PresentMask,
    examples: Sequence[Example],
    steps: int,
    allocation: Allocation,
    floor: int,
    reading: Reading,
) -> list[Trial]:
    """Return the masks that a search from `start` tries, over the sites that have heads left."""
    base, sites = prepared.base, prepared.sites
    with held(base), evaluation_mode(base), torch.inference_mode(False):
        made = list(prepared.batches(examples, reading.batch_size))
        source = ReadyInputs(prepared, made, is_pair(examples))
        special_ids = special_ids_of(prepared.text_config if are_rows(examples) else prepared.tokenizer)
        task = ScoringTask(base, sites, source, reading, special_ids=special_ids)
        return search(
            MaskLoss(base, made, source.is_pair, reading.accelerator),
            PresentMask({name: row for name, row in start.items() if len(row)}),
            {name: site.num_groups for name, site in sites.items() if site.num_units},
            steps,
            torch.Generator().manual_seed(reading.seed),
            allocation,
            floor,
            reading.progress,
            heads_that_match(task) if steps else None,
        )
