"""What others left, in today's format: pruned checkpoints of transformers 4, and the paper's authors' meta-pruners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from secateur.errors import CheckpointError, InvalidInputError, invalid
from secateur.models.inputs import example_inputs
from secateur.models.loading import find_tokenizer, load_model
from secateur.models.sentence_transformers import copy_modules
from secateur.models.tokenizer_saving import save_tokenizer
from secateur.pruners.map_network import MetaPruner
from secateur.removal.legacy import has_v4_pruning
from secateur.removal.proof import hidden_states
from secateur.sites.recipe import KEY
from secateur.support.files import check_new_folder, new_folder

_CONVERTIBLE = (
    "be a model folder or Hub id of transformers 4 with `pruned_heads` in its config, or a meta-pruner checkpoint of "
    "the paper's authors (a file)"
)


def convert(source: str | Path, out: str | Path) -> dict[str, Any]:
    """Write `source` into the new folder `out` in today's format, and say what it was.

    A model of transformers 4 with `pruned_heads` becomes a model with a `head_pruning` recipe, of the same class and
    with its tokenizer where it has one. A checkpoint of the paper's authors becomes a folder for
    `MetaPruner.from_pretrained` and `--pruner`. What was written is read again and must equal what was loaded, bit for
    bit; otherwise nothing is left behind.

    Returns `kind` ("model" or "meta_pruner"), `class`, and for a model `kept` and `heads`. Raises `InvalidInputError`
    for any other source, `CheckpointError` for a source that is damaged or does not come back equal.
    """
    check_new_folder(out)
    if Path(source).is_file():
        return _convert_pruner(Path(source), out)
    if not has_v4_pruning(source):
        raise invalid("source", _CONVERTIBLE, str(source))
    return _convert_model(source, out)


def _convert_pruner(source: Path, out: str | Path) -> dict[str, Any]:
    try:
        pruner = MetaPruner.from_authors_checkpoint(source)
    except CheckpointError as error:
        raise InvalidInputError(f"{error}; what can be converted must {_CONVERTIBLE}") from None
    with new_folder(out) as folder:
        pruner.save_pretrained(folder)
        _check_equal(pruner.state_dict(), MetaPruner.from_pretrained(folder).state_dict())
    return {"kind": "meta_pruner", "class": "MetaPruner"}


def _convert_model(source: str | Path, out: str | Path) -> dict[str, Any]:
    with new_folder(out) as folder:
        model = load_model(source, "cpu", whole=True)
        tokenizer = find_tokenizer(source)
        inputs = example_inputs(model)
        place = copy_modules(source, folder)
        model.save_pretrained(place)
        save_tokenizer(tokenizer, source, place)
        again = load_model(folder, "cpu")
        _check_equal(model.state_dict(), again.state_dict())
        outputs = zip(hidden_states(model, inputs), hidden_states(again, inputs), strict=True)
        if type(again) is not type(model) or not all(torch.equal(one, other) for one, other in outputs):
            raise CheckpointError(f"{source} does not come back equal when it is saved and loaded again")
    kept: dict[str, list[int]] = getattr(model.config, KEY)["kept_heads"]
    heads = sum(layout["num_heads"] * len(layout["sites"]) for layout in getattr(model.config, KEY)["layouts"])
    return {"kind": "model", "class": type(model).__name__, "kept": sum(map(len, kept.values())), "heads": heads}


def _check_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    differing = [name for name in one if name not in other or not torch.equal(one[name], other[name])]
    if differing or one.keys() != other.keys():
        raise CheckpointError(f"the weights do not come back equal, see {(differing or sorted(other.keys() - one))[0]}")
