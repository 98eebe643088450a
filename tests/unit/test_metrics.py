"""Metrics of predictions, against examples worked out by hand."""

import math

import pytest

from secateur.errors import InvalidInputError
from secateur.finetuning.evaluate import (
    classification_metrics,
    constant_metric,
    main_metric,
    regression_metrics,
)
from secateur.texts.data import Task


def test_binary_metrics_by_hand():
    # 2 true positives, 1 false positive, 0 false negatives, 1 true negative.
    result = classification_metrics([1, 0, 1, 1], [1, 0, 0, 1])
    assert result == pytest.approx({"accuracy": 0.75, "f1": 0.8, "matthews": 2 / math.sqrt(12)})
    assert all(type(value) is float for value in result.values())


def test_three_classes_by_hand():
    # F1 by class: 1, 0 and 0.8.
    result = classification_metrics([0, 2, 2, 2], [0, 1, 2, 2])
    assert result == pytest.approx({"accuracy": 0.75, "f1_macro": 0.6})


def test_the_labels_alone_decide_which_metrics_there_are():
    # A model with three outputs on a task with two classes: 1 true positive, 0 false positives, 1 false negative.
    result = classification_metrics([1, 2, 0], [1, 1, 0])
    assert result["f1"] == pytest.approx(2 / 3)
    assert set(result) == {"accuracy", "f1", "matthews"}


def test_regression_metrics_by_hand():
    # Deviations -3, -2, -1, 6 and -1.5, -0.5, 0.5, 1.5: 14 / sqrt(50 * 5).
    result = regression_metrics([1, 2, 3, 10], [1, 2, 3, 4])
    assert result == pytest.approx({"pearson": 14 / math.sqrt(250), "spearman": 1.0})
    assert regression_metrics([3, 2, 1], [1, 2, 3]) == pytest.approx({"pearson": -1.0, "spearman": -1.0})


@pytest.mark.filterwarnings("error")
def test_constant_values_give_zero_and_no_warning():
    zero = {"pearson": 0.0, "spearman": 0.0}
    assert regression_metrics([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == zero
    assert regression_metrics([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == zero
    assert regression_metrics([1.0], [2.0]) == zero
    nearly = regression_metrics([1.0, 1.0 + 1e-15, 1.0], [1.0, 2.0, 3.0])
    assert all(math.isfinite(value) for value in nearly.values())
    assert classification_metrics([0, 0, 0], [0, 1, 0]) == pytest.approx(
        {"accuracy": 2 / 3, "f1": 0.0, "matthews": 0.0}
    )
    assert classification_metrics([0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0, "matthews": 0.0}
    assert classification_metrics([0, 0], [1, 2]) == {"accuracy": 0.0, "f1_macro": 0.0}


def test_metrics_refuse_what_does_not_match():
    for metrics in (classification_metrics, regression_metrics):
        with pytest.raises(InvalidInputError, match="`predicted` must hold one number for each of the 3 labels"):
            metrics([1, 0], [1, 0, 1])
        with pytest.raises(InvalidInputError, match="`predicted` must hold one number for each of the 0 labels"):
            metrics([], [])
    with pytest.raises(InvalidInputError, match="`predicted` must be finite, got nan"):
        regression_metrics([1.0, float("nan")], [1.0, 2.0])


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("cola", [0, 1], "matthews"),
        ("CoLA", [0, 1], "matthews"),
        ("mrpc", [0, 1], "f1"),
        ("qqp", [0, 1], "f1"),
        ("sst2", [0, 1], "accuracy"),
        ("mnli", [0, 1, 2], "accuracy"),
        ("STS-B", [0.5, 1.0], "spearman"),
        ("owner/name", [0.5, 1.0], "spearman"),
        ("cola", [0, 1, 2], "accuracy"),
        ("mrpc", [0.5, 1.0], "spearman"),
        ("stsb", [0, 1], "accuracy"),
    ],
)
def test_main_metric_is_one_that_the_task_has(name, labels, expected):
    assert main_metric(Task(name, ["x"] * len(labels), labels)) == expected
    metrics = regression_metrics if isinstance(labels[0], float) else classification_metrics
    assert expected in metrics(labels, labels)


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("sst2", [0, 1, 1, 1], 0.75),
        ("mnli", [0, 1, 2, 2], 0.5),
        ("mrpc", [0, 0, 0, 1], 0.4),  # always 1: precision 1/4, recall 1; always 0 has an F1 of 0
        ("cola", [0, 1, 1, 1], 0.0),
        ("stsb", [0.5, 1.0, 1.0], 0.0),
    ],
)
def test_the_best_constant_answer_by_hand(name, labels, expected):
    assert constant_metric(Task(name, ["x"] * len(labels), labels)) == pytest.approx(expected)
