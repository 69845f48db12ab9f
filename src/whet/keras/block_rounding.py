"""Block-wise reconstruction: the rounding of all weights of a block learned together, on the block's output.

Li et al. 2021, BRECQ (arXiv:2102.05426), with the soft rounding of AdaRound and, at the block's input, random mixing of
float and quantized values (Wei et al. 2022, QDrop, arXiv:2203.05740). A block is a Keras model of its own, trained by Keras'
compiled step on every backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from whet.graph.blocks import BATCH, CACHE_BYTES, Block, learn_blocks
from whet.graph.learning import moved_values
from whet.graph.nodes import Graph
from whet.graph.placement import Plan
from whet.graph.views import WeightView
from whet.keras.clone import Layer, Program, Ref, Tensor, assemble, refs, safe
from whet.keras.moments import KerasRunner
from whet.keras.namespace import xp
from whet.keras.quantize import FakeQuantize, planned
from whet.keras.views import to_numpy
from whet.numerics.adaround import annealed_beta, initial_variable, rectified_sigmoid, regularizer
from whet.specs.quantization import AdaRound

LEARNING_RATE, STRENGTH = 0.01, 0.01
MIXED = 0.5  # of the block's input values are taken from the float model
KEEP = 0.05  # soft roundings begin this far from 0 and 1


@dataclass(frozen=True, slots=True, eq=False)
class _Cached:
    """A block's data: float and quantized inputs, and the float outputs, (examples, …) each."""

    exact: npt.NDArray[np.float32]
    quantized: npt.NDArray[np.float32]
    wanted: npt.NDArray[np.float32]


def round_blocks(
    plan: Plan, graph: Graph, weights: Mapping[str, WeightView], runner: KerasRunner, spec: AdaRound, *, progress: bool
) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """See `learn_blocks`: every block by the data that calibration gives it."""
    program = planned(runner.model, plan, runner.example)
    for name in plan.weights:
        if name in runner.nodes:
            runner.assign(program, plan, name)
    runner.restart()

    def learn(plan: Plan, block: Block, names: list[str]) -> tuple[Plan, float, float] | None:
        data = _cached(plan, block, runner)
        return None if data is None else _learn(plan, block, names, weights, data, program, spec)

    return learn_blocks(plan, graph, learn, progress=progress)


def _cached(plan: Plan, block: Block, runner: KerasRunner) -> _Cached | None:
    """The block's data from as many batches as fit; None where its values are no tensors with one row for each example."""
    exact, own = runner.evaluators(plan)
    found: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    size = 0
    for index in range(len(exact.batches)):
        values = (exact.value(index, block.start), own.value(index, block.start), exact.value(index, block.end))
        arrays = [to_numpy(value).astype(np.float32, copy=False) for value in values]
        if arrays[0].shape[:1] != arrays[2].shape[:1] or not arrays[0].ndim:
            return None
        for kept, array in zip(found, arrays, strict=True):
            kept.append(array)
        size += max(arrays[0].nbytes, arrays[2].nbytes)
        if size >= CACHE_BYTES:
            break
    exact.forget({block.end})
    own.forget({block.start, block.end})
    if any(len({array.shape[1:] for array in kept}) > 1 for kept in found):
        return None
    return _Cached(*(np.concatenate(kept) for kept in found))


def _learn(
    plan: Plan,
    block: Block,
    learned: list[str],
    weights: Mapping[str, WeightView],
    data: _Cached,
    program: Program,
    spec: AdaRound,
) -> tuple[Plan, float, float]:
    soft = {name: _Soft(plan, name, np.asarray(weights[name].array, np.float32), program) for name in learned}
    model = _block_model(program, plan, block)
    before = _error(model, data)
    for item in soft.values():
        item.begin()
    for layer in model.layers:
        for variable in layer.weights:
            variable.trainable = any(variable is item.variable for item in soft.values())
    trainer = _Trainer(model, [item.variable for item in soft.values()])
    trainer.compile(keras.optimizers.Adam(LEARNING_RATE), jit_compile=False, auto_scale_loss=False)
    rng = np.random.default_rng(0)
    size = min(BATCH, len(data.exact))
    for step in range(spec.steps):
        index = rng.integers(0, len(data.exact), size)
        mask = rng.random(data.exact[index].shape, np.float32) < MIXED
        mixed = np.where(mask, data.exact[index], data.quantized[index])
        beta = annealed_beta(step, spec.steps)
        trainer.set_beta(beta)
        trainer.train_on_batch(mixed, data.wanted[index])
    codes = {name: item.codes() for name, item in soft.items()}
    for name, item in soft.items():
        item.end(codes[name])
    after = _error(model, data)
    power = float(np.mean(np.square(data.wanted, dtype=np.float64)))
    if after < before:
        plan = replace(plan, codes={**plan.codes, **codes})
    return plan, _db(power, before), _db(power, min(before, after))


