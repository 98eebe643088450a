"""What the contract of scorers is asked of: options, models and inputs for each, and all that it may not change."""

import copy
import random

import numpy as np
import torch

from secateur.models.inputs import example_inputs
from secateur.pruners.map_network import MetaPruner
from secateur.scorers import scorer_class
from tests.support.tiny import tiny_classifier, tiny_model


def _pruner():
    """A network with weights large enough to tell maps apart; the paper's start cannot."""
    pruner = MetaPruner().eval()
    for parameter in pruner.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return {"pruner": pruner}


OPTIONS = {"smp": _pruner}


def options(name):
    torch.manual_seed(0)
    return OPTIONS.get(name, dict)()


def model_for(name, kind):
    return tiny_classifier(kind) if scorer_class(name).needs_labels else tiny_model(kind)


def inputs_of(model, texts=4):
    made = [example_inputs(model, batch=texts, length=10), example_inputs(model, batch=3, length=7)]
    if model.config.model_type == "bart":
        for batch in made:
            batch["input_ids"][:, -1] = model.config.eos_token_id  # where it classifies
            batch["attention_mask"][:, -1] = 1
    return made


LABELS = [0, 1, 2, 1, 0, 2, 1]


def condition(model):
    """All of a model that a scorer could leave changed."""
    return (
        {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()},
        {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        copy.deepcopy(model.config.to_dict()),
        {name: m.config._attn_implementation for name, m in model.named_modules() if hasattr(m, "config")},
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
    )
