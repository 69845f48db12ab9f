"""The default metrics, and what they refuse instead of misreading it."""

from __future__ import annotations

import numpy as np
import pytest

from whet.errors import MetricError
from whet.numerics.metrics import ACCURACY, MEAN_SQUARED_ERROR, accuracy, default_metric, mean_squared_error


def test_accuracy_is_one_score_per_example() -> None:
    outputs = np.asarray([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5]])
    np.testing.assert_array_equal(accuracy(outputs, np.asarray([1, 1, 0])), [1, 0, 1])
    np.testing.assert_array_equal(accuracy(outputs, np.asarray([[1], [1], [0]])), [1, 0, 1])  # a column of targets


def test_accuracy_of_every_position_is_averaged_per_example() -> None:
    outputs = np.eye(3)[np.asarray([[0, 1], [2, 2]])]
    np.testing.assert_array_equal(accuracy(outputs, np.asarray([[0, 0], [2, 2]])), [0.5, 1.0])


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (np.zeros((4, 3)), np.zeros(5, int)),
        (np.zeros((4, 1)), np.zeros(4, int)),  # argmax of one column is always 0
        (np.zeros(4), np.zeros(4, int)),
        (np.zeros((4, 3)), np.zeros((4, 3), int)),  # one-hot
        (np.zeros((4, 3)), None),
    ],
)
def test_accuracy_refuses_what_it_would_misread(outputs, targets) -> None:
    with pytest.raises(MetricError, match="accuracy"):
        accuracy(outputs, targets)


def test_of_several_outputs_the_logits_are_read_else_the_first() -> None:
    logits, other = np.eye(3), np.zeros((3, 2))
    for outputs in ({"a": other, "logits": logits}, (logits, other), {"z": logits, "a": other}):
        np.testing.assert_array_equal(accuracy(outputs, np.asarray([0, 1, 0])), [1, 1, 0])


def test_mean_squared_error() -> None:
    np.testing.assert_allclose(
        mean_squared_error(np.asarray([[1.0, 3.0], [0.0, 0.0]]), np.asarray([[0.0, 0.0], [0.0, 2.0]])), [5, 2]
    )
    np.testing.assert_allclose(mean_squared_error(np.asarray([[1.0], [3.0]]), np.asarray([0.0, 0.0])), [1, 9])
    for shape in ((3, 2), (2, 4)):
        with pytest.raises(MetricError, match="mean_squared_error"):
            mean_squared_error(np.zeros((2, 3)), np.zeros(shape))


def test_default_metric_follows_the_targets() -> None:
    assert default_metric(np.asarray([1, 2])) is ACCURACY and default_metric(np.asarray([1.0])) is MEAN_SQUARED_ERROR
    assert ACCURACY.higher_is_better and not MEAN_SQUARED_ERROR.higher_is_better
