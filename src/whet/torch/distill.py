"""Distillation: a student learns from its teacher's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from whet.errors import ModelError
from whet.graph.teacher_store import StoredOutputs
from whet.graph.teaching import TINY, check_teachers, notes_of, padding_of
from whet.numerics.losses_table import NEEDS_CLASSES, are_probabilities, check_shapes, looks_like_sigmoid
from whet.numerics.teachers import joined
from whet.specs import BinarySoftTargets, Distill, TeacherSubsets
from whet.specs.distillation import Loss
from whet.torch.features import Listener, listening
from whet.torch.losses import distillation_loss
from whet.torch.model import call, copy, device_of, dtype_of, evaluating, primary, to_numpy, to_tensors
from whet.torch.namespace import xp

IGNORED = -100  # targets with this value (padding) count in no loss, as in torch's cross_entropy


def classes_last(logits: Any, targets: Any) -> Any:
    """`logits` with the classes as last axis: of (n, classes, …) and targets (n, …) axis 1 is moved there."""
    if targets is None or not isinstance(targets, torch.Tensor) or logits.ndim < 3 or logits.shape[:-1] == targets.shape:
        return logits
    return logits.movedim(1, -1) if (logits.shape[0], *logits.shape[2:]) == tuple(targets.shape) else logits


def look_like_probabilities(outputs: Any) -> bool:
    """Whether `outputs` (…, classes) went through a softmax: at least two classes, none negative, rows that sum to 1."""
    if not isinstance(outputs, torch.Tensor) or not outputs.is_floating_point():
        return False
    return are_probabilities(to_numpy(outputs), 1e-2 if outputs.dtype in (torch.float16, torch.bfloat16) else 1e-4)


@contextmanager
def teaching(
    spec: Distill | None, teacher: Any, student: Any, device: Any, compiled: Callable[[Any], Any] | None = None
) -> Iterator[Teacher | None]:
    """The teacher of `spec`, a model, `StoredOutputs` or a tuple of them, on `device` in the block; None without a spec.

    A teacher handed in is never moved or changed: on another device, and in training mode, a copy of it teaches, and every
    module's mode comes back afterwards. compiled: what compiles a model, where teachers are to be.

    Raises:
        ModelError: there is no teacher, it shares weights with the student, or several are to be heard inside.
    """
    if spec is None:
        yield None
        return
    given = teacher if isinstance(teacher, tuple) else (teacher,)
    check_teachers(spec, given, torch.nn.Module, "a torch.nn.Module", _parameters(student), _parameters)
    models = [_placed(one, spec, device) if isinstance(one, torch.nn.Module) else one for one in given]
    live = [model for model in models if isinstance(model, torch.nn.Module)]
    with ExitStack() as stack:
        for model in live:
            stack.enter_context(evaluating(model))
            model.train(spec.teacher_training)
        listener = stack.enter_context(listening(spec, student, live[0] if live else None))
        if compiled is not None:
            models = [compiled(one) if isinstance(one, torch.nn.Module) else one for one in models]
        yield Teacher(spec, models, device, listener)


def _parameters(model: Any) -> dict[str, Any]:
    return dict(model.named_parameters())


def _placed(model: Any, spec: Distill, device: Any) -> Any:
    """`model`, or a copy of it where it would have to be moved or would change."""
    if device_of(model) != device or spec.teacher_training:
        return copy(model).to(device)
    return model


class Teacher:
    """The losses of a `Distill`. The teachers run without gradients, in the spec's mode whatever mode was set since."""

    def __init__(self, spec: Distill, sources: Sequence[Any], device: Any, listener: Listener) -> None:
        self._spec, self._sources, self._device, self._listener = spec, sources, device, listener
        self.notes = [*listener.losses.notes(), *notes_of(sources)]

    def begin(self, student: Any, inputs: Any, targets: Any) -> None:
        """Look at the first batch (arrays): run both models in inference mode, and make the maps that losses train.

        Raises:
            ModelError: outputs that cannot be compared, labels that are missing, NaN, or a layer that is not called.
        """
        targets = to_tensors(targets, self._device)
        with evaluating(student), torch.no_grad(), self._listener.running():
            outputs = primary(call(student, to_tensors(inputs, self._device, dtype_of(student))))
            found, taught, labels, _ = self._arranged(outputs, inputs, targets, check=True)
            for loss in self._spec.of_outputs:
                _check_logits(loss, "student", found)
                check_shapes(loss, found.shape, taught.shape, None if labels is None else labels.shape)
            self._listener.make_maps((found, taught), self._device)
            self._listener.loss(found, taught)

    def loss(self, outputs: Any, inputs: Any, targets: Any) -> Any:
        """The sum of the distillation losses on one batch: `outputs` of the student on `inputs` (arrays)."""
        student, teacher, labels, real = self._arranged(primary(outputs), inputs, targets)
        total: Any = self._listener.loss(student, teacher, real) if self._listener.losses else 0.0
        for loss in self._spec.of_outputs:
            total = total + loss.weight * distillation_loss(loss, student, teacher, labels, mask=real)
        return total

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """What losses train beside the student, as groups of an optimizer; `relative` is their rate over the student's."""
        rates, maps = self._listener.losses.rates(), self._listener.maps
        return [
            {
                "params": [maps[name] for name in maps if name.partition("/")[0] == key],
                "weight_decay": 0.0,
                "relative": rate / learning_rate,
            }
            for key, rate in rates.items()
            if any(name.partition("/")[0] == key for name in maps)
        ]

    def state(self) -> Any:
        """What its losses on layers have learned, as a tree of tensors."""
        return dict(self._listener.maps)

    def load(self, state: Any) -> None:
        """Go on from `state`."""
        with torch.no_grad():
            for name, tensor in state.items():
                self._listener.maps[name].copy_(tensor)

    def _arranged(self, student: Any, inputs: Any, targets: Any, check: bool = False) -> tuple[Any, Any, Any, Any]:
        """Student and teachers (…, classes), integer labels of the rows, and which rows are real; None where all are."""
        found = [self._outputs(source, inputs) for source in self._sources]
        if not all(isinstance(one, torch.Tensor) for one in (student, *found)):
            raise ModelError(
                "Student and teacher must return logits: a tensor, or a structure whose `logits` or first entry is one."
            )
        if check:
            for one, source in zip(found, self._sources, strict=True):
                self._check(one, source)
        student, found = classes_last(student, targets), [classes_last(one, targets) for one in found]
        labels, real = _labels(targets, student)
        teacher = found[0]
        if len(found) > 1 or isinstance(self._spec.teachers, TeacherSubsets):
            wide = [one.float() for one in found]
            teacher = joined(self._spec.teachers, wide, labels, classes=student.shape[-1], xp=xp)
        if real is None:
            padding = padding_of(inputs, tuple(student.shape[:-1]))
            real = None if padding is None else torch.from_numpy(padding).to(self._device)
        return student, teacher, labels, real

    def _outputs(self, source: Any, inputs: Any) -> Any:
        if isinstance(source, StoredOutputs):
            logits = torch.from_numpy(source.outputs(inputs)).to(self._device)
            return torch.log(logits.clamp_min(TINY)) if source.is_normalized and self._takes_logits else logits
        if any(module.training != self._spec.teacher_training for module in source.modules()):
            source.train(self._spec.teacher_training)
        with torch.no_grad(), self._listener.running():
            return primary(call(source, to_tensors(inputs, self._device, dtype_of(source))))

    @property
    def _takes_logits(self) -> bool:
        return any(isinstance(loss, NEEDS_CLASSES) for loss in self._spec.of_outputs)

    def _check(self, logits: Any, source: Any) -> None:
        if not bool(torch.isfinite(logits).all()):
            raise ModelError("The teacher returned NaN or Inf on the first batch. Check its weights with whet.inspect.")
        if not isinstance(source, StoredOutputs):
            for loss in self._spec.of_outputs:
                _check_logits(loss, "teacher", logits)


def _check_logits(loss: Loss, whose: str, logits: Any) -> None:
    """Raise `ModelError` where `loss` takes logits, and these are not."""
    name = type(loss).__name__
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


def _labels(targets: Any, student: Any) -> tuple[Any, Any]:
    """Integer targets of the rows of `student` (…, classes) and where they are real, not padding; None where there are none."""
    if not isinstance(targets, torch.Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        return None, None
    if targets.ndim == student.ndim and targets.shape[-1] == 1:
        targets = targets[..., 0]
    return (targets, targets != IGNORED) if targets.shape == student.shape[:-1] else (None, None)
