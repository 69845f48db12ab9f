"""Timing in alternation, on a clock of our own, so that the tests hold on a busy machine too."""

import gc
from types import SimpleNamespace

import numpy as np
import pytest

from whet.errors import RuntimeFileError
from whet.records import Latency
from whet.runtimes.base import Session, Slot
from whet.runtimes.latency import alternate, noise
from whet.runtimes.sessions import open_session

BATCH = np.zeros((1, 2), np.float32)


class Clock:
    """Wall and CPU time that pass only when a session computes."""

    def __init__(self):
        self.wall = self.cpu = 0

    def spend(self, ms, load=1.0):
        self.wall += round(ms * 1e6)
        self.cpu += round(ms * load * 1e6)


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    functions = SimpleNamespace(
        perf_counter_ns=lambda: made.wall, process_time_ns=lambda: made.cpu, perf_counter=lambda: made.wall / 1e9
    )
    monkeypatch.setattr("whet.runtimes.latency.time", functions)
    return made


class Timed(Session):
    """Every call takes the next of `ms` on `clock`, in a circle, and is written down in `calls`."""

    name, version, threads = "timed", "1", 1
    inputs = (Slot("x", (None, 2), "float32"),)
    outputs = (Slot("y", (None, 2), "float32"),)

    def __init__(self, clock, file, ms, calls, load=1.0):
        self.clock, self.file, self.ms, self.calls, self.load = clock, file, np.atleast_1d(ms), calls, load
        self.count = 0

    def _place(self, arrays):
        self.placed = arrays

    def invoke(self):
        self.calls.append((self.file, gc.isenabled()))
        self.clock.spend(float(self.ms[self.count % len(self.ms)]), self.load)
        self.count += 1

    def _fetch(self):
        return self.placed


def test_times_and_order(clock):
    calls = []
    a, b = alternate([Timed(clock, "a", 0.5, calls), Timed(clock, "b", 1.5, calls)], BATCH, runs=20, warmup=3)
    assert a.ms.tolist() == [0.5] * 20 and b.ms.tolist() == [1.5] * 20
    timed = [file for file, _ in calls[6:]]
    assert timed == ["a", "b", "b", "a"] * 10


def test_a_disturbance_hits_both_files_alike(clock):
    """The machine slows down by half in the middle: the ratio of medians stays."""

    class Slowing(Timed):
        def invoke(self):
            super().invoke()
            if len(self.calls) > 60:
                self.clock.spend(float(self.ms[0]))

    calls = []
    a, b = alternate([Slowing(clock, "a", 1.0, calls), Slowing(clock, "b", 2.0, calls)], BATCH, runs=50, warmup=5)
    assert np.median(b.ms) / np.median(a.ms) == pytest.approx(2.0, rel=0.01)
    assert set(a.ms) == {1.0, 2.0}


def test_short_calls_are_timed_in_blocks_of_equal_number(clock):
    calls = []
    a, b = alternate([Timed(clock, "a", 0.005, calls), Timed(clock, "b", 0.01, calls)], BATCH, runs=5, warmup=3)
    timed = [file for file, _ in calls[6:]]
    assert timed == (["a"] * 20 + ["b"] * 20 + ["b"] * 20 + ["a"] * 20) * 2 + ["a"] * 20 + ["b"] * 20
    np.testing.assert_allclose(a.ms, 0.005)
    np.testing.assert_allclose(b.ms, 0.01)


def test_garbage_collection_pauses_and_comes_back(clock):
    calls = []
    gc.enable()
    alternate([Timed(clock, "a", 0.2, calls)], BATCH, runs=3)
    assert gc.isenabled() and not any(enabled for _, enabled in calls)

    class Failing(Timed):
        def invoke(self):
            raise RuntimeFileError("broken")

    with pytest.raises(RuntimeFileError):
        alternate([Failing(clock, "a", 1, [])], BATCH)
    assert gc.isenabled()
    gc.disable()
    try:
        alternate([Timed(clock, "a", 1, [])], BATCH, runs=1)
        assert not gc.isenabled(), "whoever had switched it off finds it off"
    finally:
        gc.enable()


@pytest.mark.parametrize(("ms", "budget_s", "runs"), [(20, 0.3, 15), (0.2, 1, 400), (1000, 0.3, 5), (0.001, 0.02, 200)])
def test_runs_are_chosen_to_fit_the_budget(clock, ms, budget_s, runs):
    (timings,) = alternate([Timed(clock, "a", ms, [])], BATCH, warmup=2, budget_s=budget_s)
    assert len(timings.ms) == runs


def test_slow_files_are_warmed_up_less(clock):
    calls = []
    alternate([Timed(clock, "a", 2000, calls)], BATCH, runs=1, warmup=10)
    assert len(calls) == 2 + 1


def test_waiting_shows_as_cpu_time_below_wall_time_and_is_told(clock):
    (timings,) = alternate([Timed(clock, "a", 3, [], load=0.6)], BATCH, runs=10)
    latency = timings.latency(batch=1, threads=1)
    assert latency.cpu_per_wall == pytest.approx(0.6)
    assert "60 % of one core" in noise(latency)


def test_noise_in_words():
    assert noise(Latency(1.0, 1.2, 1, 1, 100, 0.99)) is None
    assert "vary" in noise(Latency(1.0, 2.0, 1, 1, 100, 0.99))
    assert "busy" in noise(Latency(1.0, 2.0, 1, 1, 100, 0.6))


def test_quantiles_and_facts_of_the_record(clock):
    (timings,) = alternate([Timed(clock, "a", np.arange(1, 12), [])], BATCH, runs=11, warmup=11)
    latency = timings.latency(batch=3, threads=2)
    assert latency == Latency(6.0, 10.0, 3, 2, 11, 1.0, pytest.approx(10.9))


@pytest.mark.parametrize("runs", [0, -3, 2.5, True])
def test_runs_must_be_a_positive_integer(clock, runs):
    with pytest.raises(RuntimeFileError, match="runs"):
        alternate([Timed(clock, "a", 0.1, [])], BATCH, runs=runs)


def test_real_files_on_the_real_clock(onnx_float, onnx_int8):
    sessions = [open_session(path, threads=1) for path in (onnx_float[0], onnx_int8)]
    times = alternate(sessions, np.ones((1, 1, 8, 8), np.float32), budget_s=0.3)
    assert all((t.ms > 0).all() and np.median(t.ms) < 1000 and t.cpu_per_wall > 0 for t in times)
