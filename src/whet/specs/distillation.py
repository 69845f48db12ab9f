"""What a student learns from its teacher."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from whet.errors import SpecError
from whet.specs.base import check_number, check_type, spec

HIGHEST = 1e6  # of temperatures and weights


def _check(loss: Loss) -> None:
    """Check the weight and the temperature, if it has one."""
    name = type(loss).__name__
    check_number(f"{name}.weight", loss.weight, low=0, high=HIGHEST, open_low=True)
    if not isinstance(loss, LogitsMSE | Regression):
        check_number(f"{name}.temperature", loss.temperature, low=0, high=HIGHEST, open_low=True)


@spec
@dataclass(frozen=True, slots=True)
class SoftTargets:
    """`T² · KL(softmax(teacher/T) ‖ softmax(student/T))` (Hinton et al. 2015, arXiv:1503.02531).

    With `standardize` each row of logits is first shifted and scaled to mean 0 and deviation 1, so that the student learns
    their relations and not their size (Sun et al. 2024, arXiv:2403.01427). Then a temperature of about 2 fits.
    """

    temperature: float = 4.0
    _: KW_ONLY
    standardize: bool = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        check_type("SoftTargets.standardize", self.standardize, bool)


@spec
@dataclass(frozen=True, slots=True)
class BinarySoftTargets:
    """Soft targets of sigmoid outputs, where each logit answers a question of its own: one logit, or several labels."""

    temperature: float = 4.0
    _: KW_ONLY
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self)


@spec
@dataclass(frozen=True, slots=True)
class LogitsMSE:
    """`mean((student - teacher)²)` over logits (Ba & Caruana 2014, arXiv:1312.6184)."""

    _: KW_ONLY
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self)


@spec
@dataclass(frozen=True, slots=True)
class Regression:
    """`mean((student - teacher)²)` over the outputs of a model that predicts numbers; they need not be logits."""

    _: KW_ONLY
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self)


@spec
@dataclass(frozen=True, slots=True)
class DKD:
    """`T² · (alpha · TCKD + beta · NCKD)`: the target class apart from the others (Zhao et al. 2022, arXiv:2203.08679).

    Needs integer targets. The paper's `beta` grows with the teacher's confidence: 1 to 10, of which 8 is its choice for
    CIFAR-100's ResNets.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    _: KW_ONLY
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        check_number("DKD.alpha", self.alpha, low=0, high=HIGHEST)
        check_number("DKD.beta", self.beta, low=0, high=HIGHEST)


@spec
@dataclass(frozen=True, slots=True)
class DIST:
    """`T² · (beta · inter + gamma · intra)`: correlations of rows and of columns (Huang et al. 2022, arXiv:2205.10536)."""

    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = 4.0
    _: KW_ONLY
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        check_number("DIST.beta", self.beta, low=0, high=HIGHEST)
        check_number("DIST.gamma", self.gamma, low=0, high=HIGHEST)


Loss = SoftTargets | BinarySoftTargets | LogitsMSE | Regression | DKD | DIST
LOGIT_LOSSES = (SoftTargets, BinarySoftTargets, LogitsMSE, Regression, DKD, DIST)


@spec
@dataclass(frozen=True, slots=True)
class Distill:
    """`student_weight · loss(student, targets) + (1 - student_weight) · Σ weight · distillation loss`."""

    loss: tuple[Loss, ...] = (SoftTargets(),)
    _: KW_ONLY
    student_weight: float = 0.1

    def __post_init__(self) -> None:
        losses = tuple(self.loss) if isinstance(self.loss, list | tuple) else (self.loss,)
        if not losses:
            raise SpecError("Distill.loss must name at least one distillation loss, got none.")
        for loss in losses:
            check_type("Distill.loss", loss, *LOGIT_LOSSES)
        object.__setattr__(self, "loss", losses)
        check_number("Distill.student_weight", self.student_weight, low=0, high=1)
