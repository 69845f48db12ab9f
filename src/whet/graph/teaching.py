"""What both sides check of teachers before they teach, and what they read off a batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import ModelError
from whet.graph.teacher_store import StoredOutputs
from whet.numerics.losses_table import warn_if_swapped
from whet.specs import Distill

TINY = 1e-30  # a probability below is taken for this: its logarithm stays finite in float32
_MASKS = ("attention_mask", "padding_mask")


def check_teachers(
    spec: Distill,
    teachers: Sequence[Any],
    kind: type,
    called: str,
    student: Mapping[str, Any],
    weights: Callable[[Any], Mapping[str, Any]],
) -> None:
    """Check who is to teach: models of class `kind`, `called` so, or stored outputs; `weights` gives a model's by name.

    Raises:
        ModelError: there is none, one shares a weight with the student, or layers of several or of stored ones are to be heard.
    """
    if not teachers:
        raise ModelError(f"Distill needs a teacher, {called}; got none.")
    for teacher in teachers:
        if isinstance(teacher, StoredOutputs):
            continue
        if not isinstance(teacher, kind):
            raise ModelError(
                f"Distill needs a teacher, {called}; got {type(teacher).__name__}. A model of another framework and an "
                "exported file teach through whet.teacher_outputs(teacher, train, store)."
            )
        own = {id(weight) for weight in student.values()}
        shared = [name for name, weight in weights(teacher).items() if id(weight) in own]
        if shared:
            raise ModelError(
                f"Teacher and student share {shared[0]!r}: training would change the teacher. Pass a copy as student."
            )
        warn_if_swapped(_size(student), _size(weights(teacher)))
    named = next((loss for loss in spec.of_layers if loss.teacher is not None), None)
    if named is not None and (len(teachers) > 1 or isinstance(teachers[0], StoredOutputs)):
        why = "several teachers are one in their outputs" if len(teachers) > 1 else "of a stored teacher the outputs are known"
        raise ModelError(
            f"{type(named).__name__} compares the layer {named.teacher!r} of the teacher, and {why} only. Take one model of "
            "this framework as teacher, or losses on outputs: SoftTargets(), DKD(), or RKD() without names of layers."
        )
    _warn_if_alone(spec)


def _warn_if_alone(spec: Distill) -> None:
    """Warn where no loss on outputs and no targets teach, or losses that were seen to be too little alone."""
    if spec.of_outputs or not spec.of_layers:
        return
    names = ", ".join(dict.fromkeys(type(loss).__name__ for loss in spec.of_layers))
    if spec.student_weight == 0 and all(loss.student is not None for loss in spec.of_layers):
        warnings.warn(
            f"Nothing but {names} teaches, on layers inside: what lies behind them learns nothing. Add SoftTargets(), or give "
            "the targets a student_weight.",
            UserWarning,
            stacklevel=2,
        )
    elif any(type(loss).__name__ in _WEAK for loss in spec.of_layers):
        warnings.warn(
            f"{names} without a loss on the outputs was seen to end below plain training (Tian et al. 2020, arXiv:1910.10699, "
            "table 2: a student of another architecture). Add SoftTargets().",
            UserWarning,
            stacklevel=2,
        )


_WEAK = frozenset({"Features", "AttentionTransfer", "RKD", "SimilarityPreserving", "PKT"})


def _size(weights: Mapping[str, Any]) -> int:
    return sum(math.prod(int(length) for length in weight.shape) for weight in weights.values())


def notes_of(teachers: Sequence[Any]) -> list[str]:
    """What is to be told of stored teachers."""
    return [
        f"{teacher.teacher} returned probabilities: their logarithms are its logits"
        for teacher in teachers
        if isinstance(teacher, StoredOutputs) and teacher.is_normalized
    ]


def padding_of(inputs: Any, rows: tuple[int, ...]) -> npt.NDArray[np.bool_] | None:
    """Which rows (n, length) of the outputs are no padding, as an `attention_mask` or `padding_mask` among the inputs says."""
    found = mask_among(inputs, rows)
    return None if found is None else np.asarray(found) != 0


def mask_among(inputs: Any, rows: tuple[int | None, ...]) -> Any:
    """The mask of the rows (n, length) of the outputs among the inputs, as it came; None where there is none of this shape."""
    if not isinstance(inputs, Mapping):
        return None
    found = next((inputs[name] for name in _MASKS if name in inputs), None)
    return found if found is not None and tuple(found.shape) == rows else None
