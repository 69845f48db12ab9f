"""The loss of one batch: the user's or the default one, alone or beside a teacher's."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from whet.errors import DataError, ModelError
from whet.specs import Train
from whet.torch.distill import IGNORED, Teacher, classes_last, look_like_probabilities
from whet.torch.model import call, describe, primary, to_tensors
from whet.torch.regularizers import group_lasso


class Objective:
    """`student_weight · loss(outputs, targets) + (1 - student_weight) · distillation`, or the loss alone without a teacher."""

    def __init__(self, spec: Train, teacher: Teacher | None, device: Any, dtype: Any) -> None:
        self._spec, self._teacher, self._device, self._dtype = spec, teacher, device, dtype
        self._is_checked = False

    def __call__(self, model: Any, inputs: Any, targets: Any, forward: Any = None) -> Any:
        """The scalar loss on one batch of arrays, with its history. forward: what computes for `model`, where it is compiled.

        Raises:
            DataError: targets are missing or do not fit the outputs. ModelError: the loss cannot train the model.
        """
        outputs = call(model if forward is None else forward, to_tensors(inputs, self._device, self._dtype))
        targets = to_tensors(targets, self._device)
        weight = 1.0 if self._spec.distill is None else self._spec.distill.student_weight
        total: Any = 0.0
        if weight > 0:
            total = weight * self._supervised(outputs, targets)
        if self._teacher is not None and weight < 1:
            total = total + (1 - weight) * self._teacher.loss(outputs, inputs, targets)
        if self._spec.group_lasso is not None:
            total = total + group_lasso(model, self._spec.group_lasso.strength)
        if not total.requires_grad:
            raise ModelError(
                "The loss does not depend on any trainable weight. Set requires_grad=True where training may change."
            )
        return total

    def groups(self) -> list[dict[str, Any]]:
        """What the teacher's losses train beside the model, as groups of its optimizer."""
        return [] if self._teacher is None else self._teacher.groups(self._spec.rate)

    @property
    def notes(self) -> list[str]:
        """What is to be told of the teacher."""
        return [] if self._teacher is None else self._teacher.notes

    def state(self) -> Any:
        """What the teacher's losses have learned, as a tree of tensors; None without a teacher."""
        return None if self._teacher is None else self._teacher.state()

    def load(self, state: Any) -> None:
        """Go on from `state`."""
        if self._teacher is not None:
            self._teacher.load(state)

    def _supervised(self, outputs: Any, targets: Any) -> Any:
        if self._spec.loss is None:
            logits = primary(outputs)
            if not self._is_checked and _is_integer(targets) and look_like_probabilities(logits):
                raise ModelError(
                    "The model's outputs are probabilities (no row has a negative value, each sums to 1), and the default loss "
                    "takes logits. Take the softmax off the model's end, or pass Train(loss=…)."
                )
            self._is_checked = True
            return default_loss(logits, targets)
        loss = self._spec.loss(outputs, targets)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
            raise ModelError(f"Train.loss must return a scalar tensor, got {got}. Average it over the batch.")
        return loss.reshape(())


def default_loss(outputs: Any, targets: Any) -> Any:
    """Cross-entropy on logits for integer targets (-100 is ignored), else the mean squared error. Computed in float32.

    Shapes: logits (n, …, classes) or (n, classes, …) with targets (n, …); otherwise outputs and targets of one size.

    Raises:
        DataError: they do not fit.
    """
    if not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
        hint = "The batches have no targets" if targets is None else "The default loss takes one tensor of targets"
        raise DataError(
            f"{hint} (outputs {describe(outputs)}, targets {describe(targets)}). Pass batches of (inputs, targets), "
            "a loss of your own as Train(loss=…), or Distill(student_weight=0) to learn from the teacher alone."
        )
    outputs = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
    if not _is_integer(targets):
        if outputs.numel() != targets.numel():
            raise DataError(f"Targets of shape {tuple(targets.shape)} do not fit outputs of shape {tuple(outputs.shape)}.")
        # Of one shape: (n, 1) beside (n,) would broadcast to (n, n).
        return functional.mse_loss(outputs, targets.reshape(outputs.shape).to(outputs.dtype))
    if targets.ndim == outputs.ndim and targets.shape[-1] == 1:
        targets = targets[..., 0]
    logits = classes_last(outputs, targets)
    if logits.ndim < 2 or logits.shape[-1] < 2 or logits.shape[:-1] != targets.shape:
        raise DataError(
            f"Integer targets of shape {tuple(targets.shape)} need logits of shape (n, classes) with at least two classes, got "
            f"{tuple(outputs.shape)}. For one logit pass Train(loss=…) with a binary cross-entropy, for numbers float targets."
        )
    logits, labels = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long()
    real = labels[labels != IGNORED]
    if len(real) == 0:
        return logits.sum() * 0
    if int(real.min()) < 0 or int(real.max()) >= logits.shape[-1]:
        raise DataError(
            f"Targets must be classes from 0 to {logits.shape[-1] - 1} (the model has {logits.shape[-1]} outputs) or -100 "
            f"(ignored), got {int(real.min())} to {int(real.max())}."
        )
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED)


def _is_integer(targets: Any) -> bool:
    return isinstance(targets, torch.Tensor) and not targets.is_floating_point() and targets.dtype != torch.bool
