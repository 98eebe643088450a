"""secateur: remove what of a Transformer a task does not need, prove the result, reload it with `from_pretrained`.

Importing this package is cheap. As soon as transformers is there too, every `from_pretrained` can rebuild models that
were pruned; models without a `head_pruning` entry in their config are not touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from secateur.support.versions import __version__ as __version__

if TYPE_CHECKING:
    from secateur.choosing.budget import allocate as allocate
    from secateur.choosing.refinement import refine_mask as refine_mask
    from secateur.errors import CheckpointError as CheckpointError
    from secateur.errors import InvalidInputError as InvalidInputError
    from secateur.errors import RemovalError as RemovalError
    from secateur.errors import SecateurError as SecateurError
    from secateur.errors import UnsupportedModelError as UnsupportedModelError
    from secateur.meta_training.joint_training import train_joint_pruner as train_joint_pruner
    from secateur.meta_training.paper import train_meta_pruner as train_meta_pruner
    from secateur.previewing import Preview as Preview
    from secateur.previewing import preview as preview
    from secateur.pruners.joint_network import JointPruner as JointPruner
    from secateur.pruners.map_network import MetaPruner as MetaPruner
    from secateur.pruning import prune as prune
    from secateur.pruning_report import PruningReport as PruningReport
    from secateur.removal.remove import gated as gated
    from secateur.removal.remove import remove_ as remove_
    from secateur.restoring.distillation import distill_ as distill_
    from secateur.restoring.reconstruction import reconstruct_ as reconstruct_
    from secateur.scorers.base import Scorer as Scorer
    from secateur.scorers.score import score as score
    from secateur.settings import Cut as Cut
    from secateur.settings import Reading as Reading
    from secateur.sites.attention import find_sites as find_sites
    from secateur.sites.finding import find_units as find_units
    from secateur.units.masks import Mask as Mask
    from secateur.units.scores import Scores as Scores
    from secateur.units.select import select as select

# Public name → the module that defines it, imported at first use: `secateur --help` must not wait for torch.
_WHERE = {
    "CheckpointError": "secateur.errors",
    "Cut": "secateur.settings",
    "InvalidInputError": "secateur.errors",
    "JointPruner": "secateur.pruners.joint_network",
    "Mask": "secateur.units.masks",
    "MetaPruner": "secateur.pruners.map_network",
    "Preview": "secateur.previewing",
    "PruningReport": "secateur.pruning_report",
    "Reading": "secateur.settings",
    "RemovalError": "secateur.errors",
    "Scorer": "secateur.scorers.base",
    "Scores": "secateur.units.scores",
    "SecateurError": "secateur.errors",
    "UnsupportedModelError": "secateur.errors",
    "allocate": "secateur.choosing.budget",
    "distill_": "secateur.restoring.distillation",
    "find_sites": "secateur.sites.attention",
    "find_units": "secateur.sites.finding",
    "gated": "secateur.removal.remove",
    "preview": "secateur.previewing",
    "prune": "secateur.pruning",
    "reconstruct_": "secateur.restoring.reconstruction",
    "refine_mask": "secateur.choosing.refinement",
    "remove_": "secateur.removal.remove",
    "score": "secateur.scorers.score",
    "select": "secateur.units.select",
    "train_joint_pruner": "secateur.meta_training.joint_training",
    "train_meta_pruner": "secateur.meta_training.paper",
}
__all__ = sorted(_WHERE)

# Reached as `secateur.errors.WriteError`; without this it works only once something else has imported them.
_MODULES = ("errors", "settings")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"secateur.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE, *_MODULES})


@wrapt.when_imported("transformers.modeling_utils")
def _reload_pruned_models(module: Any) -> None:
    from secateur.removal.checkpoint import install

    install()
