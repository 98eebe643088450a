"""A meta-training of a tiny model on made-up tasks."""

from accelerate import Accelerator

from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.meta_step import MetaTraining
from secateur.meta_training.subjects import Subject
from secateur.texts.data import Task
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer

TASKS = [Task("singles", tiny_texts(40)), Task("pairs", tiny_texts(40, seed=1, pairs=True))]


SMALL = {"batch_size": 4, "batches_per_step": 2, "max_length": 16, "evaluate_every": 2, "checkpoint_every": 1}


def subject(kind="bert"):
    return Subject(tiny_model(kind), tiny_tokenizer())


def training(kind="bert", **settings):
    return MetaTraining([subject(kind)], TASKS, MetaTrainingConfig(**{**SMALL, **settings}), Accelerator(cpu=True))
