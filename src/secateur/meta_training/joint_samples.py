"""The samples of a joint training: one of each model and task at a time, in a folder.

Each sample's draws come from (seed, number of the model, of the task, and of the sample), so a run may be stopped at
any time, and any number of processes collect the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from secateur.choosing.mask_loss import MaskLoss
from secateur.errors import InvalidInputError
from secateur.meta_training.collecting import TrialConfig, collect
from secateur.meta_training.joint_config import JointTrainingConfig
from secateur.meta_training.sample import Sample
from secateur.meta_training.subjects import Subject
from secateur.models.state import evaluation_mode
from secateur.pruners.joint_network import JointPruner
from secateur.sites.attention import find_sites
from secateur.support.randomness import generator
from secateur.texts.batches import Batch
from secateur.texts.data import Task
from secateur.units.masks import PresentMask

_ALIKE = 1e-3  # losses beside one mask's are around 1


@dataclass(frozen=True)
class SampleFolder:
    """The samples of some models and tasks, in files `MODEL-TASK-NUMBER.safetensors` of one folder."""

    folder: Path
    subjects: Sequence[Subject]
    tasks: Sequence[Task]
    config: JointTrainingConfig
    trials: TrialConfig

    @property
    def num_there(self) -> int:
        """Samples that were collected."""
        return len(list(self.folder.glob("*.safetensors")))

    @property
    def num_wanted(self) -> int:
        """Samples that there will be."""
        return self.config.samples * len(self.subjects) * len(self.tasks)

    def collected(
        self, number: int, earlier: JointPruner | None, accelerator: Accelerator, progress: bool
    ) -> list[Sample]:
        """Return the samples of one number of every model and task, after collecting those that are not there.

        `earlier` is a pruner fitted on those of lower numbers. Each process collects a share.
        """
        cells = {
            self.folder / f"{i}-{j}-{number}.safetensors": (i, j)
            for i, j in product(range(len(self.subjects)), range(len(self.tasks)))
        }
        mine = list(cells.items())[accelerator.process_index :: accelerator.num_processes]
        missing = [(path, i, j) for path, (i, j) in mine if not path.is_file()]
        counts = [self.config.evaluation_batches_of(task) for task in self.tasks]
        total = sum(self.trials.passes(counts[j], earlier is not None) for _, _, j in missing)
        name = f"sample {number + 1} of {self.config.samples}"
        with tqdm(total=total, desc=name, unit="mask", disable=not (progress and accelerator.is_main_process)) as bar:
            for i, of_model in groupby(missing, key=lambda item: item[1]):
                model = self.subjects[i].model
                with evaluation_mode(model):
                    evaluated = deepcopy(model).to(torch.bfloat16) if self.config.bf16 else model
                    for path, _, j in of_model:
                        seed = generator(self.config.seed, i, j, number).initial_seed()
                        self._collect(self.subjects[i], evaluated, self.tasks[j], seed, earlier, bar).save(path)
        accelerator.wait_for_everyone()
        return [Sample.load(path) for path in cells]

    def _collect(
        self,
        subject: Subject,
        evaluated: PreTrainedModel,
        task: Task,
        seed: int,
        earlier: JointPruner | None,
        bar: Any,
    ) -> Sample:
        """Collect one sample; `evaluated` is the model that masks are evaluated on, one batch at a time."""
        scored, size, length = self.config.num_texts, self.config.batch_size, self.config.max_length
        texts = task.head(scored + self.config.evaluation_batches_of(task) * size, seed).texts
        batches = subject.batches(texts[:scored], size, length)
        held_out = subject.batches(texts[scored:], size, length)
        sample = collect(
            subject.model,
            find_sites(subject.model),
            batches,
            [CountedMaskLoss(evaluated, [batch], task.is_pair, bar) for batch in held_out],
            task.is_pair,
            subject=subject.model.name_or_path,
            task=task.name,
            config=self.trials,
            seed=seed,
            pruner=earlier,
        )
        if all(float(sample.losses[sample.trial_sets == one].std()) < _ALIKE for one in sample.trial_sets.unique()):
            raise InvalidInputError(
                f"masks all cost the same on the texts of task {task.name}, so there is nothing to learn; give texts "
                "that differ from each other"
            )
        return sample


class CountedMaskLoss(MaskLoss):
    """A mask loss that moves a progress bar by one for each mask."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], is_pair: bool, bar: Any) -> None:
        super().__init__(model, batches, is_pair)
        self.bar = bar

    def __call__(self, mask: PresentMask) -> float:
        """Return the loss."""
        self.bar.update()
        return super().__call__(mask)
