"""What a student learns from its teacher."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from whet.errors import SpecError
from whet.specs.base import check_number, check_type, spec


@spec
@dataclass(frozen=True, slots=True)
class SoftTargets:
    """`T² · KL(softmax(teacher/T) ‖ softmax(student/T))` (Hinton et al. 2015, arXiv:1503.02531)."""

    temperature: float = 4.0

    def __post_init__(self) -> None:
        check_number("SoftTargets.temperature", self.temperature, low=0, high=1e6, open_low=True)


@spec
@dataclass(frozen=True, slots=True)
class Distill:
    """`student_weight · loss(student, targets) + (1 - student_weight) · sum of the distillation losses`."""

    loss: tuple[SoftTargets, ...] = (SoftTargets(),)
    _: KW_ONLY
    student_weight: float = 0.1

    def __post_init__(self) -> None:
        losses = tuple(self.loss) if isinstance(self.loss, list | tuple) else (self.loss,)
        if not losses:
            raise SpecError("Distill.loss must name at least one distillation loss, got none.")
        for loss in losses:
            check_type("Distill.loss", loss, SoftTargets)
        object.__setattr__(self, "loss", losses)
        check_number("Distill.student_weight", self.student_weight, low=0, high=1)
