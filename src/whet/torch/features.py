"""What layers inside two models compute, compared: forward hooks while training, maps trained beside the student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from whet.numerics.losses_attention import Attention
from whet.numerics.losses_layers import LayerLosses, attention_in
from whet.specs import Distill
from whet.torch.attention import hear_attention, plain_attention
from whet.torch.losses import wide
from whet.torch.model import primary
from whet.torch.namespace import xp

_CHANNELS_FIRST = (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d)  # of (n, channels, length)


@contextmanager
def listening(spec: Distill, student: Any, teacher: Any) -> Iterator[Listener]:
    """What `spec` compares inside the models is heard while the block runs; the hooks are gone afterwards.

    `teacher` is None where its outputs alone are known, and the spec compares nothing else.

    Raises:
        ModelError: a name matches no module, or patterns match more modules of the student than of the teacher.
    """
    listener = Listener(spec, student, teacher)
    try:
        yield listener
    finally:
        listener.close()


class Listener:
    """The losses on layers of one `Distill`, from the last forward pass of each model."""

    def __init__(self, spec: Distill, student: Any, teacher: Any) -> None:
        layers = [
            {} if model is None else {name: module for name, module in model.named_modules() if name}
            for model in (student, teacher)
        ]
        self.losses = LayerLosses(spec, *map(list, layers))
        self.maps: dict[str, Any] = {}  # parameters that are trained beside the student's
        self._heard: dict[tuple[int, str], Any] = {}
        self._hooks: list[Any] = []
        for side, modules in enumerate(layers):
            for name in self.losses.heard(side, attention=False):
                self._hooks.append(modules[name].register_forward_hook(self._features(side, name)))
            for name in self.losses.heard(side, attention=True):
                self._hooks += hear_attention(modules[name], self._attention(side, name))
        self._is_bare = not self._hooks

    def close(self) -> None:
        """Remove the hooks and forget what was heard."""
        for hook in self._hooks:
            hook.remove()
        self._heard.clear()

    def running(self) -> Any:
        """The context in which a model runs so that its layers are heard."""
        return nullcontext() if self._is_bare else plain_attention()

    def make_maps(self, outputs: tuple[Any, Any], device: Any) -> None:
        """Make the maps that the losses train, for features as they were last heard."""
        made = self.losses.maps(self._heard, outputs)
        self.maps = {name: nn.Parameter(torch.from_numpy(array).to(device)) for name, array in made.items()}

    def loss(self, student_outputs: Any, teacher_outputs: Any, real: Any = None) -> Any:
        """The weighted sum of the losses on layers after a forward pass of both models; the outputs serve losses without names.

        Raises:
            ModelError: a layer was not called, gives no floating-point tensor, or shapes do not fit.
        """
        outputs = (wide(student_outputs), wide(teacher_outputs))
        return self.losses.total(self._heard, outputs, self.maps, xp=xp, real=real)

    def _features(self, side: int, name: str) -> Any:
        def hear(module: Any, inputs: Any, outputs: Any) -> None:
            found = primary(outputs)
            if isinstance(found, torch.Tensor) and found.is_floating_point() and found.ndim >= 2:
                is_first = found.ndim >= 4 or (found.ndim == 3 and isinstance(module, _CHANNELS_FIRST))
                self._heard[side, name] = wide(found.movedim(1, -1) if is_first else found)
            else:
                self._heard.pop((side, name), None)

        return hear

    def _attention(self, side: int, name: str) -> Any:
        def hear(found: Attention) -> None:
            parts = {part: wide(getattr(found, part)) for part in ("query", "key", "value")}
            self._heard[side, attention_in(name)] = replace(found, **parts)

        return hear
