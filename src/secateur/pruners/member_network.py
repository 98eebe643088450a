"""One network of the joint pruner: a set attention over all heads of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.pruners.features import FEATURES

PAIR_FEATURES = 4
"""What the attention knows of a pair of heads: same site, likeness, squared likeness, difference in depth."""


class MemberNetwork(nn.Module):
    """One set attention over all heads: adds to the log of a head's contribution what it makes of the evidence.

    The contribution's share of its site and the site's level are scaled apart.
    """

    def __init__(self, width: int, layers: int, attention_heads: int, joint: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(len(FEATURES), width)
        self.blocks = nn.ModuleList(_Block(width, attention_heads, joint) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.size_scale = nn.Parameter(torch.ones(()))
        self.level_scale = nn.Parameter(torch.ones(()))

    def forward(self, seen: Tensor, pair_features: Tensor, sizes: Tensor, levels: Tensor) -> Tensor:
        """Return scores `[models, heads]` for standardised evidence `[models, heads, features]`."""
        x = self.embed(seen)
        for block in self.blocks:
            x = block(x, pair_features)
        return self.size_scale * sizes + self.level_scale * levels + self.head(self.norm(x)).squeeze(-1)


class _Block(nn.Module):
    """Attention over all heads with a bias made of what is known of each pair, then a feed-forward network."""

    def __init__(self, width: int, heads: int, joint: bool) -> None:
        super().__init__()
        self.heads, self.joint = heads, joint
        if joint:
            self.norm = nn.LayerNorm(width)
            self.query_key_value = nn.Linear(width, 3 * width)
            self.bias = nn.Parameter(torch.zeros(heads, PAIR_FEATURES))
            self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, pair_features: Tensor) -> Tensor:
        """Take and return `[models, heads, width]`; `pair_features` `[models, PAIR_FEATURES, heads, heads]`."""
        if self.joint:
            parts = self.query_key_value(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            bias = torch.einsum("hr,brij->bhij", self.bias, pair_features)
            mixed = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=bias)
            x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)
