"""Quantization-aware training of Keras models: prepare, train in any way, and take scales and weights back.

The prepared model is the flat program that is simulated: batch norm folded from the first step on (what is left of it is
frozen), kernels rounded where their layers read them, quantizers between the layers. It begins at the post-training solution.
Afterwards the trained weights go into a float model and the scales into its plan, from which everything else is derived.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from whet.data import Batches
from whet.errors import DataError, ModelError
from whet.graph.epochs import TrainingRun
from whet.graph.learning import check_trainable, into_bins, moved_values, observed_steps, with_room
from whet.graph.nodes import Graph
from whet.graph.placement import Placement, Plan, place, rules_for
from whet.graph.solve import described, stored_weight
from whet.graph.views import Masks, WeightView
from whet.keras.clone import Layer, Model, Program, Ref, Tensor, assemble, safe
from whet.keras.learned import STATE, TRAINED, BiasSource, LearnedQuantize, add_quantizer_state, kernel_scale, quantized_class
from whet.keras.model import copy
from whet.keras.posttraining import quantize
from whet.keras.quantize import FakeQuantize, planned, quantized_view, rounded_weights
from whet.keras.training import train as run_training
from whet.keras.variables import holder
from whet.keras.views import kernels, own_weights, to_numpy, walk
from whet.numerics.affine import SCALE_FLOOR, QParams
from whet.records import Step
from whet.specs import Quantize, Target, Train, find_target, to_dict
from whet.specs.quantization import QAT

WEIGHTED = ("conv", "conv_transpose", "linear")


@dataclass(frozen=True, slots=True, eq=False)
class Preparation:
    """What `finish` needs to take a prepared model apart again."""

    model: Model  # the float model, whose weights are not yet trained
    plan: Plan  # the post-training solution
    program: Program  # whose layers the prepared model is made of
    kernels: dict[str, Layer]  # weight name -> the layer that holds it
    groups: dict[str, LearnedQuantize]  # group -> its quantizer
    placement: Placement


def prepare(
    model: Model,
    spec: Quantize,
    *,
    calibration: Any = None,
    target: str | Target | None = None,
    example: Any = None,
    masks: Masks | None = None,
    steps: int | None = None,
    progress: bool = True,
) -> Model:
    """A Keras model that trains as it will be quantized: compile and fit it as you like, then `finish` or `convert` it.

    ```python
    prepared = whet.keras.prepare(model, Quantize(Int(4), qat=QAT()), calibration=images)
    prepared.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    prepared.fit(x, y, epochs=3)
    float_model, plan = whet.keras.finish(prepared)
    ```
    It begins at the post-training solution of `spec` and computes in float32. Weights that `masks` removes stay zero; a
    `Compressed` brings its own masks. steps: all training steps, needed for `QAT(observe=…)`. `save_weights` and `load_weights`
    resume: prepare the same model in the same way, and load. Under a `tf.distribute` strategy call it in its scope.

    Raises:
        SpecError: a scheme that does not train, or `observe` without `steps`.
        DataError, ModelError: as in `quantize`.
    """
    masks = getattr(model, "masks", {}) if masks is None else masks
    model = getattr(model, "float_model", model)
    rules = find_target(target, "keras")
    batches = None if calibration is None else Batches(calibration, "calibration")
    if example is None:
        if batches is None:
            raise DataError("prepare() traces the model and needs a batch: pass calibration= or example=.")
        example, _ = batches.first()
    plan, _ = quantize(model, spec, rules, calibration=batches, example=example, progress=progress)
    return prepared_for(copy(model), plan, rules, masks=masks, steps=steps, example=example)


def prepared_for(model: Model, plan: Plan, target: Target, *, masks: Masks, steps: int | None, example: Any = None) -> Model:
    """A model that trains from `plan` on; `model`, which is not changed, is what `finish` puts the result into."""
    qat = plan.spec.qat or QAT()
    observe = observed_steps(qat, steps)
    check_trainable(plan)
    program = planned(model, plan, example)
    placement = place(program.graph, rules_for(target, plan.spec), plan.spec)
    holders: dict[str, Layer] = {}
    for name in (*plan.weights, *sorted(set(masks) - set(plan.weights))):
        if name not in program.kernels:
            raise ModelError(f"A mask is for {name!r}, which this model does not have. Masks belong to their own model.")
        layer = holder(program, name)
        if isinstance(layer, TRAINED):
            holders[name] = layer
            _quantize_kernel(layer, program, name, plan, qat, masks.get(name))
        else:  # embeddings and recurrent cells stay at their rounded values
            variable = program.kernels[name].variable
            variable.assign(rounded_weights(program, plan, [name])[name])
            variable.trainable = False
    for call in program.calls:
        if call.node.op == "batch_norm" or isinstance(call.operation, keras.layers.BatchNormalization):
            call.operation.trainable = False
    groups = _groups(program.graph, plan, placement, qat, observe)
    for value, weight in plan.biases.values():
        if placement.values.get(value) in groups:
            holders[weight].bias_source = BiasSource(groups[placement.values[value]])
    made = assemble(program, insert=_inserter(program, plan, placement, groups))
    made._whet = Preparation(model, plan, program, holders, groups, placement)
    return made


def _quantize_kernel(layer: Layer, program: Program, name: str, plan: Plan, qat: QAT, mask: Any) -> None:
    """Exchange the class of `layer` for one that rounds its kernel, beginning at the codes of the plan."""
    kernel, params = program.kernels[name], plan.weights.get(name)
    shape = tuple(kernel.variable.shape)
    options: dict[str, Any] = {"bits": None, "symmetric": True, "narrow": None, "shape": [], "group": None, "learn": False}
    if isinstance(params, QParams):
        if name in plan.codes:
            moved = into_bins(np.asarray(quantized_view(kernel).array, np.float32), params, plan.codes[name])
            kernel.variable.assign(moved.reshape(shape))
        options = {
            "bits": params.spec.bits,
            "symmetric": params.spec.symmetric,
            "narrow": params.spec.narrow,
            "shape": list(_broadcast_shape(params, shape)),
            "group": None if params.group is None else list(params.group),
            "learn": qat.learn_scale,
        }
    for public in ("kernel", "bias"):
        if public in layer.__dict__:  # where Keras keeps it under its public name
            layer.__dict__[f"_{public}"] = layer.__dict__.pop(public)
    layer.quantizer = {**options, "masked": mask is not None}
    layer.__class__ = quantized_class(type(layer))
    add_quantizer_state(layer)
    if isinstance(params, QParams):
        layer.kernel_base.assign(params.scale.reshape(options["shape"]))
        if not params.spec.symmetric:
            layer.kernel_zero.assign(params.zero_point.reshape(options["shape"]).astype(np.float32))
    if mask is not None:
        layer.kernel_mask.assign(np.asarray(mask).reshape(shape).astype(np.int8))


def _broadcast_shape(params: QParams, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which the scales of `params` broadcast against a kernel of `shape` (groups are repeated first)."""
    if params.group is not None:
        return params.scale.shape
    if params.axis is None:
        return ()
    if params.scale.size != shape[params.axis]:  # depthwise, a channel for each (in, multiplier)
        return shape[-2:]
    return tuple(size if axis == params.axis % len(shape) else 1 for axis, size in enumerate(shape))


