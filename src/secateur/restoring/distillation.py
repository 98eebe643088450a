"""What the dense model computes, taught to the pruned one on texts without labels: distillation of hidden states."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import InvalidInputError, invalid
from secateur.finetuning.trainer import train, training_device
from secateur.models.base_model import base_of, how_to_load
from secateur.models.loading import quiet_transformers
from secateur.models.offload import check_loaded, device_of
from secateur.models.state import (
    check_plain_weights,
    check_takes_gradients,
    evaluation_mode,
    gradients_kept,
    held,
    in_float32,
    random_states_kept,
    weights_change,
)
from secateur.relations import RELATED, gated_representations, relational_kl, with_relations
from secateur.restoring.distillation_loss import Pair, taught_by_logits
from secateur.settings import Reading, settings_of
from secateur.sites.layers import LayerSite
from secateur.sites.recipe import note_, read_record
from secateur.support.checks import check_mapping, check_positive, check_whole
from secateur.support.defaults import DISTILLATION_RATE, DISTILLATION_STEPS
from secateur.support.interrupts import in_one_go, interruptible, undoing
from secateur.texts.calibration import PreparedModel, is_pair, listed_examples
from secateur.texts.examples import are_rows, joined, shuffled_parts, source_of
from secateur.texts.tokenization import Text, padding_token, rows_of, tokenize

HELD_OUT = 10  # one of so many texts evaluates the distillation and teaches nothing …
MOST_HELD_OUT = 256  # … up to that many
FEWEST = HELD_OUT * (RELATED - 1) + 1  # texts of which so many evaluate that they have relations


@interruptible
def distill_(
    model: nn.Module,
    teacher: nn.Module,
    texts: Sequence[Text] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    inputs: Sequence[Mapping[str, Tensor]] | None = None,
    steps: int = DISTILLATION_STEPS,
    learning_rate: float = DISTILLATION_RATE,
    layers: Mapping[str, Sequence[int]] | None = None,
    reading: Reading | None = None,
    checkpoints: str | Path | None = None,
) -> tuple[float, float]:
    """Teach a pruned `model`, in place and without labels, to compute what `teacher`, the model before pruning, does.

    Removing units leaves every hidden state as wide as it was, so that each can be held against the teacher's own:
    the loss is the squared difference of the hidden states at every layer, over the tokens that are no padding, as a
    share of the variance of the teacher's, mean over layers (hidden-state distillation: Jiao et al. 2020, arXiv
    1909.10351; without their maps between widths). Dropout is off. Trained are the base model's parameters that ask
    for gradients, but for the table of input embeddings, as texts show few of its rows; a task's head stays as it is.

    Two task models of one class, whose outputs have `logits` of classes, texts or tokens, are also held against each
    other by these: KL of the softmax at temperature 2, times its square (Hinton et al. 2015, arXiv 1503.02531), and the
    squared difference where a logit is a number or a label of its own. A head that a command loaded by name and whose
    weights were not in its files teaches nothing, as it is random. Of a model that you loaded yourself that is not
    known: its head counts as trained, so hand over the base model of one that is not.

    AdamW, `learning_rate` at its height after a tenth of the `steps`, then falling to 0, where the model lies.

    Of a list that lost layers, each layer that stays stands for itself and for those that went before it, and the last
    one for all to the end: its hidden state is held against what the teacher has after them. `layers` has the original
    numbers of the layers that stay, by the list's name; None = what the recipe says.

    `inputs` are ready batches of keyword arguments instead of texts, whose tensors have a row for each example; rows of
    one shape are shuffled once and taught `batch_size` at a time.

    One text of ten, at most 256, teaches nothing and judges: returns the relational KL from the teacher on these,
    before and after. Where it is no lower after, or something fails, the weights are what they were. Gradients that
    parameters have, modes and random states stay. In a folder `checkpoints` a call that was killed goes on, if it is
    called in the same way, which is not checked.

    Raises `InvalidInputError` for fewer than 21 texts, a teacher whose hidden states have other shapes, and values out
    of range, `UnsupportedModelError` for a model that returns no hidden states and for quantised weights, and
    `SecateurError` where the loss does not stay finite.
    """
    check_whole("steps", steps)
    check_positive("learning_rate", learning_rate)
    _check_layers(layers)
    if checkpoints is not None and (not isinstance(checkpoints, str | Path) or not str(checkpoints)):
        raise invalid("checkpoints", "be a folder, or None", checkpoints)
    place = None if checkpoints is None else Path(checkpoints)
    reading, examples = settings_of(reading, Reading), listed_examples(texts, inputs)
    if len(examples) < FEWEST:
        raise invalid(source_of(examples), f"be at least {FEWEST}, as every tenth judges", len(examples))
    student, master = _checked(model, teacher)
    model, teacher = cast(PreTrainedModel, model), cast(PreTrainedModel, teacher)
    prepared = PreparedModel(model, tokenizer, reading)
    reading = replace(reading, device=str(training_device(device_of(student))))
    every = max(HELD_OUT, math.ceil(len(examples) / MOST_HELD_OUT))
    held_out, training = examples[::every], [one for number, one in enumerate(examples) if number % every]
    device = torch.device(str(reading.device))
    with (
        held(student), held(master), evaluation_mode(model), _on(teacher, device), torch.inference_mode(False),
        random_states_kept(), gradients_kept(model),
    ):  # fmt: skip
        batches = with_relations(prepared.batches(held_out, reading.batch_size))
        layers = _kept_layers(student) if layers is None else layers
        pair = Pair(model, teacher, layers, taught_by_logits(model, teacher, batches[0]))
        _check_same_shapes(pair, batches[0])
        evaluate = partial(_relational_kl, pair, batches, is_pair(examples))
        before = evaluate()
        after = _kept_if_lower(
            pair, before, evaluate,
            partial(_teach, pair, prepared, training, steps, learning_rate, reading, place),
        )  # fmt: skip
    return before, after


def _checked(model: nn.Module, teacher: nn.Module) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return the base models of both, which can be taught and teach."""
    student = base_of(model)
    if not isinstance(teacher, PreTrainedModel) or (master := base_of(teacher)) is student:
        rule = "be another model of transformers, `model` before pruning"
        raise invalid("teacher", rule, type(teacher).__name__, how_to_load(teacher))
    for one in (student, master):
        check_loaded(one, "distillation")
    check_plain_weights(student)
    check_takes_gradients(student)
    return student, master


