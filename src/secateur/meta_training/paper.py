"""Meta-training: a frozen model, several tasks' unlabelled texts, and a pruner that learns to keep their relations.

Every random draw of a step comes from a generator made of (seed, step, number of the batch in the step). So a run
resumed from a checkpoint takes the identical next step, and any number of processes takes the same steps as one. The
running statistics of BatchNorm, which no step uses, are averaged over the processes and do depend on their number.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from secateur.errors import InvalidInputError, SecateurError, invalid
from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.runs import Log, held_run, latest_checkpoint, load_checkpoint, save_checkpoint
from secateur.meta_training.sampling import task_weights
from secateur.meta_training.signals import (
    leave_one_out_estimate,
    random_masks_estimate,
    ranking_loss,
    straight_through_loss,
)
from secateur.meta_training.subjects import Batch, Subject, check_subjects, check_tasks
from secateur.models.state import evaluation_mode
from secateur.pruners.map_network import PAIR, SINGLE, MetaPruner, to_network_size
from secateur.relations import RELATED, by_first_token, gated_representations, relational_kl, represent
from secateur.sites.gating import HeadReading, probe
from secateur.support.checks import check_accelerator, check_flag, check_path, check_positive
from secateur.support.files import is_taken, replaced_folder
from secateur.support.randomness import generator
from secateur.texts.data import Task
from secateur.texts.tokenization import check_texts
from secateur.units.masks import PresentMask
from secateur.units.scores import PresentScores
from secateur.units.select import select


@dataclass(frozen=True)
class HeldOut:
    """Texts of a task that no step sees: the first `calibration` are scored, the next `judged` judge the mask."""

    task: Task
    calibration: int = 32
    judged: int = 96

    def __post_init__(self) -> None:
        fewest = self.calibration + RELATED
        if len(self.task) < fewest:
            raise InvalidInputError(f"held-out task {self.task.name} has {len(self.task)} texts, fewer than {fewest}")


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
        self.weights = torch.tensor(task_weights([len(t) for t in tasks], config.task_power), dtype=torch.float64)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.pruner = MetaPruner(initial_std=config.initial_std).to(accelerator.device)
        kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adam
        self.optimizer: torch.optim.Optimizer = kind(self.pruner.parameters(), lr=config.learning_rate)
        self.step = 0
        self._estimates: dict[tuple[int, int, int], dict[str, Tensor]] = {}

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
        rows = torch.randperm(len(task), generator=chooser)[: config.batch_size].tolist()
        batch = subject.batch([task.texts[i] for i in rows], config.max_length)

        read: dict[str, list[Tensor]] = defaultdict(list)  # a site that layers share is read once for each
        first_token = by_first_token(subject.model, task.is_pair)

        def keep(reading: HeadReading) -> None:
            assert reading.weights is not None  # asked for below
            read[reading.site].append(to_network_size(reading.weights.float(), batch.get("attention_mask")))

        with torch.no_grad(), probe(subject.model, keep, weights=True):
            dense = represent(subject.model, subject.model(**batch), batch, first_token)
        maps = {site: torch.cat(parts) for site, parts in read.items()}
        scores = self.scores(maps, task.is_pair)
        if config.signal == "straight_through":
            return task, straight_through_loss(subject.model, batch, dense, scores, task.is_pair, config, random)
        key = (subject_number, task_number, place)
        if key not in self._estimates or place < 0:
            if config.signal == "leave_one_out":
                found = leave_one_out_estimate(subject.model, batch, dense, subject.heads, task.is_pair)
            else:
                found = random_masks_estimate(subject.model, batch, dense, subject.heads, task.is_pair, config, chooser)
            self._estimates[key] = found
        return task, ranking_loss(scores, self._estimates[key])

    def draw(self, random: torch.Generator) -> tuple[int, int, int]:
        """Return the numbers of a model, of a task (paper, step 1) and, with a pool, of one of its batches, else -1."""
        subject = int(torch.randint(len(self.subjects), (1,), generator=random))
        task = int(torch.multinomial(self.weights, 1, generator=random))
        place = int(torch.randint(self.config.pool, (1,), generator=random)) if self.config.pool else -1
        return subject, task, place

    def scores(self, maps: Mapping[str, Tensor], is_pair: bool) -> dict[str, Tensor]:
        """Score all sites' maps `[texts, heads, 128, 128]` in one pass; return `[heads]` a site, the mean over texts.

        One pass, since BatchNorm in train mode sees all maps of a batch together, as in the authors' code.
        """
        flat = self.pruner(torch.cat([m.flatten(0, 1) for m in maps.values()]))[:, PAIR if is_pair else SINGLE]
        parts = flat.split([m.shape[0] * m.shape[1] for m in maps.values()])
        return {site: part.view(m.shape[:2]).mean(dim=0) for (site, m), part in zip(maps.items(), parts, strict=True)}

    @torch.no_grad()
    def judge(self, parts: Sequence[HeldOut]) -> dict[str, float]:
        """Return, for each held-out task, the relational KL of the deterministic top-k mask on the first model."""
        subject = self.subjects[0]
        found = {}
        with evaluation_mode(self.pruner):
            for part in parts:
                texts, is_pair = part.task.texts, part.task.is_pair
                sums = {site: torch.zeros(heads, dtype=torch.float64) for site, heads in subject.heads.items()}
                for batch in subject.batches(texts[: part.calibration], 16, self.config.max_length):
                    self._add_scores(subject, batch, is_pair, sums)
                mask = select(PresentScores(sums), self.config.pruning_ratio)
                rest = texts[part.calibration : part.calibration + part.judged]
                found[part.task.name] = mask_kl(
                    subject.model, mask, subject.batches(rest, 32, self.config.max_length), is_pair
                )
        return found

    def _add_scores(self, subject: Subject, batch: Batch, is_pair: bool, sums: dict[str, Tensor]) -> None:
        def add(reading: HeadReading) -> None:
            assert reading.weights is not None  # asked for below
            rows = self.pruner.score_maps(reading.weights.float(), batch.get("attention_mask"), is_pair)
            sums[reading.site] += rows.sum(dim=0).double().cpu()

        with probe(subject.model, add, weights=True):
            subject.model(**batch)

    def run(
        self, out: Path, held_out: Sequence[HeldOut] = (), progress: bool = True, stop_after: float | None = None
    ) -> MetaPruner:
        """Train until `config.steps` (paper, step 6); see `train_meta_pruner` for what `out` gets."""
        main = self.accelerator.is_main_process
        self.accelerator.init_trackers("meta-training")
        start = time.perf_counter()
        log = Log(out / "log.jsonl", self.step) if main else None
        if log is not None and held_out and self.step == 0:
            log.write({"step": 0, "held_out": self.judge(held_out)})
        bar = tqdm(total=self.config.steps, initial=self.step, desc="meta-training", disable=not (progress and main))
        overdue = False
        while self.step < self.config.steps and not overdue:
            try:
                losses = self.gradients(self.step)
            except SecateurError as error:
                last = latest_checkpoint(out)
                raise SecateurError(f"{error}; the last good checkpoint is {last or 'none'}") from None
            norm = float(nn.utils.clip_grad_norm_(self.pruner.parameters(), self.config.clip))
            self.optimizer.step()
            self.step += 1
            overdue = stop_after is not None and time.perf_counter() - start > stop_after
            ends = overdue or self.step == self.config.steps
            if log is not None:
                means = {task: sum(row) / len(row) for task, row in sorted(losses.items())}
                log.write({"step": self.step, "losses": means, "gradient_norm": norm})
                self.accelerator.log({f"loss/{k}": v for k, v in means.items()} | {"gradient_norm": norm}, self.step)
                bar.set_postfix({k: f"{v:.3f}" for k, v in means.items()}, refresh=False)
                if held_out and (ends or self.step % self.config.evaluate_every == 0):
                    found = self.judge(held_out)
                    log.write({"step": self.step, "held_out": found})
                    self.accelerator.log({f"held_out/{k}": v for k, v in found.items()}, self.step)
                if ends or self.step % self.config.checkpoint_every == 0:
                    save_checkpoint(out, self.step, self.pruner, self.optimizer, self.config)
            bar.update()
        bar.close()
        self.accelerator.wait_for_everyone()  # others must not leave while the main process is still writing
        self.accelerator.end_training()
        self.pruner.eval()
        if main and self.step >= self.config.steps:
            with replaced_folder(out / "pruner") as folder:
                self.pruner.save_pretrained(folder)
        return self.pruner


def train_meta_pruner(
    subjects: Sequence[Subject],
    tasks: Sequence[Task],
    out: str | Path,
    config: MetaTrainingConfig | None = None,
    *,
    held_out: Sequence[HeldOut] = (),
    resume: bool = False,
    progress: bool = True,
    stop_after: float | None = None,
    accelerator: Accelerator | None = None,
) -> MetaPruner:
    """Train a meta-pruner on one or more frozen models and one or more tasks (paper, steps 1 to 6).

    Only the pruner's weights change. `out` gets `log.jsonl` (losses by task at every step; on `held_out` texts the
    relational KL of the deterministic mask), checkpoints, and at the end `pruner/`. With `resume` the newest checkpoint
    there is continued, to the identical next step; without it `out` must be new or empty. `stop_after` seconds the run
    stops at a checkpoint.

    Raises `InvalidInputError` for settings and tasks that cannot be trained on, `CheckpointError` for a checkpoint that
    does not fit, `SecateurError` for a loss that is not finite.
    """
    config = MetaTrainingConfig() if config is None else config
    check_subjects(subjects)
    check_tasks(tasks)
    if not isinstance(config, MetaTrainingConfig):
        raise invalid("config", "be a MetaTrainingConfig", config)
    if not isinstance(held_out, list | tuple) or not all(isinstance(part, HeldOut) for part in held_out):
        raise invalid("held_out", "be a list of HeldOut", held_out)
    check_flag("resume", resume)
    check_flag("progress", progress)
    if stop_after is not None:
        check_positive("stop_after", stop_after)
    check_accelerator(accelerator)
    out, accelerator = check_path("out", out), accelerator or Accelerator()
    if is_taken(out) and not resume and accelerator.is_main_process:
        raise invalid("out", "be a new or empty folder", str(out), "resume the run that is there, or choose another")
    training = MetaTraining(subjects, tasks, config, accelerator)
    with held_run(out) if accelerator.is_main_process else nullcontext():
        last = latest_checkpoint(out)
        if resume and last is not None:
            training.step = load_checkpoint(last, training.pruner, training.optimizer, config)
        if resume and progress and accelerator.is_main_process:
            where = last or "the start, as there is no checkpoint yet"
            tqdm.write(f"going on from {where}; {config.steps - training.step} steps are left", file=sys.stderr)
        accelerator.wait_for_everyone()  # the main process is about to write where the others have just looked
        return training.run(out, held_out, progress, stop_after)


@torch.no_grad()
def mask_kl(model: PreTrainedModel, mask: PresentMask, made: Sequence[Batch], is_pair: bool) -> float:
    """Return the relational KL between a base model and itself under `mask`, the mean over batches of two or more."""
    gates = {site: row.float() for site, row in mask.items()}
    values = []
    with evaluation_mode(model):
        for batch in made:
            if len(next(iter(batch.values()))) > 1:
                dense = gated_representations(model, batch, {}, is_pair)
                values.append(float(relational_kl(dense, gated_representations(model, batch, gates, is_pair))))
    return sum(values) / len(values)
