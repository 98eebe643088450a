"""What removed units wrote, given to those that stay: output projections refitted by least squares, without labels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.choosing.mask_loss import MaskLoss
from secateur.errors import InvalidInputError, invalid
from secateur.models.offload import check_loaded
from secateur.models.state import check_plain_weights, evaluation_mode, held, without_autocast
from secateur.relations import RELATED
from secateur.settings import Reading, settings_of
from secateur.sites.layout import NOBODY, Site
from secateur.support.processes import in_order
from secateur.texts.calibration import PreparedModel, is_pair, listed_texts
from secateur.texts.halving import in_batches_that_fit
from secateur.texts.tokenization import Text
from secateur.units.masks import Mask, PresentMask, check_mask

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths of the ridge that are tried, in units of the mean second moment of what the projection is given."""


def reconstruct_(
    model: nn.Module | PreparedModel,
    mask: Mask,
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    reading: Reading | None = None,
) -> tuple[float, float]:
    """Prepare `model`, in place, for losing the units that `mask` drops: those that stay write what they can of it.

    At every site that loses some of its units, the rows of the output projection W that belong to the units kept are
    changed so that what these write is as near as possible to what all of them wrote, in one pass of the dense model
    over the texts. With G = Xᵀ X, X `[tokens, units · width]` being what the projection is given, and K and R the
    columns of units that stay and go, W_K becomes W_K + (G_KK + ridge)⁻¹ G_KR W_R: ridge regression towards the weights
    that were there (least-squares reconstruction after pruning: He et al. 2017, arXiv 1707.06168). The ridge of each
    site is the one, among five, with which the fit on one half of the texts errs least on the other; where none errs
    less than the weights that were there, these stay. Hundreds of texts do most good. No labels.

    The model still has all its units then, and is of use without those that go alone: `remove_` with the same mask
    takes them, and proves that it changed nothing else. Returns the relational KL on these texts without reconstruction
    and with it, each half of the texts by the fit on the other. Where that is no lower, or something fails, the weights
    are what they were; else they are those fitted on all texts.

    Raises `InvalidInputError` for a mask that does not fit, fewer than six texts or three a batch, and a site that
    loses units and that texts do not reach, and `UnsupportedModelError` for quantised weights.
    """
    reading, texts = settings_of(reading, Reading), listed_texts(texts)
    prepared = PreparedModel.of(model, tokenizer, reading)
    check_loaded(prepared.base, "reconstruction")
    check_plain_weights(prepared.base)
    check_mask(mask)
    kept = mask.present(prepared.sites_named(mask))
    if len(texts) < 2 * RELATED:
        raise invalid("texts", f"be at least {2 * RELATED}, {RELATED} for each half that judges the other", len(texts))
    return in_batches_that_fit(partial(_reconstruct_, prepared, kept, texts), reading)


def _reconstruct_(
    prepared: PreparedModel, kept: PresentMask, texts: Sequence[Text], reading: Reading
) -> tuple[float, float]:
    base = prepared.base
    projections = {
        name: _Projection(base, site, kept[name])
        for name, site in prepared.sites_named(kept).items()
        if kept[name].any() and not kept[name].all() and site.slices_of("output")
    }
    # Every other batch belongs to the same half of the texts: as many to each.
    count = 2 * math.ceil(len(texts) / (2 * reading.batch_size))
    size = math.ceil(len(texts) / count)
    with held(base), evaluation_mode(base), torch.inference_mode(False), torch.no_grad():
        batches = list(prepared.batches(texts, size))
        evaluators = [MaskLoss(base, batches[half::2], is_pair(texts), reading.accelerator) for half in (0, 1)]
        # The evaluators look at the dense model here, before its weights change.
        before = statistics.fmean(loss(kept) for loss in evaluators)
        moments = _second_moments(base, projections, batches, reading)
        weights = {name: one.weight.data for name, one in projections.items()}
        refits = {name: one.refits(moments.pop(name)) for name, one in projections.items()}

        def set_weights(number: int) -> None:
            for name, one in projections.items():
                one.weight.data = refits[name][number]

        is_lower = False
        try:
            crossed = []
            for fitted, other in ((0, 1), (1, 0)):
                set_weights(fitted)
                crossed.append(evaluators[other](kept))
            after = statistics.fmean(crossed)
            is_lower = after < before
            set_weights(2)
        finally:
            if not is_lower:
                for name, one in projections.items():
                    one.weight.data = weights[name]
    return before, after if is_lower else before


