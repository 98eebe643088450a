"""The steps that a pruning has finished, kept in a folder beside its result, so that a killed one goes on there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from secateur.errors import CheckpointError, InvalidInputError
from secateur.finetuning.training_checkpoints import newest
from secateur.support.files import read_json, remove_folder, write_bytes, write_text
from secateur.support.parsing import short

_ABOUT, _TRAINING = "about.json", "training"
_DAMAGE = (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, SafetensorError)


class Steps:
    """What steps came to, by their names; without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.training = None if folder is None else folder / _TRAINING

    def names(self) -> list[str]:
        """Return the steps that are there, in the order in which they were finished; of the training a part will do."""
        if self.folder is None:
            return []
        files = [file for file in self.folder.glob("*.json") if file.name != _ABOUT]
        found = [file.stem for file in sorted(files, key=lambda file: file.stat().st_mtime_ns)]
        return [*found, *([_TRAINING] if newest(self.folder / _TRAINING) else [])]

    def read(self, name: str) -> Any:
        """Return what a step came to, None where it is not there."""
        file = self.folder / f"{name}.json" if self.folder else None
        return None if file is None or not file.is_file() else read_json(file)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a step that is there."""
        assert self.folder is not None
        return safetensors.torch.load_file(self.folder / f"{name}.safetensors")

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Raise `CheckpointError` where a step that is there turns out to be damaged meanwhile."""
        try:
            yield
        except _DAMAGE as error:
            raise CheckpointError(
                f"{self.folder} holds a damaged step `{name}`: {short(error)}; run it again, and it begins anew"
            ) from None

    def write(self, name: str, found: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Keep what a step came to: plain data, and tensors if any. It is there once all of it is."""
        if self.folder is None:
            return
        if tensors is not None:
            whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            write_bytes(self.folder / f"{name}.safetensors", safetensors.torch.save(whole))
        write_text(self.folder / f"{name}.json", json.dumps(found))


def _about(file: Path) -> Any:
    """Return what an earlier run was about, None where nobody can say."""
    try:
        return read_json(file)
    except InvalidInputError:
        return None


@contextmanager
def kept_steps(folder: Path, about: Mapping[str, Any]) -> Iterator[Steps]:
    """Yield the steps that an earlier run kept in `folder`, where it was `about` the same, else none.

    A kill or Ctrl-C leaves them; after a success or an error, which would come again, the folder goes.
    """
    wanted = json.loads(json.dumps(about, default=str))
    file = folder / _ABOUT
    if folder.exists() and _about(file) != wanted:
        remove_folder(folder)
    folder.mkdir(exist_ok=True)
    try:
        if not file.is_file():
            write_text(file, json.dumps(wanted))
        yield Steps(folder)
    except Exception:
        remove_folder(folder)
        raise
    remove_folder(folder)
