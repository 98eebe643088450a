"""What removed units wrote, given to those that stay: output projections refitted by least squares, without labels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.choosing.mask_loss import MaskLoss
from secateur.choosing.moments import Fit, Projection, moments_of
from secateur.choosing.prefix import Prefix
from secateur.errors import InvalidInputError, invalid
from secateur.models.offload import check_reachable
from secateur.models.state import check_plain_weights, evaluation_mode, held
from secateur.relations import RELATED
from secateur.settings import Reading, settings_of
from secateur.sites.layout import Site
from secateur.support.files import temporary_folder
from secateur.texts.calibration import PreparedModel, is_pair, listed_examples
from secateur.texts.examples import Example, source_of
from secateur.texts.halving import in_batches_that_fit
from secateur.texts.tokenization import Text
from secateur.units.masks import Mask, PresentMask, check_mask

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths of the ridge that are tried, in units of the mean second moment of what the projection is given."""

FEWEST = 2 * RELATED
"""Texts that it takes at least: each half judges the other."""


def reconstruct_(
    model: nn.Module | PreparedModel,
    mask: Mask,
    texts: Sequence[Text] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    inputs: Sequence[Mapping[str, Tensor]] | None = None,
    reading: Reading | None = None,
) -> tuple[float, float]:
    """Prepare `model`, in place, for losing the units that `mask` drops: those that stay write what they can of it.

    At every site that loses units, the rows of the output projection W that belong to the units kept, and its bias
    where it has one, are changed so that what is written is as near as possible to what all units wrote, in the dense
    model: ridge regression towards the weights that were there (see `Fit`; least-squares reconstruction after pruning:
    He et al. 2017, arXiv 1707.06168). The ridge of each site is the one, among five, with which the fit on one half of
    the texts errs least on the other; where none errs less than the weights that were there, these stay. Hundreds of
    texts do most good. No labels. Each site takes a pass through its layer. In memory are the second moments of one
    site; what was fitted waits in temporary files.

    The model still has all its units then, and is of use without those that go alone: `remove_` with the same mask
    takes them, and proves that it changed nothing else. `inputs` are ready batches of keyword arguments instead of
    texts, whose tensors have a row for each example. Returns the relational KL on these texts without reconstruction
    and with it, each half of the texts by the fit on the other. Where that is no lower, or something fails, the weights
    are what they were; else they are those fitted on all texts.

    Raises `InvalidInputError` for a mask that does not fit, fewer than six texts or three a batch, and a site that
    loses units and that texts do not reach, and `UnsupportedModelError` for quantised weights.
    """
    reading, examples = settings_of(reading, Reading), listed_examples(texts, inputs)
    prepared = PreparedModel.of(model, tokenizer, reading)
    check_reachable(prepared.base)
    check_plain_weights(prepared.base)
    check_mask(mask)
    kept = mask.present(prepared.sites_named(mask))
    if len(examples) < FEWEST:
        rule = f"be at least {FEWEST}, {RELATED} for each half that judges the other"
        raise invalid(source_of(examples), rule, len(examples))
    return in_batches_that_fit(partial(_reconstruct_, prepared, kept, examples), reading)