def _groups(graph: Graph, plan: Plan, placement: Placement, qat: QAT, observe: int) -> dict[str, LearnedQuantize]:
    """A quantizer for each group of values that share a scale."""
    made = {}
    for group in sorted(set(placement.values.values())):
        members = _members(graph, plan, placement, group)
        if group in placement.fixed or not members:
            continue
        params = plan.values[members[0]]
        made[group] = LearnedQuantize(
            float(params.scale),
            int(params.zero_point),
            params.spec.bits,
            params.spec.symmetric,
            params.spec.narrow,
            learn=qat.learn_scale,
            observe=observe,
            members=sum(value not in placement.clipped for value in members),
            name=f"quantize_{safe(group)}",
        )
    return made


def _members(graph: Graph, plan: Plan, placement: Placement, group: str) -> list[str]:
    """The values of a group that get its quantizer: where codes are only moved, nothing is rounded again."""
    moved = moved_values(graph, _quantized(plan, placement))
    return [value for value, own in placement.values.items() if own == group and value in plan.values and value not in moved]


def _quantized(plan: Plan, placement: Placement) -> dict[str, str]:
    """The group of every value that the plan quantizes."""
    return {value: group for value, group in placement.values.items() if value in plan.values}


def _inserter(program: Program, plan: Plan, placement: Placement, groups: dict[str, LearnedQuantize]) -> Any:
    graph = program.graph
    member: dict[str, int] = {}
    for group in groups:
        watched = [v for v in _members(graph, plan, placement, group) if v not in placement.clipped]
        member |= {value: index for index, value in enumerate(watched)}
    moved = moved_values(graph, _quantized(plan, placement))

    def insert(ref: Ref, tensor: Tensor) -> Tensor:
        params = plan.values.get(ref.name)
        if params is None or ref.name in moved:
            return tensor
        group = placement.values[ref.name]
        if group in groups:
            return groups[group](tensor, member=member.get(ref.name, -1))
        if ref.name in graph.outputs:  # a softmax, say: the loss sees it as it is
            return tensor
        spec = params.spec
        fixed = (float(params.scale), int(params.zero_point), spec.bits, spec.symmetric, spec.narrow)
        return FakeQuantize(*fixed, name=f"quantize_{safe(ref.name)}")(tensor)

    return insert


