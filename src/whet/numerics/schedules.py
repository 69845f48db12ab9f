"""Sparsity over training steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from whet.errors import SpecError
from whet.specs.criteria import Movement
from whet.specs.pruning import Cosine, Cubic, Exponential, Iterative, Linear, OneShot, Prune, Ramped, RigL


@dataclass(frozen=True, slots=True)
class Ramp:
    """A schedule laid on a number of steps: the ramp spans steps `[begin, end]`, masks are renewed every `frequency`."""

    spec: Prune
    begin: int
    end: int
    frequency: int

    def sparsity(self, step: int) -> float:
        """The sparsity in force at `step`, counted from 0, held between renewals."""
        final = self.spec.fraction
        if step >= self.end or not isinstance(self.spec.schedule, Ramped):
            return final
        if step < self.begin:
            return 0.0
        held = self.begin + (step - self.begin) // self.frequency * self.frequency
        return ramp(self.spec.schedule, final, (held - self.begin) / (self.end - self.begin))

    def renews(self, step: int) -> bool:
        """Whether the masks are recomputed before `step`."""
        if isinstance(self.spec.schedule, OneShot | RigL):
            return step == 0
        inside = self.begin <= step < self.end
        return step == self.end or (inside and (step - self.begin) % self.frequency == 0)

    def drop_fraction(self, step: int) -> float:
        """The fraction of the kept weights that `RigL` exchanges before `step`; 0 where it does not.

        `α/2 · (1 + cos(π t / T_end))` (Evci et al. 2020, arXiv:1911.11134, section 3, "Update schedule").
        """
        schedule = self.spec.schedule
        if not isinstance(schedule, RigL) or not 0 < step < self.end or step % self.frequency:
            return 0.0
        return schedule.fraction / 2 * (1 + math.cos(math.pi * step / self.end))

    def is_done(self, step: int) -> bool:
        """Whether the final sparsity is in force from `step` on, and masks no longer move."""
        return step >= self.end or isinstance(self.spec.schedule, OneShot)

    def phase(self, step: int) -> str:
        """What training is at before `step`: "warm-up", "pruning ramp" (of RigL "moving masks"), then "recovery"."""
        if self.is_done(step):
            return "recovery"
        if isinstance(self.spec.schedule, RigL):
            return "moving masks"
        return "warm-up" if step < self.begin else "pruning ramp"


def ramp(schedule: Ramped, final: float, progress: float) -> float:
    """The sparsity after the fraction `progress` of the ramp; the formula of each is in its spec's docstring."""
    start, left = schedule.initial, 1 - progress
    match schedule:
        case Linear():
            return start + (final - start) * progress
        case Cubic():
            return final + (start - final) * left**3
        case Cosine():
            return final + (start - final) * (1 + math.cos(math.pi * progress)) / 2
        case Exponential() | Iterative():
            return float(1 - (1 - start) ** left * (1 - final) ** progress)
    raise SpecError(f"The schedule {schedule!r} has no formula. Take Linear, Cubic, Cosine, Exponential or Iterative.")


def lay(spec: Prune, steps: int) -> Ramp:
    """The schedule of `spec` on `steps` training steps.

    Raises:
        SpecError: training is too short for the ramp to reach its target and be trained at it.
    """
    schedule = spec.schedule
    _check_movement(spec)
    if isinstance(schedule, OneShot):
        return Ramp(spec, 0, 0, 1)
    if isinstance(schedule, RigL):
        end = min(round(schedule.end * steps), steps - 1)
        if end <= schedule.frequency:
            raise SpecError(
                f"RigL would never move a mask: it ends at step {end} of {steps} and moves them every {schedule.frequency} "
                "steps. Train longer, raise RigL.end or lower RigL.frequency."
            )
        return Ramp(spec, 0, end, schedule.frequency)
    begin, end = round(schedule.begin * steps), round(schedule.end * steps)
    end = min(end, steps - 1)  # the renewal at `end` happens before that step, so it must be a step that runs
    frequency = schedule.frequency
    if isinstance(schedule, Iterative):
        frequency = max((end - begin) // schedule.rounds, 1)
        if end - begin < schedule.rounds:
            raise SpecError(
                f"The pruning schedule cannot go {schedule.rounds} rounds: it has {max(end - begin, 0)} of {steps} training "
                "steps. Train longer, raise Iterative.end or lower Iterative.rounds."
            )
        end = begin + frequency * schedule.rounds  # so that all rounds are of one length
    elif end - begin < frequency:
        name = type(schedule).__name__
        raise SpecError(
            f"The pruning schedule cannot ramp to sparsity {spec.fraction:g}: it has {max(end - begin, 0)} of {steps} training "
            f"steps, and renews its masks every {frequency}. Train longer, raise {name}.end or lower {name}.frequency."
        )
    return Ramp(spec, begin, end, frequency)


def _check_movement(spec: Prune) -> None:
    """Raise SpecError where weights would be removed before any of them has moved."""
    schedule = spec.schedule
    if not isinstance(spec.criterion, Movement):
        return
    if not isinstance(schedule, Ramped) or (schedule.initial and not schedule.begin):
        raise SpecError(
            "Movement ranks weights by where training moves them, and this schedule removes some before the first step: take "
            "Cubic(begin=0.1) or another that begins at sparsity 0."
        )
