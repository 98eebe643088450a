"""One step of meta-training: batches are drawn, heads are scored, and the loss gives the pruner its gradient.

Every random draw of a step comes from a generator made of (seed, step, number of the batch in the step). So a run
resumed from a checkpoint takes the identical next step, and any number of processes takes the same steps as one. The
running statistics of BatchNorm, which no step uses, are averaged over the processes and do depend on their number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from secateur.errors import InvalidInputError, SecateurError, invalid
from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.sampling import task_weights
from secateur.meta_training.signals import (
    leave_one_out_estimate,
    random_masks_estimate,
    ranking_loss,
    straight_through_loss,
)
from secateur.meta_training.subjects import Parts, Subject
from secateur.pruners.corners import score_corners
from secateur.pruners.map_network import PAIR, SINGLE, MetaPruner, without_padding
from secateur.relations import by_first_token, represent
from secateur.sites.gating import HeadReading, probe
from secateur.support.randomness import Drawn, generator
from secateur.texts.batches import Batch
from secateur.texts.data import Task
from secateur.texts.tokenization import check_texts

POOL_BYTES = 2**30
"""Memory for the maps of a pool's batches, as the dense model made them; those beyond are made again at each draw."""


class MetaTraining:
    """One run: the pruner, its optimiser, and how many updates it has had."""

    def __init__(
        self, subjects: Sequence[Subject], tasks: Sequence[Task], config: MetaTrainingConfig, accelerator: Accelerator
    ) -> None:
        for task in tasks:
            check_texts(task.texts)
            if len(task) < config.batch_size:
                raise InvalidInputError(
                    f"task {task.name} has {len(task)} texts, fewer than one batch of {config.batch_size}"
                )
        self.subjects, self.tasks, self.config, self.accelerator = subjects, tasks, config, accelerator
        sizes = config.task_sizes or [len(task) for task in tasks]
        if len(sizes) != len(tasks):
            raise invalid("task_sizes", f"hold a size for each of the {len(tasks)} tasks", sizes)
        self.weights = torch.tensor(task_weights(sizes, config.task_power), dtype=torch.float64)
        with Drawn(config.seed):
            self.pruner = MetaPruner(initial_std=config.initial_std).to(accelerator.device)
        kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam
        self.optimizer: torch.optim.Optimizer = kind(self.pruner.parameters(), lr=config.learning_rate)
        self.step = 0
        self._estimates: dict[tuple[int, int, int], dict[str, Tensor]] = {}
        self._seen: dict[tuple[int, int, int], Seen] = {}
        self._room = POOL_BYTES

    def gradients(self, step: int) -> dict[str, list[float]]:
        """Leave the averaged gradient of one step in the pruner, and return each task's losses (this process's).

        The step's batches are shared out among the processes; their sum does not depend on how many there are. Raises
        `SecateurError` for a loss that is not finite.
        """
        self.pruner.train()
        self.pruner.zero_grad()
        losses: dict[str, list[float]] = {}
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for number in range(rank, self.config.batches_per_step, world):
            task, loss = self.loss(step, number)
            if not bool(torch.isfinite(loss)):
                raise SecateurError(f"meta-training: the loss is {float(loss)} at step {step + 1}, task {task.name}")
            (loss / self.config.batches_per_step).backward()
            losses.setdefault(task.name, []).append(float(loss.detach()))
        for parameter in self.pruner.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if world > 1:
                parameter.grad = self.accelerator.reduce(parameter.grad, "sum")
        if world > 1:  # each process has seen other maps: their running statistics are averaged
            for buffer in self.pruner.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.accelerator.reduce(buffer.clone(), "mean"))
        return losses

    def loss(self, step: int, number: int) -> tuple[Task, Tensor]:
        """Return the loss of one batch of one step, and its task (paper, steps 1 to 5)."""
        config = self.config
        random = generator(config.seed, step, number)
        subject_number, task_number, place = self.draw(random)
        subject, task = self.subjects[subject_number], self.tasks[task_number]
        chooser = generator(config.seed, -1 - task_number, place) if config.pool else random
        key = (subject_number, task_number, place)
        seen = self._seen.get(key)
        if seen is None:
            rows = torch.randperm(len(task), generator=chooser)[: config.batch_size].tolist()
            seen = see(subject, [task.texts[i] for i in rows], task.is_pair, config.max_length)
            if place >= 0:
                self._keep(key, seen)
        model, batch, dense = subject.model, seen.batch, seen.dense
        scores = self.scores(seen.maps, task.is_pair)
        if config.signal == "straight_through":
            return task, straight_through_loss(model, batch, dense, scores, task.is_pair, config, random)
        if key not in self._estimates or place < 0:
            if config.signal == "leave_one_out":
                targets = leave_one_out_estimate(model, batch, dense, subject.heads, task.is_pair)
            else:
                targets = random_masks_estimate(model, batch, dense, subject.heads, task.is_pair, config, chooser)
            self._estimates[key] = targets
        return task, ranking_loss(scores, self._estimates[key])

    def _keep(self, key: tuple[int, int, int], seen: Seen) -> None:
        """Keep what a batch of the pool shows, as long as there is room."""
        if self._room >= seen.nbytes:
            self._room -= seen.nbytes
            self._seen[key] = seen

    def draw(self, random: torch.Generator) -> tuple[int, int, int]:
        """Return the numbers of a model, of a task (paper, step 1) and, with a pool, of one of its batches, else -1."""
        subject = int(torch.randint(len(self.subjects), (1,), generator=random))
        task = int(torch.multinomial(self.weights, 1, generator=random))
        place = int(torch.randint(self.config.pool, (1,), generator=random)) if self.config.pool else -1
        return subject, task, place

    def scores(self, maps: Mapping[str, Sequence[Tensor]], is_pair: bool) -> dict[str, Tensor]:
        """Score all sites' maps, lists of `[texts, heads, rows, columns]`; return `[heads]` a site, means over texts.

        All in one pass, since BatchNorm in train mode sees all maps of a batch together, as in the authors' code.
        """
        listed = [(site, part) for site, parts in maps.items() for part in parts]
        of_size: dict[torch.Size, list[int]] = defaultdict(list)
        for number, (_, part) in enumerate(listed):
            of_size[part.shape[2:]].append(number)
        sets = [torch.cat([listed[i][1].flatten(0, 1) for i in numbers]) for numbers in of_size.values()]
        sums: dict[str, Tensor | float] = dict.fromkeys(maps, 0.0)
        for numbers, scores in zip(of_size.values(), score_corners(self.pruner.main, sets), strict=True):
            parts = [listed[i][1] for i in numbers]
            rows = scores[:, PAIR if is_pair else SINGLE].split([len(p) * p.shape[1] for p in parts])
            for number, part, row in zip(numbers, parts, rows, strict=True):
                sums[listed[number][0]] += row.view(part.shape[:2]).sum(dim=0)
        return {site: torch.as_tensor(sums[site]) / sum(map(len, parts)) for site, parts in maps.items()}


