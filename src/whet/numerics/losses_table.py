"""Which function computes a distillation loss on logits, and what it must be given."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from whet.errors import ModelError
from whet.numerics import losses
from whet.numerics.namespace import Array, Namespace
from whet.specs.distillation import DIST, DKD, BinarySoftTargets, LogitsMSE, Loss, Regression, SoftTargets

NEEDS_CLASSES = (SoftTargets, LogitsMSE, DKD, DIST)  # logits of at least two classes, not probabilities
NEEDS_LABELS = (DKD,)


def _soft_targets(spec: SoftTargets, s: Array, t: Array, labels: Array, *, xp: Namespace, real: Array | None) -> Array:
    return losses.soft_targets(s, t, spec.temperature, standardize=spec.standardize, xp=xp, real=real)


def _binary(spec: BinarySoftTargets, s: Array, t: Array, labels: Array, *, xp: Namespace, real: Array | None) -> Array:
    return losses.binary_soft_targets(s, t, spec.temperature, xp=xp, real=real)


def _squared(spec: LogitsMSE, s: Array, t: Array, labels: Array, *, xp: Namespace, real: Array | None) -> Array:
    return losses.squared_error(s, t, xp=xp, real=real)


def _dkd(spec: DKD, s: Array, t: Array, labels: Array, *, xp: Namespace, real: Array | None) -> Array:
    return losses.dkd(s, t, labels, alpha=spec.alpha, beta=spec.beta, temperature=spec.temperature, xp=xp, real=real)


def _dist(spec: DIST, s: Array, t: Array, labels: Array, *, xp: Namespace, real: Array | None) -> Array:
    return losses.dist(s, t, beta=spec.beta, gamma=spec.gamma, temperature=spec.temperature, xp=xp, real=real)


_TABLE: dict[type, Callable[..., Array]] = {
    SoftTargets: _soft_targets,
    BinarySoftTargets: _binary,
    LogitsMSE: _squared,
    Regression: _squared,
    DKD: _dkd,
    DIST: _dist,
}


def logit_loss(
    spec: Loss, student: Array, teacher: Array, labels: Array | None = None, *, xp: Namespace, real: Array | None = None
) -> Array:
    """The scalar of `spec`, its weight not yet applied. Shapes: (…, classes), labels and `real` (…).

    Raises:
        ModelError: the shapes do not fit each other, or labels are missing.
    """
    check_shapes(spec, student.shape, teacher.shape, None if labels is None else labels.shape)
    return _TABLE[type(spec)](spec, student, teacher, labels, xp=xp, real=real)


def check_shapes(spec: Loss, student: Any, teacher: Any, labels: Any) -> None:
    """Raise `ModelError` unless outputs of these shapes can be compared by `spec`; None in a shape fits everything."""
    name, student, teacher = type(spec).__name__, tuple(student), tuple(teacher)
    if not _fit(student, teacher):
        raise ModelError(
            f"Student and teacher must give logits of one shape, got {student} from the student and {teacher} from the "
            "teacher. Do both know the same classes, or words, in the same order?"
        )
    if isinstance(spec, NEEDS_CLASSES) and (not student or student[-1] is None or student[-1] < 2):
        raise ModelError(
            f"{name} needs logits of shape (…, classes) with at least two, got {student}. For one logit take "
            "BinarySoftTargets, for numbers Regression."
        )
    if isinstance(spec, NEEDS_LABELS):
        if labels is None:
            raise ModelError(f"{name} needs integer targets: it tells the target class from the others. SoftTargets does not.")
        if not _fit(tuple(labels), student[:-1]):
            raise ModelError(f"{name} needs one integer target for each row of the logits {student}, got {tuple(labels)}.")


def looks_like_sigmoid(outputs: np.ndarray) -> bool:
    """Whether `outputs`, of one batch, are probabilities of a sigmoid: 32 values or more, all in [0, 1]."""
    return outputs.size >= 32 and bool(((outputs >= 0) & (outputs <= 1)).all())


def are_probabilities(outputs: np.ndarray, tolerance: float = 1e-4) -> bool:
    """Whether `outputs` (…, classes) went through a softmax: at least two classes, none negative, rows that sum to 1."""
    if outputs.ndim < 2 or outputs.shape[-1] < 2 or outputs.dtype.kind != "f" or not outputs.size:
        return False
    values = outputs.astype(np.float32, copy=False)
    return bool((values >= 0).all()) and bool((np.abs(values.sum(-1) - 1) < tolerance).all())


def warn_if_swapped(student: int, teacher: int) -> None:
    """Warn if the student has so many more parameters than its teacher that the two may have been exchanged."""
    if teacher and student > 3 * teacher:
        warnings.warn(
            f"The student has {student:,} parameters and its teacher {teacher:,}. Were the two exchanged? The first model that "
            "is passed is trained; teacher= is the one that it learns from.",
            UserWarning,
            stacklevel=2,
        )


def _fit(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two shapes may be the same."""
    return len(one) == len(other) and all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))
