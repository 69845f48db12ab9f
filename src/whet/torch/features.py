"""What layers inside two models compute, compared: forward hooks while training, projectors trained beside the student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from whet.errors import ModelError
from whet.numerics.losses_layers import layer_loss, paired_layers
from whet.specs import Distill, Features
from whet.specs.distillation import LayerLoss
from whet.torch.losses import wide
from whet.torch.model import primary
from whet.torch.namespace import xp

_CHANNELS_FIRST = (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d)  # of (n, channels, length)


@contextmanager
def listening(spec: Distill, student: Any, teacher: Any) -> Iterator[Listener]:
    """What `spec` compares inside the models is heard while the block runs; the hooks are gone afterwards.

    Raises:
        ModelError: a name matches no module, or patterns match different numbers of them.
    """
    listener = Listener(spec, student, teacher)
    try:
        yield listener
    finally:
        listener.close()


class Listener:
    """The losses on layers of one `Distill`, from the last forward pass of each model."""

    def __init__(self, spec: Distill, student: Any, teacher: Any) -> None:
        layers = [{name: module for name, module in model.named_modules() if name} for model in (student, teacher)]
        self._losses = [(loss, paired_layers(loss, *map(list, layers))) for loss in spec.of_layers]
        self._heard: dict[tuple[int, str], Any] = {}
        self._projectors: dict[tuple[int, int], nn.Linear] = {}
        self._hooks = []
        for side, modules in enumerate(layers):
            for name in dict.fromkeys(pair[side] for _, pairs in self._losses for pair in pairs):
                self._hooks.append(modules[name].register_forward_hook(self._hook(side, name)))

    def close(self) -> None:
        """Remove the hooks and forget what was heard."""
        for hook in self._hooks:
            hook.remove()
        self._heard.clear()
        self._projectors.clear()

    def loss(self, student_outputs: Any, teacher_outputs: Any) -> Any:
        """The weighted sum of the losses on layers after a forward pass of both models; the outputs serve losses without names.

        Raises:
            ModelError: a layer was not called, gives no floating-point tensor, or shapes do not fit.
        """
        total: Any = 0.0
        for index, (loss, pairs) in enumerate(self._losses):
            if not pairs:
                total = total + loss.weight * layer_loss(loss, wide(student_outputs), wide(teacher_outputs), xp=xp)
            for number, names in enumerate(pairs):
                student, teacher = (self._features(side, name) for side, name in enumerate(names))
                if isinstance(loss, Features) and student.shape[-1] != teacher.shape[-1]:
                    student = self._projected(loss, (index, number), student, teacher.shape[-1])
                total = total + loss.weight * self._compared(loss, names, student, teacher)
        return total

    def _compared(self, loss: LayerLoss, names: tuple[str, str], student: Any, teacher: Any) -> Any:
        try:
            return layer_loss(loss, student, teacher.detach(), xp=xp)
        except ModelError as error:
            raise ModelError(f"{names[0]!r} of the student and {names[1]!r} of the teacher: {error}") from error

    def _hook(self, side: int, name: str) -> Any:
        def hear(module: Any, inputs: Any, outputs: Any) -> None:
            found = primary(outputs)
            if isinstance(found, torch.Tensor) and found.is_floating_point() and found.ndim >= 2:
                is_first = found.ndim >= 4 or (found.ndim == 3 and isinstance(module, _CHANNELS_FIRST))
                self._heard[side, name] = found.movedim(1, -1) if is_first else found
            else:
                self._heard.pop((side, name), None)

        return hear

    def _features(self, side: int, name: str) -> Any:
        if (side, name) not in self._heard:
            raise ModelError(
                f"The layer {name!r} of the {('student', 'teacher')[side]} was not called, or gave no floating-point tensor "
                "(n, …, channels). Choose another one."
            )
        return wide(self._heard[side, name])

    def _projected(self, loss: Features, key: tuple[int, int], student: Any, channels: int) -> Any:
        if key not in self._projectors:
            self._projectors[key] = _projector(student.shape[-1], channels, loss.learning_rate, student.device)
        return self._projectors[key](student)


def _projector(inputs: int, outputs: int, learning_rate: float, device: Any) -> nn.Linear:
    """A linear map of the channels. Its parameters take their step of Adam when their gradients are there."""
    layer = nn.Linear(inputs, outputs).to(device)
    for parameter in layer.parameters():
        optimizer = torch.optim.Adam([parameter], lr=learning_rate)
        parameter.register_post_accumulate_grad_hook(_stepping(optimizer))
    return layer


def _stepping(optimizer: Any) -> Any:
    def step(parameter: Any) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
