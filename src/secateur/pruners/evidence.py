"""What one dense pass tells about every head, in numbers that do not depend on the model's width.

Per head: how much it writes into the residual stream and how that differs between texts, in which direction compared
with its site's sum and with the text representations, how much of it the other heads of its site could say, what its
attention map looks like, and how deep it lies. Per pair of heads of a site: how alike their contributions are.

Everything is a sum over texts, or a comparison of texts with each other: neither padding nor the order or size of
batches changes it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from secateur.errors import invalid
from secateur.pruners.features import LEVEL, SIZE
from secateur.pruners.site_sums import BatchSums, SiteEvidence, SiteSums
from secateur.pruners.tokens import in_decoder
from secateur.pruners.writes import output_weights
from secateur.relations import by_first_token, represent
from secateur.sites.gating import HeadReading, probe
from secateur.sites.layout import AttentionSite
from secateur.support.processes import in_order
from secateur.texts.batches import Batch
from secateur.units.scores import PresentScores


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a dense pass over some texts tells about a model's heads.

    `features` `[heads, features]` over all sites in order, finite (see `features.py`); `likeness` `[heads, heads]`, the
    cosine of two heads' contributions over all tokens in [-1, 1], 0 between sites; `heads` maps each site to its number
    of heads. `matching` `[heads]` in [0, 1] is how much a head matches words between the two texts of a pair (the
    `matching` scorer's), None where that was not asked for. `fingerprints` `[heads, FINGERPRINT]` is no evidence of
    what a head does, but of which it is: see `fingerprints_of`; None where nobody is to know.
    """

    features: Tensor
    likeness: Tensor
    heads: dict[str, int]
    matching: Tensor | None = None
    fingerprints: Tensor | None = None

    @property
    def site_numbers(self) -> Tensor:
        """The number of each head's site, `[heads]`."""
        counts = torch.tensor(list(self.heads.values()))
        return torch.repeat_interleave(torch.arange(len(counts)), counts)

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Cut a vector over all heads, `[heads]`, into one for each site."""
        return dict(zip(self.heads, values.split(list(self.heads.values())), strict=True))

    def scores(self, values: Tensor, sites: Mapping[str, AttentionSite]) -> PresentScores:
        """Return a vector over all heads, `[heads]`, as the scores that `select` takes."""
        return PresentScores(self.split(values.double()), {name: sites[name].num_groups for name in self.heads})


@torch.no_grad()
def gather_evidence(
    model: PreTrainedModel,
    sites: Mapping[str, AttentionSite],
    batches: Iterable[Batch],
    is_pair: bool,
    accelerator: Accelerator | None = None,
    special_ids: frozenset[int] | None = None,
    maps: bool = True,
) -> Evidence:
    """Run `model` (a base model in evaluation mode) once over the batches and return the evidence.

    `special_ids` are the tokens that stand for no word; with None the matching is not gathered. Without `maps` their
    columns are 0, and attention maps are made for the matching of pairs alone.
    The processes of `accelerator`, if any, run a share of the batches each and all get the evidence. Raises
    `InvalidInputError` where there are fewer than four texts: relations between texts are part of it.
    """
    first_token = by_first_token(model, is_pair)
    unmatched = {name for name in sites if not is_pair or in_decoder(model, name)}
    sums = {name: SiteSums(output_weights(model, site)) for name, site in sites.items() if site.num_units}

    def run(batch: Batch) -> tuple[dict[str, list[BatchSums]], Tensor]:
        read: dict[str, list[BatchSums]] = defaultdict(list)

        def keep(reading: HeadReading) -> None:
            if reading.site in sums:  # an earlier pruning may have left a site without heads
                own_ids = None if reading.site in unmatched else special_ids
                read[reading.site].append(sums[reading.site].read(reading, batch, own_ids, maps))

        with probe(model, keep, weights=maps or (is_pair and special_ids is not None)):
            representation = represent(model, model(**batch), batch, first_token).float()
        return dict(read), representation.cpu()

    representations = []
    for read, representation in in_order(run, batches, accelerator):
        for name, calls in read.items():
            for call, of_batch in enumerate(calls):
                sums[name].add(of_batch, call)
        representations.append(representation)
    kernel = _kernel(representations)
    return _joined({name: site.evidence(kernel) for name, site in sums.items()}, is_pair, special_ids is not None)


def _kernel(representations: Sequence[Tensor]) -> Tensor:
    """Return the cosines of the texts' centred representations, `[texts, texts]`, for batches `[texts, width]`."""
    rows = torch.cat(list(representations)) if representations else torch.zeros(0, 1)
    if len(rows) < 4:
        raise invalid("texts", "be at least 4, as this scorer compares them with each other", len(rows))
    rows = torch.nn.functional.normalize(rows - rows.mean(dim=0), dim=1)
    return rows @ rows.T


def _joined(by_site: Mapping[str, SiteEvidence], is_pair: bool, is_matched: bool) -> Evidence:
    """Put the sites together, and add the features that say how a site stands beside the others and where it lies."""
    sites = list(by_site.values())
    levels = torch.stack([site.totals for site in sites])
    levels = levels - levels.mean(dim=0)
    features = []
    for number, site in enumerate(sites):
        heads = len(site.columns)
        place = [number / max(1, len(sites) - 1), 1 / len(sites), heads / 16, float(is_pair)]
        of_site = torch.tensor([*levels[number].tolist(), *place])
        features.append(torch.cat([site.columns, of_site.expand(heads, -1)], dim=1))
    return Evidence(
        features=torch.cat(features),
        likeness=torch.block_diag(*(site.likeness for site in sites)),
        heads={name: len(site.columns) for name, site in by_site.items()},
        matching=torch.cat([site.matching for site in sites]) if is_matched else None,
        fingerprints=torch.cat([site.fingerprints for site in sites]),
    )


def contribution_scores(evidence: Evidence) -> Tensor:
    """Return the log of every head's contribution norm, `[heads]`, less its mean over the model's sites."""
    return evidence.features[:, SIZE] + evidence.features[:, LEVEL]
