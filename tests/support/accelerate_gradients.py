"""The gradient of one meta-training step; as a module, run with FOLDER SIGNAL ..., it writes a file for each signal."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.meta_step import MetaTraining
from secateur.meta_training.subjects import Subject
from secateur.texts.data import Task
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer


def gradients(accelerator: Accelerator, signal: str) -> dict[str, torch.Tensor]:
    tasks = [Task("singles", tiny_texts(20)), Task("pairs", tiny_texts(20, seed=1, pairs=True))]
    config = MetaTrainingConfig(batch_size=4, batches_per_step=4, signal=signal)
    training = MetaTraining([Subject(tiny_model("bert"), tiny_tokenizer())], tasks, config, accelerator)
    training.gradients(0)
    return {n: p.grad.contiguous() for n, p in training.pruner.named_parameters()}


def main(folder: str, *signals: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    for signal in signals:
        found = gradients(accelerator, signal)
        if accelerator.is_main_process:
            file = Path(folder, f"{signal}.safetensors")
            save_file(found, file, metadata={"processes": str(accelerator.num_processes)})
    accelerator.wait_for_everyone()
    accelerator.end_training()  # a process that just leaves can make the other abort


if __name__ == "__main__":
    main(*sys.argv[1:])
