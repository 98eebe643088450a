"""The meta-pruner's network: from one attention map to the importance of the head that made it (paper, head scores)."""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from secateur.errors import CheckpointError, invalid
from secateur.pruners.corners import SIZE, score_corners
from secateur.support.checks import check_path, check_positive
from secateur.support.parsing import short

PAIR, SINGLE = 0, 1
"""Output channels: sentence-pair tasks, single-sentence tasks."""


class MetaPruner(nn.Module, PyTorchModelHubMixin, library_name="secateur", license="apache-2.0"):
    """Six convolutions without bias that score attention heads by their maps; about 178,000 weights.

    Channels 1→8→16→32→64→128→2, kernel 4; the first five halve the map (stride 2, padding 1), the last reduces 4×4 to
    1. LeakyReLU(0.2) follows the first five, BatchNorm comes before it from the second to the fifth. Twice a sigmoid
    gives scores in (0, 2), higher = keep. Weights start at N(0, 0.01), BatchNorm gains at N(1, 0.01);
    `initial_std` replaces the first of these numbers.

    `from_pretrained`, `save_pretrained` and `push_to_hub` use safetensors and a config.json.
    """

    def __init__(self, initial_std: float = 0.01) -> None:
        super().__init__()
        check_positive("initial_std", initial_std)
        widths = [1, 8, 16, 32, 64, 128]
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(itertools.pairwise(widths)):
            layers.append(nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1, bias=False))
            if number:
                layers.append(nn.BatchNorm2d(after))
            layers.append(nn.LeakyReLU(0.2))
        layers += [nn.Conv2d(widths[-1], 2, kernel_size=4, bias=False), nn.Sigmoid()]
        self.main = nn.Sequential(*layers)
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, initial_std)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.01)

    def forward(self, maps: Tensor) -> Tensor:
        """Score `[maps, 128, 128]` and return `[maps, 2]` in (0, 2): column 0 for pairs, column 1 for singles."""
        if not isinstance(maps, Tensor) or maps.ndim != 3 or maps.shape[1:] != (SIZE, SIZE):
            raise invalid(
                "maps", f"have the shape [maps, {SIZE}, {SIZE}]", getattr(maps, "shape", maps), "see `to_network_size`"
            )
        # Channels last makes these convolutions about twice as fast on a CPU; the values are the same.
        images = maps.unsqueeze(1).to(memory_format=torch.channels_last)
        return 2 * self.main(images).flatten(1)

    def score_maps(self, weights: Tensor, mask: Tensor | None, is_pair: bool) -> Tensor:
        """Score every head of one site: maps `[batch, heads, tokens, tokens]` → `[batch, heads]` in (0, 2)."""
        maps = without_padding(weights, mask)
        (scores,) = score_corners(self.main, [maps.flatten(0, 1)])
        return scores[:, PAIR if is_pair else SINGLE].view(maps.shape[:2])

    @classmethod
    def _from_pretrained(cls, **options: Any) -> MetaPruner:
        # The mixin lets weights that a file lacks be drawn at random, and prints where it reads from; standard output
        # belongs to results.
        with contextlib.redirect_stdout(io.StringIO()):
            return super()._from_pretrained(**{**options, "strict": True})

    @classmethod
    def from_authors_checkpoint(cls, path: str | Path) -> MetaPruner:
        """Read a checkpoint that the paper's authors released (github thunlp/SMP).

        The file is a pickled state dict; it is read with torch's restricted loader, which runs no code from it. Raises
        `CheckpointError` where it is absent, damaged, or of another architecture.
        """
        path = check_path("path", path)
        if not path.is_file():
            raise CheckpointError(f"there is no meta-pruner checkpoint {path}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it cannot read is refused
                state: Any = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can fail with any type
            raise CheckpointError(f"{path} cannot be read as a meta-pruner checkpoint: {short(error)}") from None
        pruner = cls()
        expected = {name: tensor.shape for name, tensor in pruner.state_dict().items()}
        found = {k: v.shape for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
        # Checkpoints written by PyTorch before 0.4.1 do not count batches.
        differing = [n for n, s in expected.items() if found.get(n) != s and not n.endswith("num_batches_tracked")]
        if differing or set(found) - set(expected):
            raise CheckpointError(
                f"{path} is no meta-pruner of this architecture, see {(differing or sorted(found))[0]}"
            )
        pruner.load_state_dict(state, strict=False)
        return pruner.eval()


def to_network_size(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Bring maps of any length to 128×128, whatever the padding around them.

    Up to 128 tokens, a map lies in the upper left corner and the rest is 0, as in the paper. The arguments are those of
    `without_padding`. Returns `[batch, heads, 128, 128]`; the same text with other padding gives the same map.
    """
    return _padded(without_padding(weights, mask))


def without_padding(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Bring maps of any length to at most 128 rows and columns, without those of padding tokens.

    Args:
        weights: attention maps `[batch, heads, queries, keys]`.
        mask: `[batch, tokens]`, 1 = a real token, or None where all are. Where it fits an axis, the rows or columns of
            padding tokens are taken out.

    Beyond 128 tokens, the queries of equal stretches are averaged and their keys summed, so that a row still sums to 1.
    Returns `[batch, heads, rows, columns]`, as large as the largest map needs, with zeros behind smaller ones.
    """
    if not isinstance(weights, Tensor) or weights.ndim != 4:
        raise invalid("weights", "have the shape [batch, heads, queries, keys]", getattr(weights, "shape", weights))
    if mask is not None and not isinstance(mask, Tensor):
        raise invalid("mask", "be None or have the shape [batch, tokens]", mask)
    if mask is None or not bool((mask == 0).any()):
        return _pooled(weights)
    real = mask.bool()
    if max(weights.shape[2:]) <= SIZE and bool((real[:, :-1] >= real[:, 1:]).all()):
        return _cut_on_the_right(weights, real)
    texts = []
    for number in range(len(weights)):
        one = weights[number : number + 1]
        if one.shape[2] == real.shape[1]:
            one = one[:, :, real[number]]
        if one.shape[3] == real.shape[1]:
            one = one[..., real[number]]
        texts.append(_pooled(one))
    rows, columns = (max(text.shape[axis] for text in texts) for axis in (2, 3))
    return torch.cat([_padded(text, rows, columns) for text in texts])


def _cut_on_the_right(weights: Tensor, real: Tensor) -> Tensor:
    """Do what `without_padding` does with short maps of texts whose padding comes last, all texts at once."""
    most = int(real.sum(dim=1).max())
    queries, keys = (length == real.shape[1] for length in weights.shape[2:])
    real = real[:, None, :most]
    if queries:
        weights = weights[:, :, :most].masked_fill(~real[..., None], 0)
    return weights[..., :most].masked_fill(~real[:, :, None], 0) if keys else weights


def _pooled(maps: Tensor) -> Tensor:
    """Pool maps without padding to at most 128 rows and columns."""
    rows, columns = maps.shape[2:]
    if rows <= SIZE and columns <= SIZE:
        return maps
    mean, total = _stretches(rows, maps), _stretches(columns, maps)
    return mean / mean.sum(dim=1, keepdim=True) @ maps @ total.T


def _stretches(length: int, like: Tensor) -> Tensor:
    """Return how much of each token lies in each of at most 128 equal stretches of a text, `[stretches, tokens]`."""
    count = min(length, SIZE)
    edges = torch.arange(count + 1, dtype=torch.float64) * length / count
    tokens = torch.arange(length, dtype=torch.float64)
    shared = torch.minimum(edges[1:, None], tokens + 1) - torch.maximum(edges[:-1, None], tokens)
    return shared.clamp(min=0).to(like)


def _padded(maps: Tensor, rows: int = SIZE, columns: int = SIZE) -> Tensor:
    return nn.functional.pad(maps, (0, columns - maps.shape[-1], 0, rows - maps.shape[-2]))
