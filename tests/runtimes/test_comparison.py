"""Parity, change and the warnings, on numbers worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from whet.data import Batches
from whet.errors import RuntimeFileError
from whet.records import Evidence
from whet.runtimes.comparison import Measured, change, parity, plain_warnings
from whet.runtimes.latency import Timings
from whet.runtimes.scoring import score
from whet.specs import Metric

N = 400
DATA = Batches((np.zeros((N, 1), np.float32), np.arange(N)), "test")


def measured(scores, ms, size, *, higher=True, per_example=True):
    """A measurement whose outputs are its scores."""
    values = np.asarray(scores, float)
    fn = (lambda o, t: o) if per_example else (lambda o, t: float(np.mean(o)))
    metric = Metric(fn, name="m", higher_is_better=higher, per_example=per_example)
    made = score(values, DATA, metric)
    timings = None if ms is None else Timings(np.asarray(ms, float), 1.0)
    latency = None if timings is None else timings.latency(batch=1, threads=1)
    evidence = Evidence("f", size, size // 2, made.record, latency, {}, None, {})
    return Measured(evidence, values, made.scores, timings, made), metric


def test_parity_by_hand():
    reference = np.array([[1.0, 2.0], [4.0, 3.0], [0.0, 1.0], [0.0, 5.0]])
    outputs = reference + np.array([[0.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    found = parity(reference, outputs)
    assert found == {
        "agreement": 0.75,
        "max_error": 2.0,
        "mean_error": 0.25,
        "sqnr_db": pytest.approx(10 * np.log10((1 + 4 + 16 + 9 + 1 + 25) / 4)),
    }


def test_parity_of_structures_and_of_outputs_without_classes():
    reference = {"a": np.array([1.0, 2.0]), "b": (np.eye(2), np.zeros(2, np.int64))}
    outputs = {"a": np.array([1.0, 2.5]), "b": (np.eye(2), np.zeros(2, np.int64))}
    found = parity(reference, outputs)
    assert found["agreement"] == 1.0 and found["max_error"] == 0.5
    plain = parity(np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    assert plain["agreement"] is None and plain["sqnr_db"] is None and plain["max_error"] == 0
    assert "top-1" in plain["reason"] and "infinite" in plain["reason"]
    single = parity(np.array([[1.0], [2.0]]), np.array([[1.0], [2.5]]))
    assert single["agreement"] is None and "top-1" in single["reason"]


def test_parity_refuses_what_cannot_be_compared():
    with pytest.raises(RuntimeFileError, match=r"\(2, 3\).*\(2, 4\)"):
        parity(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(RuntimeFileError, match="nan stands where"):
        parity(np.zeros((2, 3)), np.full((2, 3), np.nan))
    masked = np.array([[1.0, -np.inf], [0.5, -np.inf]])
    assert parity(masked, masked)["max_error"] == 0.0
    with pytest.raises(RuntimeFileError, match="-inf stands where"):
        parity(np.zeros((2, 2)), masked)


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("per_example", [True, False])
def test_a_positive_drop_is_worse_in_both_directions(higher, per_example):
    rng = np.random.default_rng(1)
    base = rng.normal(0.0, 5.0, N)
    worse = base + (-0.3 if higher else 0.3) + rng.normal(0, 0.1, N)
    (old, metric), (new, _) = (measured(s, None, 100, higher=higher, per_example=per_example) for s in (base, worse))
    moved = change(old, new, metric)
    drop = moved["metric_drop"]
    assert drop["value"] == pytest.approx(0.3, abs=0.02)
    low, high = drop["ci95"]
    assert low < drop["value"] < high
    assert high - low < 0.06, "paired: far narrower than two intervals of scores with a deviation of 5"
    assert moved["latency_ratio"] == {"value": None, "ci95": None, "reason": "the files were not timed"}


def test_ratios_are_new_over_old():
    rng = np.random.default_rng(2)
    old, metric = measured(np.ones(N), rng.normal(10, 0.1, 200), 1000)
    new, _ = measured(np.ones(N), rng.normal(5, 0.1, 200), 250)
    moved = change(old, new, metric)
    assert moved["size_ratio"] == moved["gzip_ratio"] == 0.25
    assert moved["latency_ratio"]["value"] == pytest.approx(0.5, rel=0.01)
    low, high = moved["latency_ratio"]["ci95"]
    assert low < moved["latency_ratio"]["value"] < high < 0.52
    assert moved["metric_drop"]["value"] == 0 and moved["metric_drop"]["ci95"][1] > 0
    assert plain_warnings(old.evidence, new.evidence, moved) == []


@pytest.mark.parametrize(
    ("ms", "size", "sparsity", "starts"),
    [
        (15, 250, None, ["SLOWER here: 15 ms against 10 ms (1.5"]),
        (15, 1000, None, ["no smaller", "SLOWER"]),
        (5, 1200, None, ["LARGER: 1,200 bytes against 1,000"]),
        (10, 250, None, ["no faster beyond the noise"]),
        (10.2, 250, None, ["no faster beyond the noise"]),
        (10, 250, 0.8, ["no faster", "sparse but not faster: 80 %"]),
        (5, 250, 0.8, []),
    ],
)
def test_warnings_in_plain_words(ms, size, sparsity, starts):
    rng = np.random.default_rng(3)
    jitter = rng.normal(0, 0.05, 300)
    old, metric = measured(np.ones(N), 10 + jitter, 1000)
    new, _ = measured(np.ones(N), ms + rng.permutation(jitter), size)
    told = plain_warnings(old.evidence, new.evidence, change(old, new, metric), sparsity=sparsity)
    assert len(told) == len(starts), told
    for text, start in zip(told, starts, strict=True):
        assert text.startswith(start)


def test_tiny_models_are_told_why_they_are_slower():
    old, metric = measured(np.ones(N), np.linspace(0.004, 0.0042, 100), 1000)
    new, _ = measured(np.ones(N), np.linspace(0.008, 0.0082, 100), 500)
    (text,) = plain_warnings(old.evidence, new.evidence, change(old, new, metric))
    assert text.startswith("SLOWER") and "tiny" in text


def test_an_interval_that_cannot_be_had_says_why():
    old, metric = measured(np.linspace(0, 1, N), None, 10)
    lone = replace(old, score=replace(old.score, scores=np.array([0.5])))
    assert change(lone, lone, metric)["metric_drop"]["reason"] == "one example has no interval"
    once = replace(old, timings=Timings(np.array([1.0]), 1.0))
    assert change(once, once, metric)["latency_ratio"] == {"value": 1.0, "ci95": None, "reason": "too few runs for an interval"}