def _block_model(program: Program, plan: Plan, block: Block) -> Any:
    """The operations of a block as a model of its input."""
    by_name = {ref.name: ref for ref in (*refs(program.inputs), *(r for call in program.calls for r in refs(call.outputs)))}
    calls = [call for call in program.calls if call.node.name in block.nodes]
    part = Program("block", calls, by_name[block.start], by_name[block.end], ["start"])
    groups = {value: str(id(params)) for value, params in plan.values.items()}
    moved = moved_values(program.graph, groups)

    def insert(ref: Ref, tensor: Tensor) -> Tensor:
        params = plan.values.get(ref.name)
        if params is None or ref.name in moved or ref.name == block.start:
            return tensor
        codes = params.spec.bits, params.spec.symmetric, params.spec.narrow
        return FakeQuantize(float(params.scale), int(params.zero_point), *codes, name=f"round_{safe(ref.name)}")(tensor)

    return assemble(part, insert=insert)


def _error(model: Any, data: _Cached) -> float:
    """Mean squared error of the block's output on quantized inputs."""
    total = 0.0
    for start in range(0, len(data.wanted), 4 * BATCH):
        part = slice(start, start + 4 * BATCH)
        made = to_numpy(model(ops.convert_to_tensor(data.quantized[part]), training=False))
        total += float(np.sum(np.square(made - data.wanted[part], dtype=np.float64)))
    return total / data.wanted.size


class _Trainer(keras.Model):  # type: ignore[misc]
    """A block under training: the error of its output, summed over channels, and a push of soft roundings to 0 or 1."""

    def __init__(self, block: Any, soft: list[Any]) -> None:
        super().__init__(autocast=False, name="reconstruction")
        self.block, self.soft = block, soft
        self.beta = self.add_weight(name="beta", shape=(), initializer="ones", trainable=False)
        self.strength = self.add_weight(name="strength", shape=(), initializer="zeros", trainable=False)
        self.built = True

    def set_beta(self, beta: float | None) -> None:
        """The exponent of the regularizer; None turns it off."""
        self.strength.assign(0.0 if beta is None else STRENGTH)
        self.beta.assign(2.0 if beta is None else beta)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """The block's output, in inference mode."""
        return self.block(inputs, training=False)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """See the class."""
        total = ops.mean(ops.square(y_pred - y)) * y.shape[-1]
        for variable in self.soft:
            h = rectified_sigmoid(variable.value, xp=xp)
            total = total + self.strength.value * regularizer(h, self.beta.value, xp=xp)
        return total


class _SoftKernel:
    """Mixed into a layer's class: its kernel has soft codes while they are learned."""

    soft_state: _Soft

    @property
    def kernel(self) -> Any:
        """The kernel as it now is."""
        return self.soft_state.kernel()


class _Soft:
    """The rounding of one weight while it is learned, beginning at its present codes."""

    def __init__(self, plan: Plan, name: str, array: npt.NDArray[np.float32], program: Program) -> None:
        params: Any = plan.weights[name]
        self.stored = program.kernels[name].variable
        shape = tuple(self.stored.shape)
        scale = np.broadcast_to(params.broadcast(array.shape)[0], array.shape)
        present, exact = plan.encode(name, array).astype(np.float32), array / scale
        low, high = params.spec.qmin, params.spec.qmax
        floor = np.clip(np.where(present > exact, present - 1, present), low, high - 1)
        fraction = np.clip((np.clip(exact - floor, 0, 1) + present - floor) / 2, KEEP, 1 - KEEP)
        self.view_shape = array.shape
        self.scale, self.floor, self.kept = (
            np.ascontiguousarray(item, np.float32).reshape(shape) for item in (scale, floor, array != 0)
        )
        self.is_soft = False
        layer = self._holder(program)
        layer._tracker.unlock()
        self.variable = layer.add_weight(name="rounding", shape=shape, initializer="zeros", dtype="float32", autocast=False)
        layer._tracker.lock()
        self.variable.assign(initial_variable(fraction.astype(np.float32)).reshape(shape))
        if "kernel" in layer.__dict__:  # where Keras keeps it under its public name
            layer.__dict__["_kernel"] = layer.__dict__.pop("kernel")
        layer.soft_state = self
        layer.__class__ = type(f"Soft{type(layer).__name__}", (_SoftKernel, type(layer)), {})

    def _holder(self, program: Program) -> Layer:
        calls = program.calls
        return next(c.operation for c in calls if any(v is self.stored for v in getattr(c.operation, "weights", ())))

    def begin(self) -> None:
        """From now on the kernel has soft codes."""
        self.is_soft = True

    def end(self, codes: npt.NDArray[np.int32]) -> None:
        """From now on the kernel has these codes."""
        self.is_soft = False
        self.stored.assign(codes.reshape(self.scale.shape).astype(np.float32) * self.scale)

    def kernel(self) -> Any:
        """The weight as it now is."""
        if not self.is_soft:
            return self.stored.value
        return (self.floor + rectified_sigmoid(self.variable.value, xp=xp)) * (self.scale * self.kept)

    def codes(self) -> npt.NDArray[np.int32]:
        """The codes as they now are, in the layout in which the weight is quantized."""
        up = to_numpy(rectified_sigmoid(self.variable.value, xp=xp)) >= 0.5
        return ((self.floor + up) * self.kept).astype(np.int32).reshape(self.view_shape)


def _db(power: float, error: float) -> float:
    return float(10 * np.log10(power / error)) if power > 0 and error > 0 else float("inf")
