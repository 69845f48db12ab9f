"""Quantization-aware training of PyTorch models: prepare, train in any way, and take scales and weights back.

A prepared model is a copy of the user's own class with hooks: batch norms are folded from the first step on (those that cannot
be folded compute with their running statistics), weights are rounded where they are read, and values where they are
produced. In training mode scales and weights learn; in evaluation mode it computes exactly what `simulate` does with the
scales of the moment. It begins at the post-training solution. Afterwards the trained weights go into a float model and the
scales into its plan, from which everything else is derived.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from whet.data import Batches
from whet.errors import DataError, ModelError, SpecError
from whet.graph.epochs import TrainingRun
from whet.graph.learning import check_trainable, into_bins, moved_values, observed_steps
from whet.graph.placement import Placement, Plan, place, rules_for
from whet.graph.solve import described, stored_weight
from whet.graph.views import Masks, WeightView
from whet.numerics.affine import QParams
from whet.records import Step
from whet.specs import Quantize, Target, Train, find_target, to_dict
from whet.specs.quantization import QAT
from whet.torch.fold import fold_, folded_weights
from whet.torch.interception import interceptor_of
from whet.torch.learner import Learner, ValueState, WeightState, safe
from whet.torch.model import copy, validate
from whet.torch.posttraining import quantize
from whet.torch.quantize import float_weights, plan_tensors, replace_
from whet.torch.trace import trace
from whet.torch.training import train as run_training

Tensor = Any


def prepare(
    model: Any,
    spec: Quantize,
    *,
    calibration: Any = None,
    target: str | Target | None = None,
    example: Any = None,
    masks: Masks | None = None,
    steps: int | None = None,
    progress: bool = True,
) -> Any:
    """A copy of `model` that trains as it will be quantized: train it in your own loop, then `finish` it.

    ```python
    prepared = whet.torch.prepare(model, Quantize(Int(4), qat=QAT()), calibration=images)
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-4)
    ...                                     # prepared.train(), your loop; prepared.eval() is the quantized model
    float_model, plan = whet.torch.finish(prepared)
    ```
    It begins at the post-training solution of `spec`. Learned scales are parameters (`weight_factor`, `quantize_…_factor`) that
    optimizers, `state_dict`, deepcopy and DistributedDataParallel see; what they are factors of, and observed ranges, are
    buffers. Weights that `masks` removes stay zero; a `Compressed` brings its own masks. steps: all training steps, needed for
    `QAT(observe=…)`. To resume, prepare the same model in the same way and load the `state_dict`.

    Raises:
        SpecError: a scheme that does not train, or `observe` without `steps`.
        DataError, ModelError: as in `quantize`.
    """
    masks = getattr(model, "masks", {}) if masks is None else masks
    model = getattr(model, "float_model", model)
    validate(model)
    rules = find_target(target, "torch")
    batches = None if calibration is None else Batches(calibration, "calibration")
    if example is not None:
        example, _ = Batches([example], "example").first()
    elif batches is not None:
        example, _ = batches.first()
    else:
        raise DataError("prepare() traces the model and needs a batch: pass calibration= or example=.")
    plan, _ = quantize(model, spec, rules, calibration=batches, example=example, progress=progress)
    return prepared_for(model, plan, rules, masks=masks, steps=steps, example=example)


def prepared_for(model: Any, plan: Plan, target: Target, *, masks: Masks, steps: int | None, example: Any) -> Any:
    """A copy of `model` that trains from `plan` on; 16-bit floats train in float32."""
    qat = plan.spec.qat or QAT()
    observe = observed_steps(qat, steps)
    check_trainable(plan)
    graph = trace(model, example, None, progress=False).calibration.graph
    placement = place(graph, rules_for(target, plan.spec), plan.spec)
    work = copy(model)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in work.parameters()):
        work.float()
    exact = float_weights(work, plan)
    bare = [layer for _, layer in plan.folds if work.get_submodule(layer).bias is None]
    fold_(work, dict(plan.folds), exact)
    replace_(plan_tensors(work, plan), plan)
    frozen = _freeze_norms(work, plan)
    tensors = plan_tensors(work, plan)
    weights = {name: _weight_state(work, tensors, name, plan, qat, masks.get(name)) for name in {**plan.weights, **masks}}
    values = _value_states(work, plan, placement, qat, observe)
    moved = moved_values(graph, placement.values)
    Learner(work, plan, weights, values, {v for v in plan.values if v in moved}, tuple(bare), frozen)
    return work


def _freeze_norms(model: Any, plan: Plan) -> tuple[str, ...]:
    """Folded batch norms are passed over: their parameters do not train. The names of those that did."""
    names = []
    for norm, _ in plan.folds:
        for own, parameter in model.get_submodule(norm).named_parameters(recurse=False):
            if parameter.requires_grad:
                names.append(f"{norm}.{own}")
                parameter.requires_grad_(False)
    return tuple(names)


def _owner(model: Any, name: str) -> tuple[Any, str, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last, f"{path}." if path else ""


def _weight_state(model: Any, tensors: dict[str, Tensor], name: str, plan: Plan, qat: QAT, mask: Any) -> WeightState:
    """Scales and mask beside a weight, which is moved to where its nearest codes are those of the plan."""
    if name not in tensors:
        raise ModelError(f"A mask is for {name!r}, which this model does not have. Masks belong to the model they came from.")
    weight, params = tensors[name], plan.weights.get(name)
    module, last, prefix = _owner(model, name)
    masked = None
    if mask is not None:
        module.register_buffer(f"{last}_mask", torch.as_tensor(mask, device=weight.device) != 0)
        masked = f"{prefix}{last}_mask"
    if not isinstance(params, QParams):
        return WeightState(None, None, None, masked)
    if name in plan.codes:
        array = into_bins(weight.detach().cpu().numpy(), params, plan.codes[name])
        with torch.no_grad():
            weight.copy_(torch.from_numpy(array))
    scale = params.scale if params.group is not None else params.broadcast(tuple(weight.shape))[0]
    base = torch.from_numpy(np.array(scale, ndmin=1)).to(weight.device)  # FSDP shards no scalars
    module.register_buffer(f"{last}_base", base)
    if qat.learn_scale:
        module.register_parameter(f"{last}_factor", torch.nn.Parameter(torch.ones_like(base), weight.requires_grad))
    zero = None
    if not params.spec.symmetric:
        zeros = params.zero_point if params.group is not None else params.broadcast(tuple(weight.shape))[1]
        module.register_buffer(f"{last}_zero_point", torch.from_numpy(np.array(zeros, np.float32, ndmin=1)).to(weight.device))
        zero = f"{prefix}{last}_zero_point"
    return WeightState(f"{prefix}{last}_base", f"{prefix}{last}_factor" if qat.learn_scale else None, zero, masked)


def _value_states(model: Any, plan: Plan, placement: Placement, qat: QAT, observe: int) -> dict[str, ValueState]:
    """The quantizer of every value; those of one group share it. State lies on the model itself."""
    members: dict[int, list[str]] = {}
    for value, params in plan.values.items():
        members.setdefault(id(params), []).append(value)
    device = next(model.parameters()).device
    taken: set[str] = set()
    states: dict[str, ValueState] = {}
    for values in members.values():
        name = f"quantize_{safe(values[0])}"
        while name in taken:
            name += "_"
        taken.add(name)
        params = plan.values[values[0]]
        fixed = placement.values.get(values[0]) in placement.fixed
        watched = [value for value in values if value not in placement.clipped]
        learns, observes = qat.learn_scale and not fixed, 0 if fixed else observe
        model.register_buffer(f"{name}_base", torch.tensor([float(params.scale)], device=device))
        model.register_buffer(f"{name}_zero_point", torch.tensor([float(params.zero_point)], device=device))
        if learns:
            model.register_parameter(f"{name}_factor", torch.nn.Parameter(torch.ones(1, device=device)))
        if observes:
            ends = [(code - int(params.zero_point)) * float(params.scale) for code in (params.spec.qmin, params.spec.qmax)]
            for kind, end in (("low", ends[0]), ("high", ends[1]), ("seen", 0.0)):
                model.register_buffer(f"{name}_{kind}", torch.full((len(watched),), end, device=device))
        for value in values:
            index = watched.index(value) if value in watched else None
            states[value] = ValueState(name, params.spec, learns, observes, index)
    return states


def finish(prepared: Any) -> tuple[Any, Plan]:
    """The float model with the trained weights, and the plan with the trained scales, of a model that `prepare` made.

    The float model is a copy of the user's class without hooks. Where a batch norm was folded, it is set to do nothing but add
    its offset: folding it again gives the trained weights to the last bit.

    Raises:
        ModelError: `prepared` was not made by `prepare`, or its weights are not finite.
    """
    if not isinstance(interceptor_of(prepared), Learner):
        raise ModelError(
            f"This {type(prepared).__name__} was not made by whet.torch.prepare. Of a DistributedDataParallel or compiled "
            "model pass what was wrapped (model.module, model._orig_mod); to resume, prepare the same model again and call "
            "load_state_dict."
        )
    work = copy(prepared)
    learner: Any = interceptor_of(work)
    learner.detach_()
    _check_finite(work)
    plan = learner.present()
    learner.bake_()
    for norm, layer in plan.folds:
        _unfold_(work.get_submodule(norm), work.get_submodule(layer), bare=layer in learner.bare)
    own = dict(work.named_parameters())
    for name in learner.frozen:
        own[name].requires_grad_(True)
    return work, plan


def _check_finite(model: Any) -> None:
    for name, tensor in model.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"The trained {name!r} holds NaN or Inf: training diverged. Lower the learning rate.")


def _tensors(model: Any) -> dict[str, Tensor]:
    """The parameters and buffers of a model by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _unfold_(norm: Any, layer: Any, *, bare: bool) -> None:
    """*In place*: the batch norm adds the layer's bias and does nothing else.

    Its variance is 1 - ε in float32, so that γ / √(σ² + ε) is 1 to within 2⁻²⁶, and a product with it rounds to what it was.
    """
    with torch.no_grad():
        bias = layer.bias.detach().clone()
        norm.running_var.fill_(1.0 - norm.eps)
        norm.running_mean.zero_()
        if norm.weight is not None:
            norm.weight.fill_(1.0)
        if norm.bias is not None:
            norm.bias.copy_(bias)
        else:
            norm.running_mean.copy_(-bias)
        if bare:
            layer.bias = None
        else:
            layer.bias.zero_()