@dataclass(frozen=True, eq=False)
class Seen:
    """What the dense model shows of a batch: each site's maps, `[texts, heads, rows, columns]` a part, without padding.

    A site that layers share has maps of each, part after part. `dense` are the representations `[texts, width]`.
    """

    batch: Parts
    maps: dict[str, list[Tensor]]
    dense: Tensor

    @property
    def nbytes(self) -> int:
        """The memory of the maps, which the rest is small beside."""
        return sum(part.nbytes for parts in self.maps.values() for part in parts)


@torch.no_grad()
def see(subject: Subject, texts: Sequence[Any], is_pair: bool, max_length: int) -> Seen:
    """Run the dense model on one batch of texts (paper, step 2)."""
    model, batch = subject.model, subject.parts(texts, max_length)
    maps: dict[str, list[Tensor]] = defaultdict(list)
    first_token, dense = by_first_token(model, is_pair), []
    for part in batch.batches:

        def keep(reading: HeadReading, part: Batch = part) -> None:
            assert reading.weights is not None  # asked for below
            maps[reading.site].append(without_padding(reading.weights.float(), part.get("attention_mask")))

        with probe(model, keep, weights=True):
            dense.append(represent(model, model(**part), part, first_token))
    return Seen(batch, dict(maps), batch.joined(dense))
