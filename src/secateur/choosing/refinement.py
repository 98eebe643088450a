"""A mask, improved on a task's own texts without labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from secateur.choosing.mask_loss import MaskLoss
from secateur.choosing.search import search
from secateur.errors import invalid
from secateur.models.inputs import forward_arguments
from secateur.models.state import base_of, evaluation_mode, held
from secateur.pruners.tokens import special_ids_of
from secateur.scorers.base import ScoringTask
from secateur.scorers.matching import heads_that_match
from secateur.sites.attention import find_sites
from secateur.support.checks import check_accelerator, check_flag, check_seed, check_whole
from secateur.texts.calibration import calibration_batches, own_tokenizer, texts_of
from secateur.texts.data import Text, check_texts
from secateur.texts.halving import halves_batches
from secateur.units.masks import Mask, PresentMask
from secateur.units.select import Allocation, check_selection


@halves_batches
def refine_mask(
    model: nn.Module,
    mask: Mask,
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    steps: int = 100,
    allocation: Allocation = "uniform",
    floor: int = 1,
    batch_size: int = 32,
    max_length: int = 128,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> tuple[Mask, list[float]]:
    """Improve a mask on a task's own texts: exchange heads and keep what lowers the relational KL to the dense model.

    No labels. The gradient on the gates says which exchange to try next, and each of the `steps` costs a gated pass
    over the texts; each gradient, one at the start and one after each exchange that helped, takes about as long as
    three. Models without gradients (weights fetched layer by layer, some quantised ones) have their exchanges drawn. At
    allocation "uniform" every site keeps as many heads as in `mask`; with allocation "ranking" the model does, and every site at least
    `floor`. Heads that match words between the two texts of pairs stay where `mask` keeps them, which takes a pass
    with attention maps: the loss hardly needs them, and fine-tuning does (docs/matching.md). Returns the best mask
    found, never worse than `mask` on these texts, and the losses of all masks tried, `mask` first: fewer than `steps`
    where none is left to try. The model is left as it was.

    Raises `InvalidInputError` for fewer than three texts a batch, steps below 0, and a mask that does not fit.
    """
    check_whole("steps", steps, 0)
    check_whole("batch_size", batch_size)
    check_whole("max_length", max_length, 4)
    check_seed(seed)
    check_flag("progress", progress)
    check_accelerator(accelerator)
    if not isinstance(mask, Mask):
        raise invalid("mask", "be a Mask", mask)
    check_selection(allocation=allocation, floor=floor)
    texts = cast(Sequence[Text], texts_of(texts))
    check_texts(texts)
    tokenizer = own_tokenizer(model) if tokenizer is None else tokenizer
    base, sites = base_of(model), find_sites(model)
    for name, site in sites.items():
        if name not in mask:
            raise invalid("mask", f"have {site.original_num_units} entries for site {name}", mask.shape)
    kept = mask.present(sites)
    start = PresentMask({name: row for name, row in kept.items() if len(row)})
    with held(base), evaluation_mode(base), torch.inference_mode(False):
        made = forward_arguments(base, list(calibration_batches(model, texts, tokenizer, batch_size, max_length)))
        is_pair = not isinstance(texts[0], str)
        task = ScoringTask(base, sites, made, is_pair, special_ids=special_ids_of(tokenizer), accelerator=accelerator)
        loss = MaskLoss(base, made, is_pair, accelerator)
        trials = search(
            loss,
            start,
            {name: sites[name].num_groups for name in start},
            steps,
            torch.Generator().manual_seed(seed),
            allocation,
            floor,
            progress,
            heads_that_match(task) if steps else None,
        )
    best = min(trials, key=lambda trial: trial[1])[0]
    return PresentMask({**kept, **best}).original(sites), [value for _, value in trials]
