"""The folder of a meta-training run: a log of JSON lines, and checkpoints that are complete or not there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.errors import CheckpointError, InvalidInputError, invalid, shown
from secateur.meta_training.config import MetaTrainingConfig
from secateur.pruners.map_network import MetaPruner
from secateur.support.checks import check_whole, is_number
from secateur.support.files import (
    LOCK,
    append_line,
    is_taken,
    one_run,
    read_json,
    read_lines,
    remove_folder,
    remove_unfinished,
    replaced_folder,
    write_text,
)
from secateur.support.parsing import short
from secateur.support.run_files import CHECKPOINT

HELD_OUT, CONTRIBUTION = "held_out", "contribution"
"""In a line of the log, the relational KL on held-out texts by task: of the pruner's masks, and of that scorer's."""

_STATES = {"sgd": set[str](), "adam": {"step", "exp_avg", "exp_avg_sq"}}
"""What an optimiser knows of a parameter."""

_FREE = {"steps", "evaluate_every", "checkpoint_every"}  # settings that may change when a run goes on


def check_run_folder(out: Path, resume: bool) -> None:
    """Raise `InvalidInputError` for a folder that is taken, unless a run there is to go on."""
    if is_taken(out) and not resume:
        raise invalid("out", "be a new or empty folder", str(out), "resume the run that is there, or choose another")


@contextmanager
def held_run(out: Path) -> Iterator[None]:
    """Hold a run's folder for this run alone, and tidy up behind one that was killed."""
    with one_run(out / LOCK, out):
        remove_unfinished(out)
        yield


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log. Raises `InvalidInputError` for one that is of no meta-training."""
    rows = read_lines(path)
    for number, row in enumerate(rows, 1):
        is_line = isinstance(row, dict) and is_number(row.get("step"))
        looks = [row[name] for name in (HELD_OUT, CONTRIBUTION) if name in row] if is_line else []
        if not is_line or not all(isinstance(x, dict) and x and all(map(_is_kl, x.values())) for x in looks):
            raise InvalidInputError(f"{path}, line {number} is of no meta-training: {shown(row)}; take it out")
    return rows


def _is_kl(value: Any) -> bool:
    """Whether a value is a relational KL of which a mean can be taken; NaN is what a training came to that diverged."""
    return (is_number(value, least=0) and value < 1e300) or value != value


class Log:
    """JSON lines, written one by one; what lies beyond the step that a run resumes from is taken out first."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [row for row in read_log(path) if row["step"] <= step] if step else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        """Append one line."""
        append_line(self.path, row)


def save_checkpoint(
    out: Path, step: int, pruner: MetaPruner, optimizer: torch.optim.Optimizer, config: MetaTrainingConfig
) -> None:
    """Write the state after `step` updates as `checkpoint-STEP`; all but the two newest go once it is complete."""
    tensors = {f"pruner.{name}": value.contiguous() for name, value in pruner.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{number}.{key}": torch.as_tensor(value).contiguous()
            for key, value in state.items()
            if value is not None
        }
    with replaced_folder(out / f"{CHECKPOINT}{step}") as folder:
        save_file(tensors, folder / "state.safetensors")
        write_text(folder / "state.json", json.dumps({"step": step, "config": asdict(config)}, indent=1))
    for old in _checkpoints(out)[:-2]:
        remove_folder(old)


def load_checkpoint(
    folder: Path, pruner: MetaPruner, optimizer: torch.optim.Optimizer, config: MetaTrainingConfig
) -> int:
    """Put a checkpoint's state into the pruner and its optimiser, and return how many updates it has had.

    Raises `CheckpointError` where it is damaged, of another architecture, or was made with other settings than
    `config`; only the number of steps and how often to evaluate and save may differ.
    """
    try:
        about = read_json(folder / "state.json")
        tensors = load_file(folder / "state.safetensors", device=str(next(pruner.parameters()).device))
        saved_config = MetaTrainingConfig(**about["config"])
        check_whole("step", step := about["step"], 0)
        states = _optimizer_states(tensors, list(pruner.parameters()), _STATES[saved_config.optimizer])
    except Exception as error:
        raise CheckpointError(
            f"{folder} is no complete meta-training checkpoint: {short(error)}; without it, a run goes on from the one "
            "before"
        ) from None
    for name in sorted({f.name for f in fields(config)} - _FREE):
        if getattr(saved_config, name) != getattr(config, name):
            raise CheckpointError(
                f"{folder} was made with {name} = {shown(getattr(saved_config, name))}, not {getattr(config, name)!r}"
            )
    weights = {k.removeprefix("pruner."): v for k, v in tensors.items() if k.startswith("pruner.")}
    try:
        pruner.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} holds another architecture: {str(error).splitlines()[-1].strip()}") from None
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return int(step)


def _optimizer_states(
    tensors: Mapping[str, Tensor], parameters: Sequence[Tensor], names: set[str]
) -> dict[int, dict[str, Tensor]]:  # fmt: skip
    """Return what the optimiser knew of each parameter, by `names`. Raises `ValueError` for what fits no such state."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".")
            shape = () if name == "step" else parameters[int(number)].shape
            if value.shape != shape or (name == "step" and not 0 <= float(value) < 2**53):
                raise ValueError(f"{key} is of another parameter")
            states.setdefault(int(number), {})[name] = value
    if not all(set(state) == names for state in states.values()) or set(states) - set(range(len(parameters))):
        raise ValueError("the optimiser's state is of another optimiser")
    return states


def latest_checkpoint(out: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    checkpoints = _checkpoints(out)
    return checkpoints[-1] if checkpoints else None


def _checkpoints(out: Path) -> list[Path]:
    found = [folder for folder in out.glob(f"{CHECKPOINT}*") if (folder / "state.json").is_file()]
    numbered = {int(number): folder for folder in found if (number := folder.name.removeprefix(CHECKPOINT)).isdecimal()}
    return [numbered[number] for number in sorted(numbered)]
