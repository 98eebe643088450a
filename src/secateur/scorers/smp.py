"""The paper's criterion: a network, meta-trained once, that looks at attention maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.models.hub_access import answers
from secateur.models.offload import device_of
from secateur.pruners.map_network import MetaPruner
from secateur.scorers.base import ScoringTask, StreamingScorer
from secateur.sites.gating import HeadReading
from secateur.support.parsing import short
from secateur.texts.batches import Batch

Network = TypeVar("Network", bound=Any)

SHIPPED = Path(__file__).parents[1] / "assets" / "smp-minilm"
"""The meta-pruner that ships with secateur; its card, README.md, says how it was trained."""


class SmpScorer(StreamingScorer):
    """Mean over texts of the meta-pruner's score of a head's attention map.

    `pruner` is a `MetaPruner`, a folder or Hub id that `MetaPruner.from_pretrained` reads, or a `.bin` file of the
    paper's authors; by default the one that ships with secateur, meta-trained on all-MiniLM-L6-v2.
    """

    description = "meta-pruner: a small network, trained over several tasks, that reads attention maps"
    source = "Zhang et al. 2021 (arXiv 2011.03770)"
    weights = True

    def __init__(self, pruner: MetaPruner | str | Path | None = None) -> None:
        self.pruner = load_pruner(pruner)

    def score(self, task: ScoringTask) -> dict[str, Tensor]:
        """Move the network to the model's device, then stream the batches."""
        self.pruner.to(device_of(task.model)).eval()
        return super().score(task)

    def read(self, reading: HeadReading, batch: Batch, task: ScoringTask) -> Tensor:
        """Score each head's map with the channel of the task's kind."""
        assert reading.weights is not None  # this class asks for them
        mask = batch.get("attention_mask")
        # Layers of a model that is spread over devices compute their maps on several.
        weights = reading.weights.float().to(device_of(task.model))
        return self.pruner.score_maps(weights, mask, task.is_pair)


def load_pruner(pruner: MetaPruner | str | Path | None) -> MetaPruner:
    """Return the meta-pruner meant by a network, a folder, a Hub id, or the authors' file; None is the shipped one."""
    if (
        not isinstance(pruner, MetaPruner)
        and pruner is not None
        and (Path(pruner).suffix == ".bin" or Path(pruner).is_file())
    ):
        return MetaPruner.from_authors_checkpoint(pruner)
    return read_pruner(MetaPruner, SHIPPED if pruner is None else pruner)


def read_pruner(kind: type[Network], pruner: Network | str | Path) -> Network:
    """Return a network of that kind as it is, or from a folder or Hub id. Raises `CheckpointError` for others."""
    if isinstance(pruner, kind):
        return pruner
    try:
        with torch.random.fork_rng([]):  # a network draws weights before it reads them
            return kind.from_pretrained(str(pruner), local_files_only=Path(pruner).exists() or not answers())
    except Exception as error:  # safetensors and the Hub's mixin fail with types of their own
        raise CheckpointError(f"{pruner} cannot be loaded as a {kind.__name__}: {short(error)}") from None
