"""secateur: remove the attention heads that a task does not need, prove the result, reload it with `from_pretrained`.

Importing this package is cheap. As soon as transformers is there too, every `from_pretrained` can rebuild models that
were pruned; models without a `head_pruning` entry in their config are not touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from secateur.support.versions import __version__ as __version__

if TYPE_CHECKING:
    from secateur.choosing.budget import select_within_budget as select_within_budget
    from secateur.choosing.refinement import refine_mask as refine_mask
    from secateur.errors import CheckpointError as CheckpointError
    from secateur.errors import InvalidInputError as InvalidInputError
    from secateur.errors import RemovalError as RemovalError
    from secateur.errors import SecateurError as SecateurError
    from secateur.errors import UnsupportedModelError as UnsupportedModelError
    from secateur.meta_training.paper import train_meta_pruner as train_meta_pruner
    from secateur.meta_training.trials import train_joint_pruner as train_joint_pruner
    from secateur.pruners.joint_network import JointPruner as JointPruner
    from secateur.pruners.map_network import MetaPruner as MetaPruner
    from secateur.pruning import PruningReport as PruningReport
    from secateur.pruning import prune as prune
    from secateur.removal.remove import gated_heads as gated_heads
    from secateur.removal.remove import remove_heads_ as remove_heads_
    from secateur.restoring.distillation import distill_ as distill_
    from secateur.restoring.reconstruction import reconstruct_ as reconstruct_
    from secateur.scorers.base import Scorer as Scorer
    from secateur.scorers.score import score_heads as score_heads
    from secateur.sites.attention import find_sites as find_sites
    from secateur.units.select import select_heads as select_heads
    from secateur.units.values import HeadMask as HeadMask
    from secateur.units.values import HeadScores as HeadScores


# Public name → the module that defines it, imported at first use: `secateur --help` must not wait for torch.
_WHERE = {
    "CheckpointError": "secateur.errors",
    "HeadMask": "secateur.units.values",
    "HeadScores": "secateur.units.values",
    "InvalidInputError": "secateur.errors",
    "JointPruner": "secateur.pruners.joint_network",
    "MetaPruner": "secateur.pruners.map_network",
    "PruningReport": "secateur.pruning",
    "RemovalError": "secateur.errors",
    "Scorer": "secateur.scorers.base",
    "SecateurError": "secateur.errors",
    "UnsupportedModelError": "secateur.errors",
    "distill_": "secateur.restoring.distillation",
    "find_sites": "secateur.sites.attention",
    "gated_heads": "secateur.removal.remove",
    "prune": "secateur.pruning",
    "reconstruct_": "secateur.restoring.reconstruction",
    "refine_mask": "secateur.choosing.refinement",
    "remove_heads_": "secateur.removal.remove",
    "score_heads": "secateur.scorers.score",
    "select_heads": "secateur.units.select",
    "select_within_budget": "secateur.choosing.budget",
    "train_joint_pruner": "secateur.meta_training.trials",
    "train_meta_pruner": "secateur.meta_training.paper",
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
    from secateur.removal.checkpoint import install

    install()
