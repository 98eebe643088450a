"""A pruned model's folder that loads where secateur is not installed: the code that follows the recipe goes along.

transformers runs a Python file in a model's folder, and those that it imports from beside it, when it is asked with
`trust_remote_code=True` and the config's `auto_map` names the file's classes. Ours are the model's own classes with one
step at the end of their constructor. That step is secateur's own code: the files that it takes are copied as they are.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
import shutil
import sys
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from secateur.errors import CheckpointError, SecateurError, UnsupportedModelError, invalid
from secateur.models.base_model import base_of
from secateur.models.inputs import example_inputs
from secateur.models.loading import quiet_transformers
from secateur.removal.checkpoint import without_hook
from secateur.removal.proof import hidden_states
from secateur.removal.replay import missing_sites
from secateur.removal.saving import prepare_to_save_
from secateur.sites.recipe import HOW_TO_LOAD, KEY, Recipe, read_recipe
from secateur.support.files import read_json, write_text
from secateur.support.versions import __version__

MODULE = "modeling_pruned"
"""Name of the file in the folder, without `.py`."""

_HOW_TO_LOAD = "from_pretrained with trust_remote_code=True, which runs the code in this folder"
_SOURCES = Path(__file__).parents[1]
_IMPORT = re.compile(r"^( *)from secateur\.((?:\w+\.)*(\w+)) import ", flags=re.MULTILINE)
_HEAD = """# SPDX-License-Identifier: Apache-2.0
# Written by secateur {version} from its own sources; changes belong there. Needs torch and transformers 5.
"""
_MODELING = '''"""{model} without the attention heads that `head_pruning` in config.json leaves out.

`AutoModel.from_pretrained(folder, trust_remote_code=True)` builds the model, narrows it as `head_pruning` says, and
then reads the weights. Nothing else is changed: the classes are those of transformers.
"""

import transformers

{imports}


{classes}


{registered}
'''
# transformers 5.0 copies only the files that are imported here, not those that they import in turn.
_NAMED = "from .{name} import __name__ as _{name}  # noqa: F401"
_CLASS = '''class {name}(Rebuilt, transformers.{name}):
    """`transformers.{name}` with fewer heads."""'''


def save_standalone(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Save a pruned model with the code that rebuilds it, and return the config's `auto_map`.

    Every Auto class whose model of this config has the recipe's sites is served, `AutoModel` and the model's own among
    them; the classes keep their names. The folder is then loaded by its own code alone: weights and outputs must be
    those of `model` bit for bit, or `CheckpointError` is raised. Raises `InvalidInputError` for a model that is not
    pruned, and `UnsupportedModelError` for a class that no Auto class stands for.
    """
    prepare_to_save_(model)  # what is written below has a copy of the config
    recipe = read_recipe(base_of(model).config)
    if recipe is None:
        raise invalid("model", "be pruned", type(model).__name__, "any other folder loads without secateur as it is")
    classes = _auto_classes(model, recipe)
    if type(model) not in classes.values():
        raise UnsupportedModelError(f"no Auto class of transformers stands for {type(model).__name__}")
    config = model.config
    try:
        model.config = copy.deepcopy(config)
        model.config.auto_map = {auto: f"{MODULE}.{cls.__name__}" for auto, cls in classes.items()}
        model.save_pretrained(folder)
        auto_map: dict[str, str] = model.config.auto_map
    finally:
        model.config = config
    saved = read_json(folder / "config.json")
    saved[KEY][HOW_TO_LOAD] = _HOW_TO_LOAD
    write_text(folder / "config.json", json.dumps(saved, indent=2, sort_keys=True) + "\n")
    for name, text in _files(type(model), classes).items():
        write_text(folder / name, text)
    _check(model, folder)
    return auto_map


def _auto_classes(model: PreTrainedModel, recipe: Recipe) -> dict[str, type[PreTrainedModel]]:
    """Return, by the Auto class's name, the classes of this config in which the recipe finds its sites."""
    found = {}
    autos: dict[str, Any] = vars(modeling_auto)
    for name, auto in autos.items():
        if not (name.startswith("AutoModel") and hasattr(auto, "_model_mapping")):
            continue
        known = auto._model_mapping.get(type(model.config), ())
        known = known if isinstance(known, tuple) else (known,)
        chosen = type(model) if type(model) in known else known[0] if known else None
        if (
            chosen is not None
            and hasattr(transformers, chosen.__name__)
            and (chosen is type(model) or _fits(chosen, model.config, recipe))
        ):
            found[name] = chosen
    return found


def _fits(model_class: type[PreTrainedModel], config: Any, recipe: Recipe) -> bool:
    """Can the class be built without weights, and has it all sites? BART's decoder alone, for one, has not."""
    try:
        with torch.device("meta"), quiet_transformers(progress=False):
            return not missing_sites(base_of(model_class(copy.deepcopy(config))), recipe)
    except (SecateurError, ValueError, AttributeError):  # some classes refuse a config that was not made for them
        return False


def _files(own: type[PreTrainedModel], classes: dict[str, type[PreTrainedModel]]) -> dict[str, str]:
    """Return the texts of the Python files, by name: the one with the classes, and those that it needs."""
    files = _flat("removal.replay")
    by_name = {cls.__name__: auto for auto, cls in classes.items()}
    modeling = _MODELING.format(
        model=own.__name__,
        imports="\n".join([*(_NAMED.format(name=name) for name in sorted(files)), "from .replay import Rebuilt"]),
        classes="\n\n\n".join(_CLASS.format(name=name) for name in sorted(by_name)),
        # Without it transformers 5.0 does not copy the code when the model is saved again.
        registered="\n".join(f'{name}.register_for_auto_class("{by_name[name]}")' for name in sorted(by_name)),
    )
    head = _HEAD.format(version=__version__)
    return {f"{name}.py": head + text for name, text in {**files, MODULE: modeling}.items()}


def _flat(module: str) -> dict[str, str]:
    """Return the sources of a module of this package and of those it imports, by name, to lie in one folder."""
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        path = waiting.pop()
        text = (_SOURCES / f"{path.replace('.', '/')}.py").read_text(encoding="utf-8")
        found[path.rpartition(".")[2]] = _IMPORT.sub(r"\1from .\3 import ", text)
        waiting += [needed for _, needed, name in _IMPORT.findall(text) if name not in found]
    return found


def _check(model: PreTrainedModel, folder: Path) -> None:
    """Load the folder by the code in it, as if secateur were not there, and compare."""
    package = ModuleType(f"{MODULE}_{uuid.uuid4().hex}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    try:
        module = importlib.import_module(f"{package.__name__}.{MODULE}")
        with without_hook(), quiet_transformers(progress=False):
            again = getattr(module, type(model).__name__).from_pretrained(folder, dtype=model.dtype).eval()
    except Exception as error:  # whatever stops it here stops it where the folder is meant to be used
        raise CheckpointError(f"the standalone folder of {type(model).__name__} does not load: {error}") from error
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == package.__name__]:
            del sys.modules[name]
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    weights, expected = again.state_dict(), model.state_dict()
    equal = weights.keys() == expected.keys() and all(
        torch.equal(weights[n].cpu(), v.cpu()) for n, v in expected.items()
    )
    inputs = example_inputs(model)
    outputs = zip(hidden_states(again.to(model.device), inputs), hidden_states(model, inputs), strict=True)
    if not equal or not all(torch.equal(one, other) for one, other in outputs):
        raise CheckpointError(f"{type(model).__name__} does not come back equal from the standalone folder")
