"""How long one batch takes in the runtime itself, timed in alternation so that a noisy machine hurts all files alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import RuntimeFileError
from whet.records import Latency
from whet.runtimes.base import Session

SAMPLE_MS = 0.1  # shorter calls are timed several at once: the clock would weigh too much
MAX_RUNS, MIN_RUNS = 400, 5
BUSY, SPREAD = 0.9, 1.5


@dataclass(frozen=True, slots=True, eq=False)
class Timings:
    """Times of one file's calls. ms: (runs,) milliseconds per call. cpu_per_wall: CPU time of the process over wall time."""

    ms: npt.NDArray[np.float64]
    cpu_per_wall: float

    def latency(self, *, batch: int, threads: int) -> Latency:
        """The record of these times."""
        p50, p90, p99 = (float(value) for value in np.quantile(self.ms, [0.5, 0.9, 0.99]))
        return Latency(p50, p90, batch, threads, len(self.ms), self.cpu_per_wall, p99)


def alternate(
    sessions: Sequence[Session], inputs: Any, *, runs: int | None = None, warmup: int = 10, budget_s: float = 3.0
) -> list[Timings]:
    """Time all `sessions` on one batch, in turns whose order is reversed each round (A B, B A, …).

    A run is one call of the runtime with its inputs in place; nothing of Python's handling of arrays is in it. Calls
    shorter than 0.1 ms are timed in blocks of equal number, and a run is the mean of one block. `runs`: per file; by
    default as many as fit into `budget_s` seconds, between 5 and 400. Garbage collection pauses meanwhile.

    Raises:
        RuntimeFileError: a file does not take `inputs`, or `runs` is not a positive integer.
    """
    if runs is not None and (isinstance(runs, bool) or not isinstance(runs, int) or runs < 1):
        raise RuntimeFileError(f"runs must be an integer of at least 1, or None to choose; got {runs!r}.")
    for session in sessions:
        session.prepare(inputs)
    with _no_collection():
        estimates = [_warm(session, warmup) for session in sessions]
        calls = max(1, math.ceil(SAMPLE_MS / min(estimates)))
        seconds = calls * sum(estimates) / 1e3
        count = runs or int(min(MAX_RUNS, max(MIN_RUNS, budget_s / seconds)))
        times = np.zeros((len(sessions), count))
        cpu, wall = np.zeros(len(sessions)), np.zeros(len(sessions))
        for turn in range(count):
            order = range(len(sessions)) if turn % 2 == 0 else reversed(range(len(sessions)))
            for index in order:
                elapsed, used = _block(sessions[index], calls)
                times[index, turn] = elapsed / calls / 1e6
                cpu[index] += used
                wall[index] += elapsed
    return [Timings(times[i], float(cpu[i] / wall[i])) for i in range(len(sessions))]


def noise(latency: Latency) -> str | None:
    """Why these times may mislead, in plain words; None where they look sound."""
    if latency.cpu_per_wall < BUSY:
        return (
            f"the machine was busy while timing {_condition(latency)}: this process got {100 * latency.cpu_per_wall:.0f} % of "
            "one core, so the times may be too long; measure again on a quiet machine"
        )
    if latency.p90 > SPREAD * latency.p50:
        return (
            f"the times of {_condition(latency)} vary: 1 run in 10 took longer than {latency.p90:.3g} ms, the median is "
            f"{latency.p50:.3g} ms; other work or a changing clock rate disturbs them"
        )
    return None


def _condition(latency: Latency) -> str:
    return f"batch {latency.batch} on {latency.threads} thread{'s' if latency.threads > 1 else ''}"


def _block(session: Session, calls: int) -> tuple[int, int]:
    """Wall and CPU nanoseconds of `calls` calls."""
    invoke = session.invoke
    used = time.process_time_ns()
    start = time.perf_counter_ns()
    for _ in range(calls):
        invoke()
    elapsed = time.perf_counter_ns() - start
    return elapsed, time.process_time_ns() - used


def _warm(session: Session, warmup: int) -> float:
    """Run `warmup` calls, fewer of a slow file, and return the milliseconds of the fastest."""
    best, start = math.inf, time.perf_counter()
    for index in range(max(warmup, 1)):
        elapsed, _ = _block(session, 1)
        best = min(best, elapsed / 1e6)
        if index >= 1 and time.perf_counter() - start > 1.0:
            break
    return max(best, 1e-6)


@contextmanager
def _no_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
