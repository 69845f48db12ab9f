"""Distillation: a student learns from its teacher's outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from whet.errors import ModelError
from whet.numerics import losses
from whet.specs import Distill
from whet.specs.base import check_number
from whet.torch.model import call, copy, device_of, dtype_of, evaluating, primary, to_tensors
from whet.torch.namespace import xp

IGNORED = -100  # targets with this value (padding) count in no loss, as in torch's cross_entropy


def soft_targets(student_logits: Any, teacher_logits: Any, temperature: float = 4.0) -> Any:
    """`T² · KL(softmax(t/T) ‖ softmax(s/T))` in nats, mean over all axes but the classes (Hinton et al. 2015, eq. 1-4).

    Shapes: both (…, classes), classes last; 16-bit logits are computed in float32. No gradient flows to the teacher.

    Raises:
        ModelError: the shapes differ. SpecError: the temperature is not positive.
    """
    check_number("soft_targets temperature", temperature, low=0, high=1e6, open_low=True)
    if student_logits.shape != teacher_logits.shape:
        raise ModelError(
            f"Student and teacher must give logits of one shape, got {tuple(student_logits.shape)} from the student and "
            f"{tuple(teacher_logits.shape)} from the teacher. Do both know the same classes, in the same order?"
        )
    return losses.soft_targets(_wide(student_logits), _wide(teacher_logits), temperature, xp=xp)


def classes_last(logits: Any, targets: Any) -> Any:
    """`logits` with the classes as last axis: of (n, classes, …) and targets (n, …) axis 1 is moved there."""
    if targets is None or not isinstance(targets, torch.Tensor) or logits.ndim < 3 or logits.shape[:-1] == targets.shape:
        return logits
    return logits.movedim(1, -1) if (logits.shape[0], *logits.shape[2:]) == tuple(targets.shape) else logits


def look_like_probabilities(outputs: Any) -> bool:
    """Whether `outputs` (…, classes) went through a softmax: at least two classes, none negative, rows that sum to 1."""
    if not isinstance(outputs, torch.Tensor) or outputs.ndim < 2 or outputs.shape[-1] < 2 or not outputs.is_floating_point():
        return False
    values = outputs.detach().float()
    tolerance = 1e-2 if outputs.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return bool((values >= 0).all()) and bool(((values.sum(-1) - 1).abs() < tolerance).all())


@contextmanager
def teaching(spec: Distill | None, teacher: Any, student: Any, device: Any) -> Iterator[Teacher | None]:
    """The teacher of `spec` in inference mode on `device` while the block runs; None without a spec.

    The teacher handed in is never moved or changed: on another device a copy of it teaches, and every module's mode comes
    back afterwards.

    Raises:
        ModelError: there is no teacher, or it shares weights with the student.
    """
    if spec is None:
        yield None
        return
    if not isinstance(teacher, torch.nn.Module):
        raise ModelError(f"Distill needs a teacher, a torch.nn.Module; got {type(teacher).__name__}.")
    own = {id(parameter) for parameter in student.parameters()}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in own]
    if shared:
        raise ModelError(f"Teacher and student share {shared[0]!r}: training would change the teacher. Pass a copy as student.")
    if device_of(teacher) != device:
        teacher = copy(teacher).to(device)
    with evaluating(teacher):
        yield Teacher(spec, teacher, device)


class Teacher:
    """The losses of a `Distill`. The teacher runs in inference mode without gradients, whatever mode was set since."""

    def __init__(self, spec: Distill, model: Any, device: Any) -> None:
        self._spec, self._model, self._device = spec, model, device
        self._is_checked = False
        self.logits: Any = None  # of the last batch

    def loss(self, outputs: Any, inputs: Any, targets: Any) -> Any:
        """The sum of the distillation losses on one batch: `outputs` of the student on `inputs` (arrays)."""
        student = primary(outputs)
        teacher = self._outputs(inputs)
        if not isinstance(student, torch.Tensor) or not isinstance(teacher, torch.Tensor):
            raise ModelError(
                "Student and teacher must return logits: a tensor, or a structure whose `logits` or first entry is one."
            )
        student, teacher = classes_last(student, targets), classes_last(teacher, targets)
        if not self._is_checked:
            self._check(student, teacher)
        self.logits = teacher
        if isinstance(targets, torch.Tensor) and not targets.is_floating_point() and targets.shape == student.shape[:-1]:
            real = targets != IGNORED
            if not bool(real.any()):
                return student.sum() * 0
            if not bool(real.all()):
                student, teacher = student[real], teacher[real]
        return sum(soft_targets(student, teacher, loss.temperature) for loss in self._spec.loss)

    def _outputs(self, inputs: Any) -> Any:
        if any(module.training for module in self._model.modules()):
            self._model.eval()
        with torch.no_grad():
            return primary(call(self._model, to_tensors(inputs, self._device, dtype_of(self._model))))

    def _check(self, student: Any, teacher: Any) -> None:
        for whose, logits in (("teacher", teacher), ("student", student)):
            if look_like_probabilities(logits):
                raise ModelError(
                    f"The outputs of the {whose} are probabilities (no row has a negative value, each sums to 1), and soft "
                    f"targets take logits. Take the softmax off the end of the {whose}, or return its logits."
                )
        if student.ndim < 2 or student.shape[-1] < 2:
            raise ModelError(f"Soft targets need logits of shape (…, classes) with at least two, got {tuple(student.shape)}.")
        soft_targets(student, teacher, 1.0)
        if not bool(torch.isfinite(teacher).all()):
            raise ModelError("The teacher returned NaN or Inf on the first batch. Check its weights with whet.inspect.")
        self._is_checked = True


def _wide(logits: Any) -> Any:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
