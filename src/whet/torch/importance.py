"""What criteria ask of a PyTorch model and data: gradients of its weights, and the inputs that these multiply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from whet.data import Batches
from whet.graph.groups import Family
from whet.graph.importance import family_scores
from whet.graph.inputs import statistic
from whet.specs import OBS, Fisher, Movement, UserCriterion
from whet.specs.criteria import FROM_GRADIENTS, FROM_INPUTS
from whet.torch.inputs import InputReader
from whet.torch.model import call, device_of, dtype_of, evaluating, primary, to_tensors
from whet.torch.objective import default_loss

Floats = npt.NDArray[np.float64]
Loss = Callable[[Any, Any], Any]
USER_BATCHES = 8  # that a user's criterion gets gradients of


def scores_of(model: Any, families: Sequence[Family], criterion: Any, data: Batches | None) -> list[Floats]:
    """One score for each group of each family; the lowest leave first.

    Raises:
        SpecError: the criterion needs data and there is none, or batch norms and a family has none.
    """
    tensors = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    scales = {
        f"{path}.weight" if path else "weight"
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._NormBase) and module.weight is not None
    }
    found = {name: tensor.cpu().numpy() for name, tensor in statistics_for(model, criterion, data).items()}
    return family_scores(families, criterion, lambda name: tensors[name].detach().float().cpu().numpy(), found, scales)


def statistics_for(model: Any, criterion: Any, data: Batches | None, loss: Loss | None = None) -> dict[str, Any]:
    """By parameter name what `weight_importance` needs beside the weight, as tensors; the model is unchanged.

    Empty without data, and for criteria that need none. loss: of (outputs, targets); None: the default one.
    """
    if data is None:
        return {}
    if isinstance(criterion, FROM_INPUTS):
        reader = InputReader(model, data, criterion.batches)
        sums = reader.sums(reader.views, isinstance(criterion, OBS))
        return {name: torch.from_numpy(statistic(found, criterion)) for name, found in sums.items()}
    if not isinstance(criterion, (*FROM_GRADIENTS, UserCriterion)):
        return {}
    found = gradients_for(model, data, getattr(criterion, "batches", USER_BATCHES), isinstance(criterion, Fisher), loss)
    if isinstance(criterion, Movement):  # one step of SGD
        return {name: -model.get_parameter(name).detach().float() * gradient for name, gradient in found.items()}
    return found


def gradients_for(
    model: Any, data: Batches, batches: int, squared: bool = False, loss: Loss | None = None, seed: int = 0
) -> dict[str, Any]:
    """By parameter name the mean of ∂L/∂w over some batches, or of its square; the model is unchanged."""
    wanted = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in wanted.items()}
    sums: dict[str, Any] = {}
    chosen = data.some(batches, seed)
    try:
        for p in wanted.values():
            if p.is_floating_point():
                p.requires_grad_(True)
        with evaluating(model):
            for inputs, targets in chosen:
                _add(model, wanted, inputs, targets, squared, sums, loss or _default)
    finally:
        for name, p in wanted.items():
            p.requires_grad_(flags[name])
    return {name: total / len(chosen) for name, total in sums.items()}


def _default(outputs: Any, targets: Any) -> Any:
    return default_loss(primary(outputs), targets)


def _add(
    model: Any, wanted: dict[str, Any], inputs: Any, targets: Any, squared: bool, sums: dict[str, Any], loss: Loss
) -> None:
    with torch.enable_grad():
        outputs = call(model, to_tensors(inputs, device_of(model), dtype_of(model)))
        value = loss(outputs, to_tensors(targets, device_of(model)))
        used = {name: p for name, p in wanted.items() if p.requires_grad}
        gradients = torch.autograd.grad(value, list(used.values()), allow_unused=True)
    for name, gradient in zip(used, gradients, strict=True):
        if gradient is not None:
            found = gradient.detach().float()
            sums[name] = sums.get(name, 0) + (found**2 if squared else found)
