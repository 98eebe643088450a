"""What the dense model computes, taught to the pruned one on texts without labels: distillation of hidden states."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import InvalidInputError, UnsupportedModelError, invalid
from secateur.finetuning.trainer import train, training_device
from secateur.models.inputs import ForwardArguments
from secateur.models.inputs import max_length as most_tokens
from secateur.models.loading import quiet_transformers
from secateur.models.offload import check_loaded, device_of
from secateur.models.state import base_of, check_plain_weights, check_takes_gradients, evaluation_mode, held, in_float32
from secateur.relations import RELATED, gated_representations, relational_kl, with_relations
from secateur.sites.recipe import KEY
from secateur.support.checks import check_flag, check_positive, check_seed, check_whole
from secateur.texts.calibration import calibration_batches, own_tokenizer, texts_of
from secateur.texts.data import Text, check_texts, padding_token, tokenize

STEPS, LEARNING_RATE = 300, 5e-4
JUDGES = 10  # one of so many texts judges the distillation and teaches nothing …
MOST_JUDGES = 256  # … up to that many
FEWEST = JUDGES * (RELATED - 1) + 1  # texts of which so many judge that they have relations


def distill_(
    model: nn.Module,
    teacher: nn.Module,
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = 32,
    max_length: int = 128,
    seed: int = 0,
    bf16: bool = False,
    progress: bool = False,
) -> tuple[float, float]:
    """Teach a pruned `model`, in place and without labels, to compute what `teacher`, the model before pruning, does.

    Removing heads leaves every hidden state as wide as it was, so that each can be held against the teacher's own:
    the loss is the squared difference of the hidden states at every layer, over the tokens that are no padding, as a
    share of the variance of the teacher's, mean over layers (hidden-state distillation: Jiao et al. 2020, arXiv
    1909.10351; without their maps between widths). Dropout is off. Trained are the base model's parameters that ask
    for gradients, but for the table of input embeddings, as texts show few of its rows; a task's head stays as it is.
    AdamW, `learning_rate` at its height after a tenth of the `steps`, then falling to 0, where the model lies.

    One text of ten, at most 256, teaches nothing and judges: returns the relational KL from the teacher on these,
    before and after. Where it is no lower after, or something fails, the weights are what they were.

    Raises `InvalidInputError` for fewer than 21 texts, a teacher whose hidden states have other shapes, and values out
    of range, `UnsupportedModelError` for a model that returns no hidden states and for quantised weights, and
    `SecateurError` where the loss does not stay finite.
    """
    check_whole("steps", steps)
    check_positive("learning_rate", learning_rate)
    check_whole("batch_size", batch_size)
    check_whole("max_length", max_length, 4)
    check_seed(seed)
    check_flag("bf16", bf16)
    check_flag("progress", progress)
    texts = cast(Sequence[Text], texts_of(texts))
    check_texts(texts)
    if len(texts) < FEWEST:
        raise invalid("texts", f"be at least {FEWEST}, as every tenth judges", len(texts))
    student = base_of(model)
    if not isinstance(teacher, PreTrainedModel) or (master := base_of(teacher)) is student:
        raise invalid("teacher", "be another model of transformers, `model` before pruning", type(teacher).__name__)
    for one in (student, master):
        check_loaded(one, "distillation")
    check_plain_weights(student)
    check_takes_gradients(student)
    tokenizer = own_tokenizer(model) if tokenizer is None else tokenizer
    device = training_device(device_of(student))
    every = max(JUDGES, math.ceil(len(texts) / MOST_JUDGES))
    judging, teaching = texts[::every], [text for number, text in enumerate(texts) if number % every]
    tokens = min(max_length, most_tokens(student, max_length))
    with held(student), held(master), evaluation_mode(student), _on(master, device), torch.inference_mode(False):
        made = with_relations(calibration_batches(student, judging, tokenizer, batch_size, tokens))
        pair = _Pair(student, master)
        _check_same_shapes(pair, made[0])
        judge = partial(_relational_kl, pair, made, not isinstance(texts[0], str))
        before = judge()
        with in_float32(student), _changing(student) as parameters, padding_token(tokenizer), quiet_transformers(False):
            weights = [parameter.detach().clone() for parameter in parameters]
            is_lower = False
            try:
                encoding = tokenize(tokenizer, teaching, tokens)
                rows = [{name: values[i] for name, values in encoding.items()} for i in range(len(teaching))]
                with torch.enable_grad():
                    train(
                        pair,
                        rows,
                        DataCollatorWithPadding(tokenizer),
                        title="distilling",
                        steps=steps,
                        learning_rate=learning_rate,
                        batch_size=batch_size,
                        seed=seed,
                        bf16=bf16,
                        device=device,
                        progress=progress,
                        every_column=True,
                    )
                after = judge()
                is_lower = after < before
                if is_lower and isinstance(entry := getattr(student.config, KEY, None), dict):
                    entry["distilled"] = True
            finally:
                if not is_lower:
                    with torch.no_grad():
                        for parameter, old in zip(parameters, weights, strict=True):
                            parameter.copy_(old)
    return before, after if is_lower else before


class _Pair(nn.Module):
    """The student, whose loss is how far its hidden states are from those of a teacher that is no part of it."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        super().__init__()
        self.student, self.arguments = student, ForwardArguments(student, [])
        self.models = (student, teacher)  # a tuple registers no module, so that nobody trains or moves the teacher

    def train(self, mode: bool = True) -> _Pair:
        """Stay in evaluation mode: the teacher has no dropout either."""
        return super().train(False)

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Return the loss of a batch of token ids."""
        given, (student, teacher) = self.arguments.of(batch), self.models
        with torch.no_grad():
            wanted = _hidden_states(teacher, given)
        found = _hidden_states(student, given)
        mask = given.get("attention_mask")
        shares = [_share(one, other, mask) for one, other in zip(found, wanted, strict=True)]
        return {"loss": torch.stack(shares).mean()}


def _hidden_states(model: PreTrainedModel, given: Mapping[str, Any]) -> list[Tensor]:
    """Return the hidden states of every layer, the embeddings first, of an encoder and of a decoder where there are."""
    outputs = model(**given, output_hidden_states=True)
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    found = [state for name in names for state in getattr(outputs, name, None) or ()]
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__} returns no hidden states to distil")
    return found


def _share(found: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean squared difference, as a share of the variance of what is wanted, over tokens not padded."""
    if mask is not None and mask.shape == wanted.shape[:2]:
        found, wanted = found[mask.bool()], wanted[mask.bool()]
    wanted = wanted.float()
    return (found.float() - wanted).pow(2).mean() / wanted.var().clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def _check_same_shapes(pair: _Pair, batch: Mapping[str, Any]) -> None:
    shapes = []
    for model in pair.models:
        with evaluation_mode(model):
            shapes.append([tuple(state.shape) for state in _hidden_states(model, pair.arguments.of(batch))])
    if shapes[0] != shapes[1]:
        widths = [f"{len(one)} hidden states {one[-1][-1]} wide" for one in shapes]
        raise InvalidInputError(
            f"`teacher` must be the model before pruning, got {widths[1]} where the pruned model has {widths[0]}"
        )


@torch.no_grad()
def _relational_kl(pair: _Pair, batches: Sequence[Mapping[str, Any]], is_pair: bool) -> float:
    """Return the mean over batches of KL(teacher ‖ student) between the relations of their texts."""
    values = []
    for batch in batches:
        given = pair.arguments.of(batch)
        student, teacher = (gated_representations(model, given, {}, is_pair) for model in pair.models)
        values.append(float(relational_kl(teacher, student)))
    return statistics.fmean(values)


@contextmanager
def _changing(student: PreTrainedModel) -> Iterator[list[nn.Parameter]]:
    """Let gradients reach the parameters that ask for them, but for input embeddings, and yield these."""
    table = student.get_input_embeddings()
    fixed = [p for p in (table.parameters() if isinstance(table, nn.Module) else ()) if p.requires_grad]
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


@contextmanager
def _on(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Lend a model to a device, in evaluation mode."""
    before = device_of(model)
    try:
        with evaluation_mode(model):
            yield model.to(device)
    finally:
        model.to(before)