def finish(prepared: Model) -> tuple[Model, Plan]:
    """The float model with the trained weights, and the plan with the trained scales, of a model that `prepare` made.

    Where a batch norm was folded, the float model's is set to do nothing but add its offset.

    Raises:
        ModelError: `prepared` was not made by `prepare` in this process, or its weights are not finite.
    """
    made = getattr(prepared, "_whet", None)
    if not isinstance(made, Preparation):
        raise ModelError(
            f"{getattr(prepared, 'name', prepared)!r} was not made by whet.keras.prepare in this process. Prepare the model in "
            "the same way again and give it the trained weights: prepared.load_weights(…), or set_weights(…)."
        )
    float_model = copy(made.model)
    trained = {name: _trained_kernel(name, layer) for name, layer in made.kernels.items()}
    weights = made.plan.weights | {name: _trained_scale(made, name) for name in trained if name in made.plan.weights}
    solved = {group: layer.solved() for group, layer in made.groups.items()}
    fresh = {
        group: QParams(np.asarray(max(scale, SCALE_FLOOR), np.float32), np.asarray(zero, np.int32), made.groups[group].codes)
        for group, (scale, zero) in solved.items()
    }
    values = {value: _value(params, fresh.get(made.placement.values[value])) for value, params in made.plan.values.items()}
    _write_back(made.program, float_model, trained)
    biases = {name: to_numpy(made.program.biases[name]).astype(np.float32) for name in made.plan.biases}
    plan = with_room(replace(made.plan, weights=dict(weights), values=values, tensors={}, codes={}), biases)
    again = planned(float_model, plan)
    for name, params in plan.weights.items():
        if name not in trained:
            continue
        kernel = again.kernels[name]
        wanted = params.encode(_as_quantized(kernel, trained[name]))
        if not np.array_equal(wanted, params.encode(np.asarray(quantized_view(kernel).array, np.float32))):
            plan.codes[name] = wanted  # unfolding and folding a batch norm rounds twice
    return float_model, plan


def _value(params: QParams, fresh: QParams | None) -> QParams:
    return params if fresh is None else fresh


