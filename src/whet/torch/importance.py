"""The score of every coupling group of a PyTorch model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from whet.data import Batches
from whet.errors import DataError, SpecError
from whet.graph.groups import Family, Member
from whet.numerics.criteria import geometric_median, group_norm, random_scores, weight_importance
from whet.specs import BatchNormScale, Fisher, GeometricMedian, Magnitude, Random, Taylor, UserCriterion
from whet.torch.model import call, device_of, dtype_of, evaluating, primary, to_tensors
from whet.torch.namespace import xp
from whet.torch.objective import default_loss

Floats = npt.NDArray[np.float64]


def scores_of(model: Any, families: Sequence[Family], criterion: Any, data: Batches | None) -> list[Floats]:
    """One score for each group of each family; the lowest leave first.

    Raises:
        SpecError: the criterion needs data and there is none, or batch norms and a family has none.
    """
    tensors = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    if isinstance(criterion, Random):
        return [random_scores(criterion.seed, i, (len(family),)) for i, family in enumerate(families)]
    if isinstance(criterion, BatchNormScale):
        return [_scale(model, family) for family in families]
    if isinstance(criterion, GeometricMedian):
        return [geometric_median(_filters(tensors, family)) for family in families]
    gradients = gradients_for(model, criterion, data)
    if isinstance(criterion, Taylor | Fisher) and not gradients:
        raise SpecError(f"The criterion {type(criterion).__name__} needs data: pass train= batches of (inputs, targets).")
    power = criterion.p if isinstance(criterion, Magnitude) else 1
    vectors: dict[tuple[str, int], Floats] = {}

    def part(member: Member) -> Floats:
        where = (member.tensor, member.axis)
        if where not in vectors:
            weight = tensors[member.tensor].detach().float()
            score = weight_importance(criterion, weight, gradients.get(member.tensor), xp=xp).abs() ** power
            others = [d for d in range(score.ndim) if d != member.axis]
            vectors[where] = (score.sum(others) if others else score).double().cpu().numpy()
        found: Floats = vectors[where][member.positions].sum(1)
        return found

    return [group_norm([part(member) for member in _weights(tensors, family)], power) for family in families]


def _weights(tensors: dict[str, Any], family: Family) -> list[Member]:
    """The members that are weights; all parameters where there are none."""
    own = [member for member in family.members if member.is_parameter]
    return [member for member in own if tensors[member.tensor].ndim > 1] or own


def _filters(tensors: dict[str, Any], family: Family) -> Floats:
    """The weights that produce each group, flat: (groups, size)."""
    member = family.members[0]
    rows = tensors[member.tensor].detach().movedim(member.axis, 0).flatten(1) if tensors[member.tensor].ndim > 1 else None
    if rows is None:
        rows = tensors[member.tensor].detach()[:, None]
    chosen = rows[torch.from_numpy(np.ascontiguousarray(member.positions)).to(rows.device)]
    found: Floats = chosen.flatten(1).double().cpu().numpy()
    return found


def _scale(model: Any, family: Family) -> Floats:
    """`Σ |γ|` of the batch norms on a family's channels."""
    norms = {
        f"{path}.weight" if path else "weight": module.weight
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._NormBase) and module.weight is not None
    }
    found = [member for member in family.members if member.tensor in norms]
    if not found:
        raise SpecError(
            f"BatchNormScale needs a batch norm behind every pruned layer, and {family.layer} has none. Name it in keep=, or "
            "take Magnitude()."
        )
    return group_norm([norms[m.tensor].detach().abs().double().cpu().numpy()[m.positions].sum(1) for m in found], 1)


def gradients_for(model: Any, criterion: Any, data: Batches | None) -> dict[str, Any]:
    """By parameter name the mean of ∂L/∂w over some batches, of its square for Fisher; the model is unchanged.

    Empty without data, and for criteria that need none.
    """
    if data is None or not isinstance(criterion, Taylor | Fisher | UserCriterion):
        return {}
    wanted = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in wanted.items()}
    sums: dict[str, Any] = {}
    count = 0
    try:
        for p in wanted.values():
            if p.is_floating_point():
                p.requires_grad_(True)
        with evaluating(model):
            for count, (inputs, targets) in enumerate(data, 1):
                _add(model, wanted, inputs, targets, isinstance(criterion, Fisher), sums)
                if count >= getattr(criterion, "batches", 8):
                    break
    finally:
        for name, p in wanted.items():
            p.requires_grad_(flags[name])
    if not count:
        raise DataError("train= held no batches.")
    return {name: total / count for name, total in sums.items()}


def _add(model: Any, wanted: dict[str, Any], inputs: Any, targets: Any, squared: bool, sums: dict[str, Any]) -> None:
    with torch.enable_grad():
        outputs = call(model, to_tensors(inputs, device_of(model), dtype_of(model)))
        loss = default_loss(primary(outputs), to_tensors(targets, device_of(model)))
        used = {name: p for name, p in wanted.items() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(used.values()), allow_unused=True)
    for name, gradient in zip(used, gradients, strict=True):
        if gradient is not None:
            value = gradient.detach().float()
            sums[name] = sums.get(name, 0) + (value**2 if squared else value)
