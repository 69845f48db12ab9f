"""Early stopping as a pure state machine: `update(state, value) -> (state, decision)`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from whet.specs.training import EarlyStopping


@dataclass(frozen=True, slots=True)
class StoppingState:
    """What early stopping remembers between epochs: all of it is plain numbers and can be written to JSON."""

    epoch: int = 0  # epochs seen
    best: float | None = None
    best_epoch: int | None = None  # counted from 0
    waited: int = 0  # epochs since the best, counted once the schedule is done


@dataclass(frozen=True, slots=True)
class Decision:
    """What the loop must do now."""

    is_best: bool  # copy the weights
    stop: bool
    reason: str


def update(
    state: StoppingState, value: float, spec: EarlyStopping | None, *, higher_is_better: bool, eligible: bool = True
) -> tuple[StoppingState, Decision]:
    """One epoch has ended with `value`.

    A non-finite value is never best. While `eligible` is false (a pruning ramp still rises) nothing is best and patience
    does not begin. An improvement is a change of more than `min_delta` in the right direction. Without a spec the best
    is still tracked and nothing stops.
    """
    epoch = state.epoch + 1
    if not eligible:
        return replace(state, epoch=epoch), Decision(False, False, "waiting for the pruning schedule to end")
    margin = spec.min_delta if spec is not None else 0.0
    finite = math.isfinite(value)
    gain = 0.0 if state.best is None else (value - state.best if higher_is_better else state.best - value)
    if finite and (state.best is None or gain > margin):
        return StoppingState(epoch, float(value), state.epoch, 0), Decision(True, False, "improved")
    waited = state.waited + 1
    stop = spec is not None and waited >= spec.patience
    why = "no improvement" if finite else f"{value} is never best"
    reason = f"{why} for {waited} epoch{'s' if waited > 1 else ''}" if finite else why
    return replace(state, epoch=epoch, waited=waited), Decision(False, stop, f"stopped: {reason}" if stop else reason)
