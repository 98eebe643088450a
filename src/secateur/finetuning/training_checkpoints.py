"""transformers' `Trainer` as it is run here: a killed one goes on, and several processes come to what one comes to."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler

from secateur.errors import CheckpointError, SecateurWarning
from secateur.support.parsing import short
from secateur.texts.halving import is_out_of_memory

SECONDS = 60.0
"""A checkpoint is written when so much time has passed since the last one."""

_WEIGHTS, _WHOLE = "weights.pt", "whole"


class ResumedTrainer(Trainer):
    """A Trainer whose checkpoints hold all that the model registers, tied weights included.

    Of the processes that a launcher started each trains on all batches, so that the result is that of one. With
    `draws_order_alone` nothing but the order of the texts is random, and it is drawn as the seed alone says, whatever
    other threads draw meanwhile.
    """

    draws_order_alone = False

    def get_train_dataloader(self) -> Any:
        """Return the batches, unshared."""
        loader: Any = super().get_train_dataloader()
        if isinstance(loader.batch_sampler, BatchSamplerShard):
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
            loader.batch_sampler.even_batches = False  # the last batch is as short as it is for one process
        sampler = getattr(loader.batch_sampler, "sampler", None)
        if self.draws_order_alone and isinstance(sampler, LengthGroupedSampler):
            inner = getattr(loader, "base_dataloader", loader)
            inner.generator = sampler.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), Path(output_dir, _WEIGHTS))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:  # PyTorch raises the second for a full disk
            for place in folder.glob("checkpoint-*"):  # the result will need the room
                shutil.rmtree(place, ignore_errors=True)
            self.remove_callback(Keeping)
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"no checkpoint of the training was written: {reason}", SecateurWarning, stacklevel=2)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        file = Path(resume_from_checkpoint, _WEIGHTS)
        with _whole(file.parent):
            self.model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _whole(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _whole(checkpoint):
            super()._load_rng_state(checkpoint)


@contextmanager
def _whole(checkpoint: Any) -> Iterator[None]:
    """Raise `CheckpointError` for what a damaged file of a checkpoint raises."""
    try:
        yield
    except Exception as error:
        if checkpoint is None or is_out_of_memory(error):
            raise
        reason = short(error) or type(error).__name__
        raise CheckpointError(f"{checkpoint} is damaged: {reason}; the same call begins anew") from error


class Keeping(TrainerCallback):
    """Has a checkpoint written from time to time, and marks those that are whole."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.last = clock, clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint where it is time."""
        if self.clock() - self.last >= SECONDS:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint; a killed run may have left one that is not whole."""
        place = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if place.is_dir():
            (place / _WHOLE).touch()
        self.last = self.clock()


def newest(folder: Path) -> Path | None:
    """Return the last whole checkpoint in a folder, None where there is none. One that is damaged counts as none."""
    whole = [place for place in folder.glob("checkpoint-*") if (place / _WHOLE).is_file()]
    steps = {place: step for place in whole if (step := step_of(place)) is not None}
    return max(steps, key=steps.__getitem__, default=None)


def step_of(checkpoint: Path) -> int | None:
    """Return after how many steps a checkpoint was written, None where it does not say so."""
    try:
        step = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None