def _reconstruct_(
    prepared: PreparedModel, kept: PresentMask, examples: Sequence[Example], reading: Reading
) -> tuple[float, float]:
    base = prepared.base
    sites = {name: site for name, site in prepared.sites_named(kept).items() if site.slices_of("output")}
    # Every other batch belongs to the same half of the texts: as many to each.
    count = 2 * math.ceil(len(examples) / (2 * reading.batch_size))
    size = math.ceil(len(examples) / count)
    with (
        temporary_folder() as folder, held(base), evaluation_mode(base),
        torch.inference_mode(False), torch.no_grad(),
    ):  # fmt: skip
        batches = list(prepared.batches(examples, size))
        evaluators = [MaskLoss(base, batches[half::2], is_pair(examples), reading.accelerator) for half in (0, 1)]
        # The evaluators look at the dense model here, before its weights change.
        before = statistics.fmean(loss(kept) for loss in evaluators)
        refits: list[Refit] = []
        prefix = Prefix(base, batches, prepared.lists)
        for name in tqdm(sites, desc="reconstructing", disable=not reading.progress, leave=False):
            if not kept[name].all():
                file = folder / f"{len(refits)}.pt"
                refits.append(Refit.of(base, sites[name], kept[name], prefix, reading, file))

        crossed = []
        for fitted, other in ((0, 1), (1, 0)):
            with ExitStack() as stack:
                for refit in refits:
                    stack.enter_context(refit.meanwhile(fitted))
                crossed.append(evaluators[other](kept))
        after = statistics.fmean(crossed)
        is_lower = after < before
        if is_lower:
            with ExitStack() as undone:
                for refit in refits:
                    undone.callback(refit.take())
                undone.pop_all()
    return before, after if is_lower else before


class Refit:
    """A site's projection, and a file of its weights: refitted to each half of the texts, to all, and as they were.

    None where no refit is any better. The file is read when the projection runs, so that of all sites one is in memory
    twice at a time.
    """

    def __init__(self, projection: Projection, file: Path | None) -> None:
        self.projection, self.file = projection, file

    @classmethod
    def of(
        cls,
        base: PreTrainedModel,
        site: Site,
        kept: Tensor,
        prefix: Prefix,
        reading: Reading,
        file: Path,
    ) -> Refit:
        """Refit a site to the units in `kept` (bool `[units]`), and write the weights to `file`.

        Raises `InvalidInputError` where the batches of `prefix` do not reach it.
        """
        projection = Projection(base, site)
        stays = projection.stays(kept)
        gone, halves = projection.rows(~stays), list[Fit]()
        for number in (0, 1):
            moments = moments_of(base, projection, prefix, reading, range(number, len(prefix.batches), 2))
            if moments is None:
                raise InvalidInputError(
                    f"`texts` do not reach the site {site.name!r}, which loses units; leave it whole"
                )
            halves.append(Fit(moments, stays, gone, projection.has_bias))
            del moments  # before those of the other half are there
        one, other = halves

        def error(ridge: float) -> float:
            return other.error(one.change(ridge)) + one.error(other.change(ridge))

        errors = {ridge: error(ridge) for ridge in RIDGES if one.unit + other.unit > 0}
        best = min(errors, key=errors.__getitem__, default=0.0)
        if not errors or errors[best] >= one.lost + other.lost:
            return cls(projection, None)
        found = [projection.refitted(half, stays, best) for half in halves]
        one += other
        torch.save([*found, projection.refitted(one, stays, best), projection.values], file)
        return cls(projection, file)

    @contextmanager
    def meanwhile(self, number: int) -> Iterator[None]:
        """Within this context the projection runs with what was fitted to a half of the texts, 0 or 1."""
        if self.file is None:
            yield
            return
        undo: list[Callable[[], None]] = []

        def put_back(*_: object) -> None:
            while undo:
                undo.pop()()

        module = self.projection.module
        handles = [
            module.register_forward_pre_hook(lambda *_: undo.append(self._put(number))),
            module.register_forward_hook(put_back),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            put_back()

    def take(self) -> Callable[[], None]:
        """Put the weights in place that were fitted to all texts. Return what puts those back that were there.

        They are in the file alone then, or where they were fetched from.
        """
        if self.file is None:
            return lambda: None
        undo = self._put(2)

        def read_back() -> None:
            self._put(3)

        return undo if self.projection.is_fetched else read_back

    def _put(self, number: int) -> Callable[[], None]:
        assert self.file is not None
        weight, bias = torch.load(self.file, mmap=True, map_location="cpu")[number]
        if not self.projection.is_fetched:  # else they stay in the file, which is there for as long as they are
            weight, bias = (None if t is None else t.to(self.projection.device, copy=True) for t in (weight, bias))
        return self.projection.set_(weight, bias)
