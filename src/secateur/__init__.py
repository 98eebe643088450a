"""secateur: remove the attention heads that a task does not need, prove the result, reload it with `from_pretrained`.

Importing this package is cheap. As soon as transformers is there too, every `from_pretrained` can rebuild models that
were pruned; models without a `head_pruning` entry in their config are not touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from secateur.budget import select_within_budget as select_within_budget
    from secateur.distillation import distill_ as distill_
    from secateur.errors import CheckpointError as CheckpointError
    from secateur.errors import InvalidInputError as InvalidInputError
    from secateur.errors import RemovalError as RemovalError
    from secateur.errors import SecateurError as SecateurError
    from secateur.errors import UnsupportedModelError as UnsupportedModelError
    from secateur.heads import HeadMask as HeadMask
    from secateur.heads import HeadScores as HeadScores
    from secateur.meta.joint import JointPruner as JointPruner
    from secateur.meta.joint_runs import train_joint_pruner as train_joint_pruner
    from secateur.meta.network import MetaPruner as MetaPruner
    from secateur.meta.training import train_meta_pruner as train_meta_pruner
    from secateur.model.removal import gated_heads as gated_heads
    from secateur.model.removal import remove_heads_ as remove_heads_
    from secateur.model.sites import find_sites as find_sites
    from secateur.pruning import PruningReport as PruningReport
    from secateur.pruning import prune as prune
    from secateur.reconstruction import reconstruct_ as reconstruct_
    from secateur.refinement import refine_mask as refine_mask
    from secateur.scorers.base import Scorer as Scorer
    from secateur.scoring import score_heads as score_heads
    from secateur.selection import select_heads as select_heads

__version__ = "0.1.0"

# Public name → the module that defines it, imported at first use: `secateur --help` must not wait for torch.
_WHERE = {
    "CheckpointError": "secateur.errors",
    "HeadMask": "secateur.heads",
    "HeadScores": "secateur.heads",
    "InvalidInputError": "secateur.errors",
    "JointPruner": "secateur.meta.joint",
    "MetaPruner": "secateur.meta.network",
    "PruningReport": "secateur.pruning",
    "RemovalError": "secateur.errors",
    "Scorer": "secateur.scorers.base",
    "SecateurError": "secateur.errors",
    "UnsupportedModelError": "secateur.errors",
    "distill_": "secateur.distillation",
    "find_sites": "secateur.model.sites",
    "gated_heads": "secateur.model.removal",
    "prune": "secateur.pruning",
    "reconstruct_": "secateur.reconstruction",
    "refine_mask": "secateur.refinement",
    "remove_heads_": "secateur.model.removal",
    "score_heads": "secateur.scoring",
    "select_heads": "secateur.selection",
    "select_within_budget": "secateur.budget",
    "train_joint_pruner": "secateur.meta.joint_runs",
    "train_meta_pruner": "secateur.meta.training",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_WHERE]


@wrapt.when_imported("transformers.modeling_utils")
def _reload_pruned_models(module: Any) -> None:
    from secateur.model.checkpoint import install

    install()
