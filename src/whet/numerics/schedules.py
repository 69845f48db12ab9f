"""Sparsity over training steps."""

from __future__ import annotations

from dataclasses import dataclass

from whet.errors import SpecError
from whet.specs.pruning import Cubic, OneShot, Prune


@dataclass(frozen=True, slots=True)
class Ramp:
    """A schedule laid on a number of steps: the ramp spans steps `[begin, end]`, masks are renewed every `frequency`."""

    spec: Prune
    begin: int
    end: int
    frequency: int

    def sparsity(self, step: int) -> float:
        """The sparsity in force at `step`, counted from 0.

        Cubic: `s_f + (s_i - s_f) * (1 - t)^3` (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1), held between renewals.
        """
        final = self.spec.sparsity
        if step >= self.end or isinstance(self.spec.schedule, OneShot):
            return final
        if step < self.begin:
            return 0.0
        held = self.begin + (step - self.begin) // self.frequency * self.frequency
        progress = (held - self.begin) / (self.end - self.begin)
        return final + (self.spec.schedule.initial - final) * (1 - progress) ** 3

    def renews(self, step: int) -> bool:
        """Whether the masks are recomputed before `step`."""
        if isinstance(self.spec.schedule, OneShot):
            return step == 0
        inside = self.begin <= step < self.end
        return step == self.end or (inside and (step - self.begin) % self.frequency == 0)

    def is_done(self, step: int) -> bool:
        """Whether the final sparsity is in force from `step` on."""
        return step >= self.end or isinstance(self.spec.schedule, OneShot)


def lay(spec: Prune, steps: int) -> Ramp:
    """The schedule of `spec` on `steps` training steps.

    Raises:
        SpecError: training is too short for the ramp to reach its target and be trained at it.
    """
    if isinstance(spec.schedule, OneShot):
        return Ramp(spec, 0, 0, 1)
    schedule: Cubic = spec.schedule
    begin, end = round(schedule.begin * steps), round(schedule.end * steps)
    end = min(end, steps - 1)  # the renewal at `end` happens before that step, so it must be a step that runs
    if end - begin < schedule.frequency:
        raise SpecError(
            f"The pruning schedule cannot ramp to sparsity {spec.sparsity:g}: it has {max(end - begin, 0)} of {steps} training "
            f"steps, and renews its masks every {schedule.frequency}. Train longer, raise Cubic.end or lower Cubic.frequency."
        )
    return Ramp(spec, begin, end, schedule.frequency)