def _check_layers(layers: Any) -> None:
    rule = "be a mapping from lists of layers to the original numbers of the layers that stay"
    if layers is not None:
        check_mapping("layers", layers, rule)
        for kept in layers.values():
            if not isinstance(kept, Sequence) or not kept or not all(type(number) is int for number in kept):
                raise invalid("layers", rule, layers)


def _kept_if_lower(pair: Pair, before: float, evaluate: Callable[[], float], teach: Callable[[], None]) -> float:
    """Teach, and return the lower of the losses before and after; the weights are put back where it did not fall."""
    student = pair.bases[0]
    with (
        weights_change(student),
        in_float32(pair.student),
        _changing(pair) as parameters,
        _undone_unless_noted(parameters) as notes,
    ):
        teach()
        after = evaluate()
        if after < before:
            in_one_go(partial(_note_, student, notes))
    return min(before, after)


def _note_(student: PreTrainedModel, notes: list[str]) -> None:
    note_(student, "distilled")
    notes.append("distilled")


@undoing
def _undone_unless_noted(parameters: Sequence[nn.Parameter]) -> Iterator[list[str]]:
    """Put the weights back at the end unless something is in the list that is yielded."""
    weights = [parameter.detach().clone() for parameter in parameters]
    notes: list[str] = []
    try:
        yield notes
    finally:
        if not notes:
            with torch.no_grad():
                for parameter, old in zip(parameters, weights, strict=True):
                    parameter.copy_(old)


def _teach(
    pair: Pair,
    prepared: PreparedModel,
    examples: Sequence[Any],
    steps: int,
    learning_rate: float,
    reading: Reading,
    checkpoints: Path | None,
) -> None:
    """Run the training."""
    run = partial(train, pair, title="distilling", steps=steps, learning_rate=learning_rate, every_column=True)
    run = partial(run, checkpoints=checkpoints)
    with quiet_transformers(False), torch.enable_grad():
        if are_rows(examples):
            # The batches are fixed, as rows of unlike shapes cannot share one; drawn are the batches.
            parts = shuffled_parts(examples, reading.batch_size, reading.seed)
            run(parts, _only_one, reading=reading.with_batches_of(1), by_length=False)
            return
        tokenizer = prepared.tokenizer
        with padding_token(tokenizer):
            rows = rows_of(tokenize(tokenizer, examples, prepared.longest))
            run(rows, DataCollatorWithPadding(tokenizer), reading=reading)


def _only_one(parts: list[Any]) -> dict[str, Any]:
    """Return the one batch of a list, on the CPU, from where the training fetches it."""
    return joined(parts[0], "cpu")


def _kept_layers(student: PreTrainedModel) -> dict[str, Sequence[int]]:
    """Return the layers that stay of every list that lost some, as the recipe tells."""
    recipe = read_record(student.config)
    sites = {} if recipe is None else recipe.sites
    return {
        name: recipe.kept[name] for name, site in sites.items() if isinstance(site, LayerSite) and recipe is not None
    }


@torch.no_grad()
def _check_same_shapes(pair: Pair, batch: Mapping[str, Any]) -> None:
    (found, _), (wanted, _) = pair.read(pair.arguments.of(batch))
    for one, other in pair.matched(found, wanted):
        if one.shape != other.shape:
            raise InvalidInputError(
                f"`teacher` must be the model before pruning, got hidden states {other.shape[-1]} wide where the "
                f"pruned model has {one.shape[-1]}"
            )


@torch.no_grad()
def _relational_kl(pair: Pair, batches: Sequence[Mapping[str, Any]], is_pair: bool) -> float:
    """Return the mean over batches of KL(teacher ‖ student) between the relations of their texts."""
    values = []
    for batch in batches:
        arguments = pair.arguments.of(batch)
        student, teacher = (gated_representations(model, arguments, {}, is_pair) for model in pair.bases)
        values.append(float(relational_kl(teacher, student)))
    return statistics.fmean(values)


@undoing
def _changing(pair: Pair) -> Iterator[list[nn.Parameter]]:
    """Let gradients reach the base's parameters that ask for them, but for input embeddings, and yield these."""
    student, table = pair.bases[0], cast(Any, None)
    with suppress(NotImplementedError):  # of models of sound
        table = student.get_input_embeddings()
    taught = {id(parameter) for parameter in student.parameters()}
    if isinstance(table, nn.Embedding):
        taught -= {id(parameter) for parameter in table.parameters()}
    fixed = [p for p in pair.student.parameters() if p.requires_grad and id(p) not in taught]
    try:
        for parameter in fixed:
            parameter.requires_grad_(False)
        found = [parameter for parameter in student.parameters() if parameter.requires_grad]
        if not found:
            raise InvalidInputError("`model` must have parameters that ask for gradients; `requires_grad_` lets them")
        yield found
    finally:
        for parameter in fixed:
            parameter.requires_grad_(True)


@undoing
def _on(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Lend a model to a device, in evaluation mode."""
    before = device_of(model)
    try:
        with evaluation_mode(model):
            yield model.to(device)
    finally:
        model.to(before)