def quantize_aware(model: Any, spec: Quantize, plan: Plan, fit: Train, run: TrainingRun) -> tuple[Plan, Step]:
    """*In place*: train `model` from `plan` on as `fit` says; the plan with the trained scales, and what was done.

    `teacher`, where `fit` distills, is the original. Masks are kept. No epoch is best before ranges are frozen.

    Raises:
        SpecError: a scheme that does not train. ModelError, DataError: as in `train`.
    """
    started = time.perf_counter()
    if fit.compile:
        raise SpecError(
            "Train(compile=…) cannot be used in quantization-aware training: the quantizers are hooks that torch.compile does "
            "not trace, and nothing would be compiled. Leave compile out of fit=."
        )
    target = find_target(plan.target, "torch")
    example, _ = run.train.first()
    steps = fit.epochs * len(run.train)
    prepared = prepared_for(model, plan, target, masks=run.masks, steps=steps, example=example)
    _, trained = run_training(prepared, fit, replace(run, settled=observed_steps(spec.qat or QAT(), steps)))
    finished, plan = finish(prepared)
    with torch.no_grad():
        own = _tensors(model)
        for name, tensor in _tensors(finished).items():
            own[name].data = tensor.detach().to(own[name].device)
    step = Step(to_dict(spec), _rows(model, plan), (), time.perf_counter() - started, trained.train, ())
    return plan, step


def _rows(model: Any, plan: Plan) -> tuple[dict[str, Any], ...]:
    """What the step changed: each weight with its scheme and the error of its rounding."""
    folded, tensors = folded_weights(model, dict(plan.folds)), _tensors(model)
    rows = []
    for name, params in plan.weights.items():
        array = (folded[name] if name in folded else tensors[name]).detach().float().cpu().numpy()
        view = WeightView(name, name, array, 0, None)
        row = {"name": name, "parameters": array.size, "scheme": described(params), "bits": params.bits}
        rows.append(row | stored_weight(view, params) | {"algorithm": "QAT"})
    return tuple(rows)