class _Projection:
    """A site's output projection, and which of the numbers that it is given come from units that stay."""

    def __init__(self, base: PreTrainedModel, site: Site, kept: Tensor) -> None:
        piece = next(p for p in site.slices_of("output") if base.get_parameter(p.parameter).ndim == 2)
        self.module, self.weight = base.get_submodule(site.output), base.get_parameter(piece.parameter)
        self.axis = piece.axis
        self.kept = torch.tensor([owner == NOBODY or bool(kept[owner]) for owner in piece.owners])

    def refits(self, halves: Tensor) -> list[Tensor]:
        """Return the weight refitted to the second moments of each half of the texts, and of all of them."""
        weight = self.weight.detach().to("cpu", torch.float64)
        rows = weight if self.axis == 0 else weight.T  # [inputs, model width]
        gram = halves.double()
        one, other, both = parts = [_Moments(part, self.kept, rows) for part in (*gram, gram.sum(dim=0))]
        unit = float(gram.sum(dim=0).diagonal().mean())

        def error(ridge: float) -> float:
            return other.error(one.change(ridge * unit)) + one.error(other.change(ridge * unit))

        errors = {ridge: error(ridge) for ridge in RIDGES if unit > 0}
        best = min(errors, key=errors.__getitem__, default=0.0)
        if not errors or errors[best] >= both.lost:
            return [self.weight.data] * len(parts)
        return [self._changed(rows, part.change(best * unit)) for part in parts]

    def _changed(self, rows: Tensor, change: Tensor) -> Tensor:
        rows = rows.clone()
        rows[self.kept] += change
        return (rows if self.axis == 0 else rows.T).contiguous().to(self.weight)


class _Moments:
    """Second moments `[inputs, inputs]` of some texts, and what they say of changing the kept units' rows."""

    def __init__(self, gram: Tensor, kept: Tensor, rows: Tensor) -> None:
        gone = rows[~kept]
        self.among, self.across = gram[kept][:, kept], gram[kept][:, ~kept] @ gone
        # The squared difference to what all units wrote, summed over tokens, where nothing changes.
        self.lost = float((gone * (gram[~kept][:, ~kept] @ gone)).sum())

    def change(self, ridge: float) -> Tensor:
        """Return the change with which the kept units write what the others wrote, as nearly as the ridge lets."""
        loaded = self.among + ridge * torch.eye(len(self.among), dtype=self.among.dtype)
        return torch.cholesky_solve(self.across, torch.linalg.cholesky(loaded))

    def error(self, change: Tensor) -> float:
        """Return what is left of the squared difference with a change."""
        return self.lost + float((change * (self.among @ change - 2 * self.across)).sum())


def _second_moments(
    base: PreTrainedModel,
    projections: Mapping[str, _Projection],
    batches: Sequence[Mapping[str, Any]],
    reading: Reading,
) -> dict[str, Tensor]:
    """Return second moments of what each projection is given, by half of the texts: `[2, inputs, inputs]`, on the CPU.

    The dense model runs once over all batches, of which every other one belongs to the same half.
    """

    def read(number: int) -> dict[str, Tensor]:
        with _reading(projections, batches[number]) as found:
            base(**batches[number])
        return found

    moments: dict[str, Tensor] = {}
    numbers = tqdm(range(len(batches)), desc="reconstructing", disable=not reading.progress, leave=False)
    for number, found in zip(numbers, in_order(read, range(len(batches)), reading.accelerator), strict=True):
        for name, one in found.items():
            moments.setdefault(name, torch.zeros(2, *one.shape))[number % 2] += one
    for name in projections:
        if name not in moments:
            raise InvalidInputError(f"`texts` do not reach the site {name!r}, which loses units; leave it whole")
    return moments


@contextmanager
def _reading(projections: Mapping[str, _Projection], batch: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Within this context passes add up the second moments of what each projection is given, in what is yielded."""
    found: dict[str, Tensor] = {}
    mask = batch.get("attention_mask")

    def read(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).detach().float()
        rows = inputs.flatten(0, -2)
        if mask is not None and mask.shape == inputs.shape[:-1]:
            rows = inputs[mask.bool().to(inputs.device)]  # without padding
        with without_autocast(inputs.device):
            moments = (rows.T @ rows).cpu()
        found[name] = found[name] + moments if name in found else moments

    def hook(name: str) -> Any:
        return lambda module, args, kwargs: read(name, args, kwargs)

    hooks = [one.module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, one in projections.items()]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()
