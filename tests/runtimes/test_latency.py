"""Timing in alternation, with sessions whose cost is known."""

import gc
import time

import numpy as np
import pytest

from whet.errors import RuntimeFileError
from whet.records import Latency
from whet.runtimes.base import Session, Slot
from whet.runtimes.latency import alternate, noise
from whet.runtimes.sessions import open_session


class Spinning(Session):
    """Keeps the processor busy for `ms` in every call, and writes down that it was called."""

    name, version, threads = "spinning", "1", 1
    inputs = (Slot("x", (None, 2), "float32"),)
    outputs = (Slot("y", (None, 2), "float32"),)

    def __init__(self, file, ms, calls):
        self.file, self.ms, self.calls = file, ms, calls

    def _place(self, arrays):
        self.placed = arrays

    def invoke(self):
        self.calls.append((self.file, gc.isenabled()))
        end = time.perf_counter() + self.ms / 1e3
        while time.perf_counter() < end:
            pass

    def _fetch(self):
        return self.placed


class Sleeping(Spinning):
    def invoke(self):
        time.sleep(self.ms / 1e3)


BATCH = np.zeros((1, 2), np.float32)


def test_times_and_order():
    calls = []
    a, b = alternate([Spinning("a", 0.5, calls), Spinning("b", 1.5, calls)], BATCH, runs=20, warmup=3)
    assert a.ms.shape == b.ms.shape == (20,)
    assert 0.5 <= np.median(a.ms) < 0.8 and 1.5 <= np.median(b.ms) < 2.0
    timed = [file for file, _ in calls[6:]]
    assert timed[:8] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert len(timed) == 40
    assert a.cpu_per_wall > 0.8


def test_short_calls_are_timed_in_blocks_of_equal_number():
    calls = []
    times = alternate([Spinning("a", 0.005, calls), Spinning("b", 0.01, calls)], BATCH, runs=5, warmup=3)
    timed = [file for file, _ in calls[6:]]
    assert timed.count("a") == timed.count("b") > 5
    assert np.median(times[0].ms) < 0.05


def test_garbage_collection_pauses_and_comes_back():
    calls = []
    gc.enable()
    alternate([Spinning("a", 0.2, calls)], BATCH, runs=3)
    assert gc.isenabled() and not any(enabled for _, enabled in calls)

    class Failing(Spinning):
        def invoke(self):
            raise RuntimeFileError("broken")

    with pytest.raises(RuntimeFileError):
        alternate([Failing("a", 1, [])], BATCH)
    assert gc.isenabled()


def test_runs_are_chosen_to_fit_the_budget():
    start = time.perf_counter()
    (timings,) = alternate([Spinning("a", 20, [])], BATCH, warmup=2, budget_s=0.3)
    assert 5 <= len(timings.ms) <= 15
    assert time.perf_counter() - start < 2
    (timings,) = alternate([Spinning("a", 0.2, [])], BATCH, budget_s=1)
    assert len(timings.ms) == 400


def test_waiting_shows_as_cpu_time_below_wall_time_and_is_told():
    (timings,) = alternate([Sleeping("a", 3, [])], BATCH, runs=10)
    latency = timings.latency(batch=1, threads=1)
    assert latency.cpu_per_wall < 0.5
    assert "busy" in noise(latency)


def test_noise_in_words():
    assert noise(Latency(1.0, 1.2, 1, 1, 100, 0.99)) is None
    assert "vary" in noise(Latency(1.0, 2.0, 1, 1, 100, 0.99))
    assert "60 % of one core" in noise(Latency(1.0, 2.0, 1, 1, 100, 0.6))


def test_quantiles_and_facts_of_the_record():
    (timings,) = alternate([Spinning("a", 0.3, [])], BATCH, runs=7)
    latency = timings.latency(batch=3, threads=2)
    assert (latency.batch, latency.threads, latency.runs) == (3, 2, 7)
    assert latency.p50 == np.median(timings.ms) <= latency.p90 <= timings.ms.max()


@pytest.mark.parametrize("runs", [0, -3, 2.5, True])
def test_runs_must_be_a_positive_integer(runs):
    with pytest.raises(RuntimeFileError, match="runs"):
        alternate([Spinning("a", 0.1, [])], BATCH, runs=runs)


def test_real_files(onnx_float, onnx_int8):
    sessions = [open_session(path, threads=1) for path in (onnx_float[0], onnx_int8)]
    times = alternate(sessions, np.ones((1, 1, 8, 8), np.float32), budget_s=0.3)
    assert all((t.ms > 0).all() and np.median(t.ms) < 5 for t in times)
