"""A classification head on a base model, for criteria that look at a task's loss."""

from __future__ import annotations

import copy

from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel

from secateur.errors import UnsupportedModelError

CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")
"""How the names of such classes end."""


def is_classifier(model: PreTrainedModel) -> bool:
    """Return whether `model` has a head that puts whole texts or images into classes, by the name of its class."""
    return any(parent.__name__.endswith(CLASSIFIERS) for parent in type(model).__mro__)


def with_new_head(base: PreTrainedModel, num_labels: int, is_regression: bool) -> PreTrainedModel:
    """Return a classification model around a copy of `base`, with a head drawn from torch's random state.

    The copy is float32, on the device of `base`, in eval mode; attention sites keep their names, and removed heads stay
    removed. Raises `UnsupportedModelError` where transformers has no classification model of this kind.
    """
    config = copy.deepcopy(base.config)
    config.num_labels = num_labels
    config.problem_type = "regression" if is_regression else "single_label_classification"
    for auto in (AutoModelForSequenceClassification, AutoModelForImageClassification):
        if type(config) in auto._model_mapping:
            model = auto.from_config(config).float()
            if type(model.base_model) is type(base):
                # Not strict: the task model may lack a pooler that the base model has, or the other way round.
                model.base_model.load_state_dict(base.state_dict(), strict=False)
                return model.to(base.device).eval()
    raise UnsupportedModelError(
        f"transformers puts no classification head on {type(base).__name__}; give a model that has one"
    )
