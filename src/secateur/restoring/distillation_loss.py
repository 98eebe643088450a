"""How far a pruned model is from the dense one that teaches it: by hidden states, and by logits that were learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import InvalidInputError, UnsupportedModelError
from secateur.models.base_model import base_of
from secateur.models.inputs import ForwardArguments
from secateur.restoring.logits import has_classes, learned_logits, logits_loss, task_pass

STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
Read: TypeAlias = tuple[dict[str, Sequence[Tensor]], Tensor | None]


class Pair(nn.Module):
    """The student, whose loss is how far it is from a teacher that is no part of it.

    Where `by_logits`, both are task models, and their logits count beside the hidden states; else their base models
    are run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        layers: Mapping[str, Sequence[int]],
        by_logits: bool = False,
    ) -> None:
        super().__init__()
        self.layers, self.by_logits = layers, by_logits
        self.bases = (base_of(model), base_of(teacher))
        self.arguments = ForwardArguments(self.bases[0], [])
        self.models = (model, teacher) if by_logits else self.bases  # a tuple registers no module: none trains or moves
        self.student = self.models[0]

    def train(self, mode: bool = True) -> Pair:
        """Stay in evaluation mode: the teacher has no dropout either."""
        return super().train(False)

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Return the loss of a batch of token ids."""
        arguments = self.arguments.of(batch)
        (found, own), (wanted, answers) = self.read(arguments)
        mask = arguments.get("attention_mask")
        shares = [share(one, other, mask) for one, other in self.matched(found, wanted)]
        loss = torch.stack(shares).mean()
        if own is not None and answers is not None:
            loss = loss + logits_loss(own, answers, has_classes(self.models[1], answers))
        return {"loss": loss}

    def read(self, arguments: Mapping[str, Any]) -> tuple[Read, Read]:
        """Return what student and teacher make of a batch: hidden states and, where they count, logits."""
        with torch.no_grad():
            wanted = self._read(self.models[1], arguments)
        return self._read(self.student, arguments), wanted

    def _read(self, model: PreTrainedModel, arguments: Mapping[str, Any]) -> Read:
        if not self.by_logits:
            return hidden_states(model, arguments), None
        outputs, logits = task_pass(model, arguments, output_hidden_states=True)
        return states_of(outputs, type(model).__name__), logits

    def matched(
        self, found: Mapping[str, Sequence[Tensor]], wanted: Mapping[str, Sequence[Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return each hidden state of the student beside the teacher's that it is held against."""
        pairs = []
        for name, states in found.items():
            numbers = self._numbers(name, len(states), len(wanted.get(name, ())))
            pairs += [(state, wanted[name][number]) for state, number in zip(states, numbers, strict=True)]
        return pairs

    def _numbers(self, name: str, own: int, there: int) -> Sequence[int]:
        """Return which of the teacher's hidden states, `there` in number, the student's `own` stand for."""
        if own == there:
            return range(own)
        half = name.removesuffix("hidden_states").rstrip("_")  # encoder, decoder, or nothing
        known = [kept for path, kept in self.layers.items() if half in path and len(kept) == own - 1]
        if not known or known[0][-1] >= there - 1:
            raise InvalidInputError(
                f"`teacher` must be the model before pruning, got {there} hidden states where the pruned model has "
                f"{own}, and which layers went is not known; name those that stay in `layers`"
            )
        return [0, *(number + 1 for number in known[0][:-1]), there - 1]


def hidden_states(model: PreTrainedModel, arguments: Mapping[str, Any]) -> dict[str, Sequence[Tensor]]:
    """Return the hidden states of every layer for a batch. Raises what `states_of` raises."""
    return states_of(model(**arguments, output_hidden_states=True), type(model).__name__)


def states_of(outputs: Any, model: str) -> dict[str, Sequence[Tensor]]:
    """Return the hidden states of every layer, the embeddings first, of an encoder and of a decoder where there are.

    Raises `UnsupportedModelError` where the outputs of the class named `model` have none.
    """
    found = {name: states for name in STATES if (states := getattr(outputs, name, None))}
    if not found:
        raise UnsupportedModelError(f"{model} returns no hidden states to distil")
    return found


def share(found: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean squared difference, as a share of the variance of what is wanted, over tokens not padded."""
    if mask is not None and mask.shape == wanted.shape[:2]:
        found, wanted = found[mask.bool()], wanted[mask.bool()]
    wanted = wanted.float()
    return (found.float() - wanted).pow(2).mean() / wanted.var().clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def taught_by_logits(model: PreTrainedModel, teacher: PreTrainedModel, arguments: Mapping[str, Any]) -> bool:
    """Return whether both are task models of one class with as many outputs, whose heads have learned.

    That they hand on the hidden states of their base too is asked for, so that one pass gives both. See
    `learned_logits`.
    """
    if type(model) is not type(teacher) or teacher is base_of(teacher):
        return False
    answers = [learned_logits(one, arguments) for one in (model, teacher)]
    if any(one is None for one in answers) or answers[0].shape != answers[1].shape:  # type: ignore[union-attr]
        return False
    outputs = task_pass(model, arguments, output_hidden_states=True)[0]
    return any(getattr(outputs, name, None) for name in STATES)
