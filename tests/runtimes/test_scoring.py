"""Metrics: values, intervals, and one clear error for each thing that a metric can return wrongly."""

import math
import time

import numpy as np
import pytest

from whet.data import Batches
from whet.errors import DataError, MetricError
from whet.numerics.metrics import ACCURACY, MEAN_SQUARED_ERROR
from whet.numerics.statistics import wilson
from whet.runtimes.scoring import score
from whet.specs import Metric

RNG = np.random.default_rng(0)
OUTPUTS = RNG.normal(size=(200, 5))
TARGETS = RNG.integers(0, 5, 200)
DATA = Batches((np.zeros((200, 3), np.float32), TARGETS), "val", batch=64)


def mean_hit(outputs, targets):
    return float((outputs.argmax(1) == targets).mean())


def test_hits_and_misses_have_wilsons_interval():
    made = score(OUTPUTS, DATA, ACCURACY)
    hits = (OUTPUTS.argmax(1) == TARGETS).sum()
    assert made.record["value"] == hits / 200
    assert made.record["ci95"] == list(wilson(int(hits), 200))
    assert (made.record["name"], made.record["n"], made.record["higher_is_better"]) == ("accuracy", 200, True)
    assert made.scores.shape == (200,) and "reason" not in made.record


def test_other_scores_have_a_bootstrap_interval_about_the_textbooks_width():
    errors = RNG.normal(3, 1, 200) ** 2
    made = score(OUTPUTS, DATA, Metric(lambda o, t: errors, name="error", higher_is_better=False))
    low, high = made.record["ci95"]
    half = 1.96 * errors.std(ddof=1) / math.sqrt(200)
    assert low < errors.mean() < high and (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert made.record["higher_is_better"] is False


def test_a_metric_of_the_whole_is_resampled_over_examples():
    made = score(OUTPUTS, DATA, Metric(mean_hit, per_example=False))
    assert made.record["value"] == mean_hit(OUTPUTS, TARGETS) and made.scores is None
    low, high = made.record["ci95"]
    exact = wilson(round(made.value * 200), 200)
    assert low == pytest.approx(exact[0], abs=0.02) and high == pytest.approx(exact[1], abs=0.02)
    again = score(OUTPUTS, DATA, Metric(mean_hit, per_example=False))
    np.testing.assert_array_equal(made.resampled, again.resampled)


def test_a_slow_metric_of_the_whole_has_no_interval_and_says_why(monkeypatch):
    monkeypatch.setattr("whet.runtimes.scoring.RESAMPLE_SECONDS", 0.5)

    def slow(outputs, targets):
        time.sleep(0.01)
        return 0.5

    made = score(OUTPUTS, DATA, Metric(slow, per_example=False))
    assert made.record["ci95"] is None and "too long" in made.record["reason"]


def test_a_metric_with_no_value_on_resamples_has_no_interval():
    calls = []

    def only_once(outputs, targets):
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("one class only")
        return 0.5

    made = score(OUTPUTS, DATA, Metric(only_once, per_example=False))
    assert made.record["ci95"] is None and "resamples" in made.record["reason"]


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (lambda o, t: np.full(200, np.nan), "returned nan for example 0 \\(200 of 200"),
        (lambda o, t: np.where(np.arange(200) == 7, np.inf, 0), "inf for example 7"),
        (lambda o, t: 0.9, "shape \\(200,\\); got shape \\(\\).*per_example=False"),
        (lambda o, t: np.zeros(199), "got shape \\(199,\\)"),
        (lambda o, t: np.zeros((200, 5)), "got shape \\(200, 5\\)"),
        (lambda o, t: "good", "must return numbers, got str"),
        (lambda o, t: None, "must return numbers, got NoneType"),
        (lambda o, t: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_what_a_metric_returns_wrongly_is_named(fn, says):
    with pytest.raises(MetricError, match=f"'mine'.*{says}"):
        score(OUTPUTS, DATA, Metric(fn, name="mine"))


@pytest.mark.parametrize(("value", "says"), [(math.nan, "returned nan"), (np.zeros(3), "one number"), ("x", "numbers")])
def test_what_a_metric_of_the_whole_returns_wrongly_is_named(value, says):
    with pytest.raises(MetricError, match=f"'mine'.*{says}"):
        score(OUTPUTS, DATA, Metric(lambda o, t: value, name="mine", per_example=False))


def test_unlabelled_data_is_refused():
    with pytest.raises(DataError, match=r"labelled.*val"):
        score(OUTPUTS, Batches(np.zeros((200, 3), np.float32), "val"), ACCURACY)


def test_one_example_has_no_bootstrap_interval():
    data = Batches((np.zeros((1, 3), np.float32), np.array([0.5], np.float32)), "val")
    made = score(np.array([[0.2]]), data, MEAN_SQUARED_ERROR)
    assert made.record["value"] == pytest.approx(0.09) and made.record["ci95"] is None and made.record["reason"]


def test_structures_of_outputs_and_torch_scores():
    import torch

    def fn(outputs, targets):
        return torch.tensor(outputs["logits"][:, 0] > 0, requires_grad=False)

    made = score({"logits": OUTPUTS, "hidden": OUTPUTS}, DATA, Metric(fn))
    assert made.record["value"] == (OUTPUTS[:, 0] > 0).mean()
    whole = score({"logits": OUTPUTS}, DATA, Metric(lambda o, t: float(o["logits"].mean()), name="mean", per_example=False))
    assert whole.record["ci95"] is not None
