"""Fine-tuning with transformers' own `Trainer`, dense or pruned models alike."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, set_seed

from secateur.errors import InvalidInputError, invalid
from secateur.finetuning.evaluate import EVALUATION, check_model_fits, evaluate_model, main_metric
from secateur.finetuning.trainer import train, training_device
from secateur.models.base_model import base_of
from secateur.models.loading import check_device, load_model, load_tokenizer, note_trained_, quiet_transformers
from secateur.models.names import original_name
from secateur.models.tokenizer_saving import save_tokenizer
from secateur.settings import Reading, said_of, settings_of
from secateur.sites.recipe import note_
from secateur.support.checks import check_positive
from secateur.support.defaults import FINETUNING_EPOCHS, FINETUNING_RATE
from secateur.support.files import new_folder, write_text
from secateur.support.interrupts import interruptible
from secateur.support.run_files import FINETUNING
from secateur.texts.data import Task
from secateur.texts.tokenization import padding_token, rows_of, tokenize


@dataclass(frozen=True)
class FinetuneResult:
    """What one fine-tuning gave.

    `metrics` are those of the dev task (empty without one) and `main_metric` names the one to look at; `seconds` is
    the time of the training steps alone, `steps` the number of optimizer steps, `train_loss` the mean over them.
    """

    metrics: dict[str, float]
    seconds: float
    steps: int
    train_loss: float
    main_metric: str


@interruptible
def finetune(
    model_or_path: Any,
    task: Task,
    dev: Task | None = None,
    *,
    tokenizer: Any = None,
    out: str | Path | None = None,
    epochs: float = FINETUNING_EPOCHS,
    learning_rate: float = FINETUNING_RATE,
    reading: Reading | None = None,
) -> tuple[Any, FinetuneResult]:
    """Train a sequence-classification model on a task and return it with the metrics on `dev`.

    `model_or_path` is a folder or Hub id, loaded with a classification head that fits the task, or a loaded
    sequence-classification model, which is trained in place and needs its `tokenizer`. The optimizer is AdamW with
    a linear schedule whose first tenth warms up. The model comes back in evaluation mode on the device it trained on:
    that of `reading`, or the accelerator of this machine if there is one. With `bf16` the training steps compute matrix
    products in bfloat16 (autocast); weights, optimizer and evaluation stay as they are. `out` names a new folder for
    the model, its tokenizer and `finetune_result.json`. The seed fixes the head, the order of the texts and the
    dropout, and is set for the whole process.

    Raises `InvalidInputError` for a task without labels, a model that does not load or does not fit, parameters out
    of range, and a folder `out` that is not empty; all of it before the training. Raises `SecateurError` where the
    loss does not stay finite; the model is then of no use.
    """
    _check_same_kind(task, dev)
    check_positive("epochs", epochs)
    check_positive("learning_rate", learning_rate)
    reading = settings_of(reading, Reading)
    _check_device(reading)
    is_loaded = isinstance(model_or_path, torch.nn.Module)
    if is_loaded and tokenizer is None:
        raise invalid("tokenizer", "be given with a loaded model", None)
    set_seed(reading.seed)
    # The folder is claimed before the work whose results it gets.
    with nullcontext() if out is None else new_folder(out) as folder, quiet_transformers(reading.progress):
        model = model_or_path if is_loaded else load_classifier(model_or_path, task, dev)
        tokenizer = load_tokenizer(model_or_path) if tokenizer is None else tokenizer
        for split in (task, dev):
            if split is not None:
                check_model_fits(model, split)
        with padding_token(tokenizer):
            if model.config.pad_token_id is None:
                # Decoders classify at the last token that is no padding.
                model.config.pad_token_id = tokenizer.pad_token_id
            seconds, steps, loss = _train(model, tokenizer, task, epochs, learning_rate, reading)
            model.eval()
            note_(model, "finetuned")
            note_trained_(model)
            own = replace(EVALUATION, max_length=reading.max_length, progress=reading.progress)
            metrics = {} if dev is None else evaluate_model(model, tokenizer, dev, reading=own)
            result = FinetuneResult(metrics, seconds, steps, loss, main_metric(task if dev is None else dev))
            if folder is not None:
                name = original_name(model) if is_loaded else str(model_or_path)
                settings = {"model": name, "task": task.name, "epochs": epochs, "learning_rate": learning_rate}
                model.save_pretrained(folder)
                save_tokenizer(tokenizer, None if is_loaded else name, folder)
                _save_result(result, {**settings, **said_of(reading)}, folder)
    return model, result


def _save_result(result: FinetuneResult, settings: dict[str, Any], folder: Path) -> None:
    write_text(folder / FINETUNING, json.dumps({**asdict(result), "settings": settings}, indent=1))


def _check_device(reading: Reading) -> None:
    """Raise `InvalidInputError` for a device that cannot train, or not in bfloat16 where that is asked for."""
    device = None if reading.device is None else training_device(reading.device)
    if reading.bf16 and check_device(device).type == "cuda" and not torch.cuda.is_bf16_supported():
        raise invalid("bf16", "be off on a device without bfloat16", True)


def load_classifier(path: str | Path, task: Task, dev: Task | None = None) -> Any:
    """Load a folder or Hub id on the CPU with a classification head that fits the task.

    A new head is drawn from the process's random numbers; for a regression its bias starts at the mean label, which
    hundreds of small steps would otherwise be spent on. Raises `InvalidInputError` for a task without labels and a
    model that does not load or does not fit.
    """
    _check_same_kind(task, dev)
    num_labels = max(task.num_labels, 0 if dev is None else dev.num_labels)
    problem = "regression" if task.is_regression else "single_label_classification"
    try:
        model = load_model(path, "cpu", AutoModelForSequenceClassification, num_labels=num_labels, problem_type=problem)
    except InvalidInputError as error:
        if "ignore_mismatched_sizes" not in str(error.__cause__):
            raise
        raise InvalidInputError(
            f"the weights of {str(path)!r} do not fit a model with {num_labels} outputs; where it is fine-tuned for "
            "another task already, start from its base model"
        ) from error
    # The config still names the class that the checkpoint was saved with.
    is_new = not (model.config.architectures or [""])[0].endswith("ForSequenceClassification")
    if is_new and task.is_regression and task.labels:
        inside = {id(module) for module in base_of(model).modules()}
        for module in model.modules():
            is_last = isinstance(module, torch.nn.Linear) and module.out_features == 1 and id(module) not in inside
            if is_last and module.bias is not None:
                torch.nn.init.constant_(module.bias, sum(task.labels) / len(task.labels))
    return model


def _check_same_kind(task: Task, dev: Task | None) -> None:
    """Refuse a dev task of another kind; asking for the number of labels refuses a task without any."""
    if task.num_labels and dev is not None and dev.num_labels and dev.is_regression != task.is_regression:
        raise invalid("dev", "be a regression or a classification as the training task is", dev.name)


def _train(
    model: Any, tokenizer: Any, task: Task, epochs: float, learning_rate: float, reading: Reading
) -> tuple[float, int, float]:
    """Run the `Trainer` and return its seconds, optimizer steps and mean loss."""
    assert task.labels is not None  # finetune has read num_labels, which raises where there are no labels
    encoded = rows_of(tokenize(tokenizer, task.texts, reading.max_length))
    rows = [{**row, "labels": label} for row, label in zip(encoded, task.labels, strict=True)]
    return train(
        model,
        rows,
        DataCollatorWithPadding(tokenizer),
        title=f"fine-tune on {task.name}",
        steps=max(1, math.ceil(math.ceil(len(rows) / reading.batch_size) * epochs)),
        epochs=epochs,
        learning_rate=learning_rate,
        reading=reading,
    )
