"""transformers' own `Trainer` as fine-tuning and distillation run it: one device, nothing printed, nothing saved."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from secateur.errors import SecateurError, invalid
from secateur.finetuning.training_checkpoints import Keeping, ResumedTrainer, newest
from secateur.models.loading import check_device
from secateur.settings import Reading
from secateur.support.files import temporary_folder
from secateur.support.interrupts import undoing

_one_at_a_time = threading.RLock()  # the Trainer keeps the state of its device once for the process


def train(
    model: nn.Module,
    rows: Sequence[Any],
    collate: Callable[[list[Any]], Any],
    *,
    title: str,
    steps: int,
    epochs: float | None = None,
    learning_rate: float,
    reading: Reading,
    every_column: bool = False,
    by_length: bool = True,
    checkpoints: Path | None = None,
) -> tuple[float, int, float]:
    """Train in place for `steps` updates, or, where given, for `epochs`, and return the seconds, updates and mean loss.

    AdamW with a linear schedule whose first tenth of `steps` warms up. `every_column` hands the model what it does not
    name as an argument too; `by_length` puts texts of similar length into a batch. In the folder `checkpoints`, where
    there is one, the training keeps how far it is, and the same training goes on there; its mean loss is too low then.
    Raises `SecateurError` where the loss does not stay finite, and `InvalidInputError` for a device that this machine
    has not. A second training in another thread waits for the first.
    """
    with (
        _one_at_a_time,
        temporary_folder() if checkpoints is None else nullcontext(checkpoints) as folder,
        _kept(getattr(model, "config", None), "use_cache"),
        _kept(model, "forward", "_original_forward"),
    ):
        arguments = _arguments(str(folder), steps, epochs, learning_rate, reading, every_column, by_length)
        bar = _Progress(title, reading.progress)
        last = None if checkpoints is None else newest(checkpoints)
        trainer = ResumedTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
        trainer.draws_order_alone = every_column
        for callback in [bar, *([] if checkpoints is None else [Keeping()])]:
            trainer.add_callback(callback)
        # It prints to stdout, which belongs to results.
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        try:
            output = trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            bar.close()
        seconds = time.perf_counter() - start
    if not math.isfinite(output.training_loss):
        raise SecateurError(f"the training loss became {output.training_loss}; try a lower `learning_rate`")
    return seconds, output.global_step, output.training_loss


def _arguments(
    folder: str,
    steps: int,
    epochs: float | None,
    learning_rate: float,
    reading: Reading,
    every_column: bool,
    by_length: bool,
) -> TrainingArguments:
    """Return what the `Trainer` is told. Raises `InvalidInputError` for a device that this machine has not."""
    device = None if reading.device is None else training_device(reading.device)
    length: dict[str, Any] = {"max_steps": steps} if epochs is None else {"num_train_epochs": epochs}
    arguments = TrainingArguments(
        output_dir=folder,
        **length,
        learning_rate=learning_rate,
        per_device_train_batch_size=reading.batch_size,
        warmup_steps=math.ceil(0.1 * steps),
        lr_scheduler_type="linear",
        **(_group_by_length() if by_length else {}),
        seed=reading.seed,
        data_seed=reading.seed,
        remove_unused_columns=not every_column,
        bf16=reading.bf16,
        use_cpu=check_device(device).type == "cpu",
        dataloader_pin_memory=torch.cuda.is_available() and (device is None or device.type == "cuda"),
        save_strategy="no",
        save_total_limit=1,  # of checkpoints that are asked for: each is three times as large as the model
        eval_strategy="no",
        logging_strategy="no",
        # The filter would leave an infinite loss out of the mean.
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
    )
    if device is not None and arguments.device.type != device.type:
        raise invalid("device", "be one that this machine has", str(device))
    if arguments.n_gpu > 1:
        # One device: DataParallel would multiply the batch size.
        arguments._n_gpu = 1
    return arguments


class _Progress(TrainerCallback):
    """A bar on stderr; the Trainer's own bar also writes its log to stdout."""

    def __init__(self, title: str, shown: bool) -> None:
        self.title, self.shown = title, shown
        self.bar = tqdm(disable=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar once the number of steps is known."""
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self.title, unit="step", leave=False,
            disable=not self.shown,
        )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count one optimizer step."""
        self.bar.update(1)

    def close(self) -> None:
        """Close the bar, also where the training ended early."""
        self.bar.close()


def _group_by_length() -> dict[str, Any]:
    """Return the option that puts texts of similar length into a batch; the first releases of 5 name it otherwise."""
    if "train_sampling_strategy" in TrainingArguments.__dataclass_fields__:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


@undoing
def _kept(owner: Any, *names: str) -> Iterator[None]:
    """Keep an object's own attributes: the Trainer overwrites a config's entry, and for bf16 wraps the forward."""
    if owner is None:
        yield
        return
    before = {name: vars(owner)[name] for name in names if name in vars(owner)}
    try:
        yield
    finally:
        for name in names:
            vars(owner).pop(name, None)
        vars(owner).update(before)


def training_device(device: str | torch.device | None) -> torch.device:
    """Return the device to train on, the default for None; the `Trainer` knows no other than the first of its kind."""
    chosen = check_device(device)
    if chosen.index:
        raise invalid("device", "name no other device than the first", str(device), "choose with CUDA_VISIBLE_DEVICES")
    return chosen
