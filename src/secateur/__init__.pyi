"""What `import secateur` gives: each name is imported at its first use, from the module that is named here."""

from . import errors as errors
from . import settings as settings
from .choosing.budget import allocate as allocate
from .choosing.refinement import refine_mask as refine_mask
from .errors import (
    CheckpointError as CheckpointError,
)
from .errors import (
    InvalidInputError as InvalidInputError,
)
from .errors import (
    RemovalError as RemovalError,
)
from .errors import (
    SecateurError as SecateurError,
)
from .errors import (
    UnsupportedModelError as UnsupportedModelError,
)
from .meta_training.joint_training import train_joint_pruner as train_joint_pruner
from .meta_training.paper import train_meta_pruner as train_meta_pruner
from .previewing import (
    Preview as Preview,
)
from .previewing import (
    preview as preview,
)
from .pruners.joint_network import JointPruner as JointPruner
from .pruners.map_network import MetaPruner as MetaPruner
from .pruning import prune as prune
from .removal.remove import (
    gated as gated,
)
from .removal.remove import (
    remove_ as remove_,
)
from .report.pruning_report import PruningReport as PruningReport
from .restoring.distillation import distill_ as distill_
from .restoring.reconstruction import reconstruct_ as reconstruct_
from .scorers.base import Scorer as Scorer
from .scorers.score import score as score
from .settings import (
    Cut as Cut,
)
from .settings import (
    Reading as Reading,
)
from .sites.attention import find_sites as find_sites
from .sites.finding import find_units as find_units
from .support.versions import __version__ as __version__
from .units.masks import Mask as Mask
from .units.scores import Scores as Scores
from .units.select import select as select

__all__ = [
    "CheckpointError",
    "Cut",
    "InvalidInputError",
    "JointPruner",
    "Mask",
    "MetaPruner",
    "Preview",
    "PruningReport",
    "Reading",
    "RemovalError",
    "Scorer",
    "Scores",
    "SecateurError",
    "UnsupportedModelError",
    "allocate",
    "distill_",
    "find_sites",
    "find_units",
    "gated",
    "preview",
    "prune",
    "reconstruct_",
    "refine_mask",
    "remove_",
    "score",
    "select",
    "train_joint_pruner",
    "train_meta_pruner",
]