def _as_quantized(kernel: Any, array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return array.reshape(np.shape(quantized_view(kernel).array))


def _trained_kernel(name: str, layer: Layer) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = to_numpy(layer._kernel).astype(np.float32)
    if not np.isfinite(array).all():
        raise ModelError(f"The trained weight {name!r} holds NaN or Inf: training diverged. Lower the learning rate.")
    if layer.quantizer["masked"]:
        array = np.where(to_numpy(layer.kernel_mask) != 0, array, np.float32(0))
    return array


def _trained_scale(made: Preparation, name: str) -> QParams:
    params = made.plan.weights[name]
    if not isinstance(params, QParams):
        raise ModelError(f"{name!r} has no scale that trains.")
    scale = np.maximum(to_numpy(kernel_scale(made.kernels[name])), SCALE_FLOOR).astype(np.float32)
    return replace(params, scale=scale.reshape(params.scale.shape))


def _write_back(program: Program, float_model: Model, trained: dict[str, npt.NDArray[np.float32]]) -> None:
    """Give `float_model` the weights of the trained program."""
    layers = dict(walk(float_model))
    own = {kernel.name: kernel.variable for kernel in kernels(float_model)}
    norms = {layer: norm for norm, layer in program.folds}
    written: set[str] = set()
    for call in program.calls:
        path, weight, operation = call.node.layer, call.node.weight, call.operation
        if call.node.op in WEIGHTED and weight in own and weight not in written:
            written.add(weight)
            array = trained.get(weight, to_numpy(program.kernels[weight].variable))
            bias = to_numpy(program.biases[call.node.bias]) if call.node.bias is not None else None
            if path in norms:
                array = _unfold(layers[norms[path]], array, bias)
                if layers[path].use_bias:
                    layers[path].bias.assign(np.zeros(layers[path].bias.shape, np.float32))
            elif bias is not None:
                layers[path].bias.assign(bias)
            own[weight].assign(array)
        elif isinstance(operation, keras.Layer) and operation.weights and call.node.op not in WEIGHTED:
            goal = layers.get(path)
            goal = goal.activation if goal is not None and type(goal).__name__ not in type(operation).__name__ else goal
            _copy_weights(operation, goal, {id(program.kernels[name].variable): array for name, array in trained.items()})


def _copy_weights(source: Layer, goal: Layer, trained: dict[int, npt.NDArray[np.float32]]) -> None:
    """Give `goal` the weights of `source`, a layer like it but for quantizers inside."""
    for one, other in zip((source, *(s for _, s in walk(source))), (goal, *(g for _, g in walk(goal))), strict=True):
        plain = [variable for variable in own_weights(one) if variable.name not in STATE]
        for variable, its_goal in zip(plain, own_weights(other), strict=True):
            its_goal.assign(trained.get(id(variable), variable))


def _unfold(norm: Layer, array: npt.NDArray[np.float32], bias: Any) -> npt.NDArray[np.float32]:
    """Set a batch norm to add `bias` and nothing else; the kernel that gives `array` in front of it."""
    channels = norm.moving_mean.shape
    norm.moving_variance.assign(np.full(channels, 1.0 - norm.epsilon, np.float32))
    norm.moving_mean.assign(np.zeros(channels, np.float32))
    if norm.scale:
        norm.gamma.assign(np.ones(channels, np.float32))
    factor = 1.0 / np.sqrt(float(to_numpy(norm.moving_variance).flat[0]) + norm.epsilon)
    if norm.center:
        norm.beta.assign(bias)
    else:
        norm.moving_mean.assign((-bias.astype(np.float64) / factor).astype(np.float32))
    unfolded: npt.NDArray[np.float32] = (array.astype(np.float64) / factor).astype(np.float32)
    return unfolded


def quantize_aware(model: Model, spec: Quantize, plan: Plan, fit: Train, run: TrainingRun) -> tuple[Plan, Step]:
    """*In place*: train `model` from `plan` on as `fit` says; the plan with the trained scales, and what was done.

    `teacher`, where `fit` distills, is the original. Masks are kept. No epoch is best before ranges are frozen.

    Raises:
        SpecError: a scheme that does not train. ModelError, DataError: as in `train`.
    """
    started = time.perf_counter()
    target = find_target(plan.target, "keras")
    example, _ = run.train.first()
    steps = fit.epochs * len(run.train)
    prepared = prepared_for(model, plan, target, masks=run.masks, steps=steps, example=example)
    settled = observed_steps(spec.qat or QAT(), steps)
    _, trained = run_training(prepared, fit, replace(run, masks={}, settled=settled))  # the layers hold the masks
    finished, plan = finish(prepared)
    for source, variable in zip(finished.weights, model.weights, strict=True):
        variable.assign(source)
    step = Step(to_dict(spec), _rows(model, plan), (), time.perf_counter() - started, trained.train, ())
    return plan, step


def _rows(model: Model, plan: Plan) -> tuple[dict[str, Any], ...]:
    """What the step changed: each weight with its scheme and the error of its rounding."""
    program = planned(model, plan)
    rows = []
    for name, params in plan.weights.items():
        view: WeightView = quantized_view(program.kernels[name])
        row = {"name": name, "parameters": view.array.size, "scheme": described(params), "bits": params.bits}
        rows.append(row | stored_weight(view, params) | {"algorithm": "QAT"})
    return tuple(rows)
