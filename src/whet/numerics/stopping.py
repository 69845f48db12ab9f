"""Early stopping as a pure state machine: `update(state, value) -> (state, decision)`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from whet.errors import SpecError
from whet.specs.training import EarlyStopping


@dataclass(frozen=True, slots=True)
class StoppingState:
    """What early stopping remembers between epochs: all of it is plain numbers and can be written to JSON."""

    epoch: int = 0  # epochs seen
    best: float | None = None
    best_epoch: int | None = None  # counted from 0
    waited: int = 0  # epochs since the best, counted once the schedule is done and the warm-up over
    counted: int = 0  # epochs since the schedule was done


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

    A non-finite value is never best. While `eligible` is false (a pruning ramp still rises) nothing is best and neither
    patience nor the warm-up begins. An improvement is a change of more than `min_delta`, or of more than `min_delta · |best|`
    if it is relative, in the right direction. Without a spec the best is still tracked and nothing stops.

    Raises:
        SpecError: the spec's threshold is not better than its divergence.
    """
    sign = 1.0 if higher_is_better else -1.0
    if spec is not None:
        _check_bounds(spec, sign)
    epoch = state.epoch + 1
    if not eligible:
        return replace(state, epoch=epoch), Decision(False, False, "waiting for the pruning schedule to end")
    counted = state.counted + 1
    ended = None if spec is None else _ended(value, spec, sign)
    if math.isfinite(value) and _improves(value, state.best, spec, sign):
        return StoppingState(epoch, float(value), state.epoch, 0, counted), Decision(True, bool(ended), ended or "improved")
    is_warm = spec is None or counted > spec.warmup
    waited = state.waited + is_warm
    reason = ended or _waiting(value, waited, is_warm)
    is_over = spec is not None and is_warm and waited >= spec.patience
    if is_over and not ended:
        reason = f"stopped: {reason}"
    return replace(state, epoch=epoch, waited=waited, counted=counted), Decision(False, bool(ended) or is_over, reason)


def _improves(value: float, best: float | None, spec: EarlyStopping | None, sign: float) -> bool:
    if best is None:
        return True
    margin = 0.0 if spec is None else spec.min_delta * (abs(best) if spec.relative else 1.0)
    return sign * (value - best) > margin


def _ended(value: float, spec: EarlyStopping, sign: float) -> str | None:
    """Why training is over whatever its patience, or None."""
    if spec.threshold is not None and math.isfinite(value) and sign * (value - spec.threshold) >= 0:
        return f"stopped: {value:.6g} reaches the threshold of {spec.threshold:g}"
    if spec.divergence is not None and (not math.isfinite(value) or sign * (value - spec.divergence) < 0):
        return f"stopped: {value:.6g} is worse than {spec.divergence:g}: training diverged"
    return None


def _waiting(value: float, waited: int, is_warm: bool) -> str:
    if not math.isfinite(value):
        return f"{value} is never best"
    return f"no improvement for {waited} epoch{'s' if waited > 1 else ''}" if is_warm else "no improvement, warming up"


def _check_bounds(spec: EarlyStopping, sign: float) -> None:
    if spec.threshold is not None and spec.divergence is not None and sign * (spec.threshold - spec.divergence) <= 0:
        better = "higher" if sign > 0 else "lower"
        raise SpecError(
            f"EarlyStopping.threshold ({spec.threshold:g}) must be better than its divergence ({spec.divergence:g}), and "
            f"of this metric {better} is better. Exchange them, or pass a Metric with the other direction."
        )
