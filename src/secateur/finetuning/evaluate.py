"""The standard metrics of a task, and a model's predictions to compute them from."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from tqdm import tqdm

from secateur.errors import invalid
from secateur.models.finite import check_finite
from secateur.models.loading import check_device
from secateur.models.state import evaluation_mode
from secateur.settings import Reading, settings_of
from secateur.support.interrupts import interruptible, undoing
from secateur.texts.data import Task
from secateur.texts.halving import in_batches_that_fit
from secateur.texts.tokenization import batches, padding_token

# GLUE's own choice for each task. A task that is not named here is measured by accuracy, a regression by Spearman.
MAIN_METRIC = {"cola": "matthews", "mrpc": "f1", "qqp": "f1", "stsb": "spearman"}


def classification_metrics(predicted: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """Return `accuracy` in [0, 1] and more, from one predicted and one true class for each text.

    Where every label is 0 or 1: `f1` of class 1 in [0, 1] and `matthews` in [-1, 1]; else `f1_macro`, the unweighted
    mean over the classes. A value that is undefined, as where one class is always predicted, is 0.0.

    Raises `InvalidInputError` where the lengths differ or are 0.
    """
    guesses, truth = np.asarray(predicted), np.asarray(labels)
    _check_lengths(guesses, truth)
    result = {"accuracy": float(accuracy_score(truth, guesses))}
    # The labels decide, not the predictions, so that the same task always has the same metrics.
    if truth.max() <= 1:
        result["f1"] = float(f1_score(truth == 1, guesses == 1, zero_division=0.0))
        one_class = truth.min() == truth.max() or guesses.min() == guesses.max()
        result["matthews"] = 0.0 if one_class else float(matthews_corrcoef(truth, guesses))
    else:
        result["f1_macro"] = float(f1_score(truth, guesses, average="macro", zero_division=0.0))
    return result


def regression_metrics(predicted: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Return the correlations `pearson` and `spearman` in [-1, 1]; both are 0.0 where either side is constant.

    Raises `InvalidInputError` where the lengths differ or are 0, and for predictions that are not finite.
    """
    guesses, truth = np.asarray(predicted, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    _check_lengths(guesses, truth)
    if not np.isfinite(guesses).all():
        raise invalid("predicted", "be finite", float(guesses[~np.isfinite(guesses)][0]))
    if np.ptp(guesses) == 0 or np.ptp(truth) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    with warnings.catch_warnings():
        # scipy warns of nearly constant values; the number that it gives is still the best there is.
        warnings.simplefilter("ignore")
        return {
            "pearson": float(pearsonr(guesses, truth).statistic),
            "spearman": float(spearmanr(guesses, truth).statistic),
        }


def main_metric(task: Task) -> str:
    """Return the name of the one metric that a table shows for this task: GLUE's where the task's name is GLUE's.

    Raises `InvalidInputError` where the task has no labels.
    """
    default = "spearman" if task.is_regression else "accuracy"
    named = MAIN_METRIC.get(task.name.lower().replace("-", ""), default)
    # A task of another kind may bear one of GLUE's names; it gets the metric of its kind.
    possible = {1: ("pearson", "spearman"), 2: ("accuracy", "f1", "matthews")}.get(task.num_labels, ())
    return named if named in possible else default


def constant_metric(task: Task) -> float:
    """Return the main metric of the best constant answer: the same class, or the same number, for every text.

    That is the share of the commonest class for accuracy, the F1 of "always 1", and 0 for Matthews' correlation and for
    the correlations of a regression, which are undefined there. A model that has learned something is better.

    Raises `InvalidInputError` where the task has no labels.
    """
    main = main_metric(task)
    assert task.labels is not None  # main_metric raises where the task has no labels
    if task.is_regression:
        return regression_metrics([0.0] * len(task), task.labels)[main]
    labels = [int(label) for label in task.labels]
    # Only two classes have a metric by which the rarer one can be the better answer.
    answers = [label for label, _ in Counter(labels).most_common(2)]
    return max(classification_metrics([answer] * len(labels), labels)[main] for answer in answers)


EVALUATION = Reading(batch_size=64)
"""How texts are read that are evaluated alone."""


def check_model_fits(model: Any, task: Task) -> None:
    """Raise `InvalidInputError` unless the model has one output for a regression or one for each class of the task."""
    outputs, needed = model.config.num_labels, task.num_labels
    # A small dev set may lack the highest class, so a classifier may have more outputs than the task shows.
    fits = outputs == 1 if task.is_regression else outputs >= needed
    if not fits:
        kind = "1 output for a regression" if task.is_regression else f"{needed} outputs or more, one for each class"
        raise invalid(
            "model",
            f"have {kind} to fit {task.name!r}",
            f"num_labels = {outputs}",
            "labels count as a regression where one has a decimal point",
        )


@interruptible
def evaluate_model(
    model: Any, tokenizer: Any, task: Task, *, device: str | torch.device | None = None, reading: Reading | None = None
) -> dict[str, float]:
    """Return the metrics of a sequence-classification model on a task, dense or pruned alike.

    The result holds what `classification_metrics` or `regression_metrics` gives. The model computes on `device`, or
    where it is when None, and comes back as it was: device, mode, configuration.

    Raises `InvalidInputError` where the task has no labels, where the model has another number of outputs, where it
    is no sequence-classification model, for what `batches` refuses, and for NaN or infinity, naming the
    module where it begins. Where a batch does not fit into memory, the batch size is halved, with a `SecateurWarning`.
    """
    check_model_fits(model, task)
    reading = EVALUATION if reading is None else settings_of(reading, Reading)
    assert task.labels is not None  # check_model_fits raises where the task has no labels
    # Texts of similar length share a batch, which saves padding; characters are near enough to tokens for that.
    order = sorted(range(len(task)), key=lambda i: sum(map(len, task.texts[i])) if task.is_pair else len(task.texts[i]))
    ordered = Task(task.name, [task.texts[i] for i in order])
    outputs = in_batches_that_fit(partial(_outputs, model, tokenizer, ordered, device), reading)
    labels = [task.labels[i] for i in order]
    if task.is_regression:
        return regression_metrics(outputs[:, 0].tolist(), labels)
    return classification_metrics(outputs.argmax(dim=1).tolist(), [int(label) for label in labels])


def _outputs(
    model: Any, tokenizer: Any, task: Task, device: str | torch.device | None, reading: Reading
) -> torch.Tensor:
    """Return the model's outputs for each text, float32 `[texts, outputs]`."""
    inputs = batches(tokenizer, task.texts, reading.batch_size, reading.max_length)
    rows: list[torch.Tensor] = []
    hidden = not reading.progress
    with ready_to_evaluate(model, tokenizer, device) as place, torch.no_grad():
        for batch in tqdm(inputs, desc=f"evaluate {task.name}", unit="batch", leave=False, disable=hidden):
            run = partial(model, **{name: tensor.to(place) for name, tensor in batch.items()})
            logits = getattr(run(), "logits", None)
            if logits is None or logits.ndim != 2:
                raise invalid("model", "be a sequence-classification model", type(model).__name__)
            check_finite(logits, model, run)
            rows.append(logits.float().cpu())
    return torch.cat(rows)


@undoing
def ready_to_evaluate(model: Any, tokenizer: Any, device: str | torch.device | None = None) -> Iterator[torch.device]:
    """Put the model on the device and in evaluation mode, yield the device, and undo all of it at the end."""
    place, pad_token_id = model.device, model.config.pad_token_id
    device = None if device is None else check_device(device)
    try:
        if pad_token_id is None:
            # Decoders look for the last token that is no padding, so they must know what `batches` pads with.
            with padding_token(tokenizer):
                model.config.pad_token_id = tokenizer.pad_token_id
        if device is not None:
            model.to(device)
        with evaluation_mode(model):
            yield model.device
    finally:
        model.config.pad_token_id = pad_token_id
        if device is not None:
            model.to(place)


def _check_lengths(predicted: np.ndarray, labels: np.ndarray) -> None:
    if not len(labels) or predicted.shape != labels.shape:
        raise invalid("predicted", f"hold one number for each of the {len(labels)} labels", predicted.shape)
