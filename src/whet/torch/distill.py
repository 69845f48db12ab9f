"""Distillation: a student learns from its teacher's outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from whet.errors import ModelError
from whet.numerics.losses_table import NEEDS_CLASSES, check_shapes, looks_like_sigmoid, warn_if_swapped
from whet.specs import BinarySoftTargets, Distill
from whet.torch.features import Listener, listening
from whet.torch.losses import distillation_loss
from whet.torch.model import call, copy, device_of, dtype_of, evaluating, primary, to_numpy, to_tensors

IGNORED = -100  # targets with this value (padding) count in no loss, as in torch's cross_entropy


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
    warn_if_swapped(*(sum(tensor.numel() for tensor in model.parameters()) for model in (student, teacher)))
    with evaluating(teacher), listening(spec, student, teacher) as listener:
        yield Teacher(spec, teacher, device, listener)


class Teacher:
    """The losses of a `Distill`. The teacher runs in inference mode without gradients, whatever mode was set since."""

    def __init__(self, spec: Distill, model: Any, device: Any, listener: Listener) -> None:
        self._spec, self._model, self._device, self._listener = spec, model, device, listener
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
        labels, real = _labels(targets, student)
        if not self._is_checked:
            self._check(student, teacher, labels)
        self.logits = teacher
        total: Any = self._listener.loss(student, teacher)
        for loss in self._spec.of_outputs:
            total = total + loss.weight * distillation_loss(loss, student, teacher, labels, mask=real)
        return total

    def _outputs(self, inputs: Any) -> Any:
        if any(module.training for module in self._model.modules()):
            self._model.eval()
        with torch.no_grad():
            return primary(call(self._model, to_tensors(inputs, self._device, dtype_of(self._model))))

    def _check(self, student: Any, teacher: Any, labels: Any) -> None:
        for loss in self._spec.of_outputs:
            name = type(loss).__name__
            for whose, logits in (("teacher", teacher), ("student", student)):
                if isinstance(loss, NEEDS_CLASSES) and look_like_probabilities(logits):
                    raise ModelError(
                        f"The outputs of the {whose} are probabilities (no row has a negative value, each sums to 1), and "
                        f"{name} takes logits. Take the softmax off the end of the {whose}, or return its logits."
                    )
                if isinstance(loss, BinarySoftTargets) and looks_like_sigmoid(to_numpy(logits)):
                    raise ModelError(
                        f"The outputs of the {whose} all lie between 0 and 1, as behind a sigmoid, and {name} takes logits. "
                        f"Take the sigmoid off the end of the {whose}."
                    )
            check_shapes(loss, student.shape, teacher.shape, None if labels is None else labels.shape)
        if not bool(torch.isfinite(teacher).all()):
            raise ModelError("The teacher returned NaN or Inf on the first batch. Check its weights with whet.inspect.")
        self._is_checked = True


def _labels(targets: Any, student: Any) -> tuple[Any, Any]:
    """Integer targets of the rows of `student` (…, classes) and where they are real, not padding; None where there are none."""
    if not isinstance(targets, torch.Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        return None, None
    if targets.ndim == student.ndim and targets.shape[-1] == 1:
        targets = targets[..., 0]
    return (targets, targets != IGNORED) if targets.shape == student.shape[:-1] else (None, None)
