"""What the criteria share that look at a task's loss: a model with a trained head, and gradients on the gates."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from secateur.errors import InvalidInputError, invalid
from secateur.finetuning.evaluate import check_model_fits, ready_to_evaluate
from secateur.finetuning.finetune import finetune
from secateur.models.classifier import is_classifier, with_new_head
from secateur.models.state import evaluation_mode, random_states_kept
from secateur.scorers.base import Scorer, ScoringTask, Supervision
from secateur.settings import Reading
from secateur.sites.gating import probe
from secateur.support.checks import is_number
from secateur.support.processes import is_shared
from secateur.texts.batches import Batch

WARMUP_EPOCHS = 3.0
"""How long a model without a classification head is fine-tuned before it is scored."""


class LabelledScorer(Scorer):
    """A criterion that needs labels and a classification head that means something.

    A model that comes with a classification head is taken as fine-tuned for the task and used as it is. Any other gets
    a new head, and a copy of it is fine-tuned first, which counts as the cost of scoring. Options:

    - `warmup_epochs`: epochs of that fine-tuning. None = 3 for a model without a head and none for one with a head;
      a number holds for both. It starts from the task's seed, so the same seed gives the same scores.
    - `warmup_learning_rate`: its learning rate.
    """

    needs_labels = True
    needs_gradients = True

    def __init__(self, warmup_epochs: float | None = None, warmup_learning_rate: float = 5e-5) -> None:
        if warmup_epochs is not None and not is_number(warmup_epochs, least=0):
            raise invalid("warmup_epochs", "be None or a number from 0", warmup_epochs)
        if not is_number(warmup_learning_rate, above=0):
            raise invalid("warmup_learning_rate", "be a number above 0", warmup_learning_rate)
        self.warmup_epochs = warmup_epochs
        self.warmup_learning_rate = warmup_learning_rate

    @contextmanager
    def classifier(self, task: ScoringTask, own: bool = False) -> Iterator[PreTrainedModel]:
        """Lend a classification model for the task in eval mode: the caller's, or a copy where `own` or fine-tuned.

        Random states are put back at the end. Raises `InvalidInputError` where the head does not fit the labels, and
        where there is none and no texts to train one on.
        """
        original, labelled = supervision(task).model, supervision(task).task
        has_head = is_classifier(original)
        epochs = self.warmup_epochs if self.warmup_epochs is not None else 0.0 if has_head else WARMUP_EPOCHS
        tokenizer, seed = supervision(task).tokenizer, task.reading.seed % 2**32  # numpy takes no other seeds
        if epochs and tokenizer is None:
            raise InvalidInputError(
                "`inputs` hold no texts to fine-tune a classification head on; give `texts`, or a model that is "
                "fine-tuned already, and leave `warmup_epochs` as it is"
            )
        if (own or epochs) and is_shared(task.reading.accelerator):
            raise InvalidInputError(
                "scorers that train a copy of the model, or its classification head first, cannot share that among "
                "processes; run them in one, or give a model that is fine-tuned already to one that only reads it"
            )
        with random_states_kept():
            set_seed(seed)
            if not has_head:
                model = with_new_head(task.model, labelled.num_labels, labelled.is_regression)
            else:
                check_model_fits(original, labelled)
                model = copy.deepcopy(original).float() if own or epochs else original
            if model is not original:
                model.requires_grad_(True)
            if epochs:
                finetune(
                    model,
                    labelled,
                    tokenizer=tokenizer,
                    epochs=epochs,
                    learning_rate=self.warmup_learning_rate,
                    reading=Reading(
                        batch_size=len(supervision(task).labels[0]),
                        max_length=supervision(task).max_length,
                        seed=seed,
                        device=str(model.device),
                        progress=task.reading.progress,
                    ),
                )
            # Texts need the tokenizer's padding token named; ready inputs need not be texts.
            with evaluation_mode(model) if tokenizer is None else ready_to_evaluate(model, tokenizer):
                yield model


def supervision(task: ScoringTask) -> Supervision:
    """Return the task's labels and model. Raises `InvalidInputError` where it has none."""
    if task.supervision is None:
        raise InvalidInputError("this scorer needs `labels`, one for each text")
    return task.supervision


def num_texts(task: ScoringTask) -> int:
    """Return how many labelled texts there are."""
    return len(supervision(task).task)


def text_losses(model: PreTrainedModel, batch: Batch, labels: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
    """Return each text's loss under gates, `[batch]`: cross-entropy in nats, or the squared error of a regression."""
    with probe(model, gates=gates):
        logits = model(**batch).logits.float()
    if labels.is_floating_point():
        return (logits[:, 0] - labels).square()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def gate_gradients(task: ScoringTask, model: PreTrainedModel) -> Iterable[dict[str, Tensor]]:
    """Return, for each batch, the derivative of every text's loss on every gate at 1: `[batch, heads]` a site."""
    labelled = supervision(task).labels

    def run(number: int) -> dict[str, Tensor]:
        labels = labelled[number]
        gates = {
            name: torch.ones(len(labels), site.num_units, device=model.device, requires_grad=True)
            for name, site in task.sites.items()
        }
        # Texts do not see each other, so the gradient of the sum holds each text's own.
        total = text_losses(model, task.batches[number], labels, gates).sum()
        found = torch.autograd.grad(total, list(gates.values()), allow_unused=True)
        return {
            name: torch.zeros(gate.shape, dtype=torch.float64) if row is None else row.double().cpu()
            for (name, gate), row in zip(gates.items(), found, strict=True)
        }

    return task.share(run, range(len(labelled)))
