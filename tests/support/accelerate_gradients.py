"""Run under `accelerate launch`: write the gradient of one meta-training step to the file named in the arguments."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from secateur.data import Task
from secateur.meta.config import MetaTrainingConfig
from secateur.meta.subjects import Subject
from secateur.meta.training import MetaTraining
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer


def main() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    tasks = [Task("singles", tiny_texts(20)), Task("pairs", tiny_texts(20, seed=1, pairs=True))]
    config = MetaTrainingConfig(batch_size=4, batches_per_step=4, signal=sys.argv[2])
    training = MetaTraining([Subject(tiny_model("bert"), tiny_tokenizer())], tasks, config, accelerator)
    training.gradients(0)
    if accelerator.is_main_process:
        gradients = {n: p.grad.contiguous() for n, p in training.pruner.named_parameters()}
        save_file(gradients, sys.argv[1], metadata={"processes": str(accelerator.num_processes)})
    accelerator.wait_for_everyone()
    accelerator.end_training()  # a process that just leaves can make the other abort


if __name__ == "__main__":
    main()
