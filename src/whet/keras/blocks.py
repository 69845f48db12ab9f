"""Whole blocks of a Keras model: what an addition adds to its shortcut, found, tried without, and removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from whet.data import leaves
from whet.errors import DataError, ModelError
from whet.graph.groups import Size
from whet.graph.shortcuts import ADD, OTHER, PASS, Block, Branch, Flow, branches, shortcut
from whet.graph.views import Masks
from whet.keras.clone import Call, Program, Ref, assemble, has_graph, operations, record, refs, renamed, substituted
from whet.keras.groups import read_model
from whet.keras.model import copy, short
from whet.keras.moments import Evaluator
from whet.keras.sizes import Sizes, drop, holder, named_weights, note, noted
from whet.keras.surgery import TOLERANCE, outputs
from whet.keras.views import sublayers, to_numpy, unique, walk
from whet.numerics.layers import influence, output_error

_NOT_LISTED = "the code of a subclassed model adds it: only layers in a list of the model can leave"
_HALF = 3e-2  # of the largest output, of 16-bit models
_KEEPS = {"LayerNormalization", "RMSNormalization", "BatchNormalization", "GroupNormalization", "UnitNormalization", "Dropout"}
_KEEPS |= {"SpatialDropout1D", "SpatialDropout2D", "GaussianNoise", "GaussianDropout", "Activation", "ReLU", "LeakyReLU", "ELU"}
_KEEPS |= {"Identity", "Relu", "Relu6", "Gelu", "Silu", "Elu", "Selu", "Tanh", "Sigmoid", "HardSilu", "Cast"}


@dataclass(frozen=True, slots=True)
class _Part:
    """A block in a program's terms. other: the operand of the addition that the branch makes; None for a whole layer."""

    block: Block
    end: Ref
    start: Ref
    other: str | None


def blocks(model: Any, example: Any) -> KerasBlocks:
    """The blocks of `model`, whose layer graph is read with the sizes of `example`, a batch of inputs; `model` is unchanged.

    Raises:
        ModelError: a subclassed model cannot be traced.
    """
    return (KerasBlocks if has_graph(model) else ListedBlocks)(copy(model), example)


class KerasBlocks:
    """See `whet.graph.shortcuts.Blocks`.

    A block is the branch of one addition, or a layer with layers inside, around all of which a shortcut leads.
    """

    def __init__(self, model: Any, example: Any) -> None:
        """`model` is a private copy."""
        self._model, self._example = model, example
        self._groups = read_model(model, example).groups
        self._program = record(model, lambda call, path, program: [call], example, copied=model)
        self._parts, self.skipped = _parts(self._program, self._groups.macs_of)
        self.blocks = tuple(part.block for part in self._parts.values())

    @property
    def names(self) -> tuple[str, ...]:
        """All names that a pattern may mean."""
        return (*(path for path, _ in walk(self._model)), *named_weights(self._model))

    def size(self) -> Size:
        """What the whole model costs."""
        return self._groups.size()

    def without(self, names: Sequence[str], inputs: Any) -> Any:
        """The model's outputs on a batch, each of these blocks replaced by its shortcut."""
        program = reduced(self._program, [self._parts[name] for name in names])
        return _outputs(Evaluator(self._model, program, _one(inputs), None), program)

    def influence(self, inputs: Any) -> dict[str, tuple[float, int]]:
        """For every block `numerics.layers.influence` on a batch."""
        run = Evaluator(self._model, self._program, _one(inputs), None)

        def seen(ref: Ref) -> Any:
            return to_numpy(run.value(0, ref.name))

        return {name: influence(seen(part.start), seen(part.end)) for name, part in self._parts.items()}

    def remove(self, names: Sequence[str], masks: Masks) -> tuple[Any, Masks]:
        """The model without these blocks, one functional graph, and the masks of what is left.

        Raises:
            ModelError: the result is not the original with the blocks' branches silenced.
        """
        work, parts = self._model, [self._parts[name] for name in names]
        few, expected = self._expected(parts)
        before = _named(work)
        sizes = noted(work)
        smaller = assemble(reduced(self._program, parts))
        after = {key: name for name, key in _named(smaller).items()}
        moved = {name: after[key] for name, key in before.items() if key in after}
        made = copy(smaller)
        note(made, _sizes(sizes, moved, tuple(i for i, name in enumerate(self._parts) if name in names)))
        self._check(names, expected, made, few)
        return made, {moved[name]: mask for name, mask in masks.items() if name in moved}

    def _expected(self, parts: Sequence[_Part]) -> tuple[Any, list[Any]]:
        """A few inputs, and what the model without these blocks must make of them."""
        few = keras.tree.map_structure(lambda array: array[:8], self._example)
        return few, leaves(self._silenced(parts, few))

    def _check(self, names: Sequence[str], expected: list[Any], made: Any, few: Any) -> None:
        half = keras.backend.standardize_dtype(made.compute_dtype) in ("float16", "bfloat16")
        error = output_error(expected, leaves(outputs(made, few)))
        if not error <= (_HALF if half else TOLERANCE) ** 2:
            raise ModelError(
                f"Without {', '.join(names)} the model does not give the original with these branches silenced (an error of "
                f"{error:.3g} of the outputs' power): please report it, and name them in keep=."
            )

    def _silenced(self, parts: Sequence[_Part], inputs: Any) -> Any:
        """The original's outputs with zeros in the place of what the branches make."""
        run = Evaluator(self._model, self._program, _one(inputs), None)
        order = {ref.name: i for i, call in enumerate(self._program.calls) for ref in refs(call.outputs)}
        for part in sorted(parts, key=lambda part: order[part.end.name]):
            start = run.value(0, part.start.name)
            run.batches[0][part.end.name if part.other is None else part.other] = (
                start if part.other is None else keras.ops.zeros_like(start)
            )
        return _outputs(run, self._program)


class ListedBlocks(KerasBlocks):
    """Blocks of a subclassed model: layers of the user's in a list of the model, which leave that list. Its class stays.

    What else its code adds to a shortcut stays, and is named.
    """

    def __init__(self, model: Any, example: Any) -> None:
        super().__init__(model, example)
        operations = {call.node.layer: call.operation for call in self._program.calls}
        parts = {}
        for name, part in self._parts.items():
            (layer,) = part.block.layers if part.other is None and len(part.block.layers) == 1 else (None,)
            if layer is not None and holder(model, operations[layer]) is not None:
                parts[name] = part
            else:
                self.skipped = (*self.skipped, (name, _NOT_LISTED))
        self._parts, self.blocks = parts, tuple(part.block for part in parts.values())

    def remove(self, names: Sequence[str], masks: Masks) -> tuple[Any, Masks]:
        """*In place*: see `KerasBlocks.remove`.

        Raises:
            ModelError: the model's code needs one of the layers, or computes something else without them.
        """
        model, parts = self._model, [self._parts[name] for name in names]
        few, expected = self._expected(parts)
        before = _named(model)
        operations = {call.node.layer: call.operation for call in self._program.calls}
        leaving = {id(operations[part.block.layers[0]]) for part in parts}
        places = tuple(place for place, (_, layer) in enumerate(walk(model)) if id(layer) in leaving)
        sizes = noted(model)
        drop(model, (places,))
        after = {key: name for name, key in _named(model).items()}
        moved = {name: after[key] for name, key in before.items() if key in after}
        note(model, _sizes(sizes, moved, places))
        try:
            self._check(names, expected, model, few)
        except DataError as cause:
            raise ModelError(f"The code of {model.name!r} does not run without {', '.join(names)}: {short(cause)}") from cause
        return model, {moved[name]: mask for name, mask in masks.items() if name in moved}


def _one(inputs: Any) -> Any:
    """Data of one batch."""
    return [(inputs, None)]


def _outputs(run: Evaluator, program: Program) -> Any:
    return substituted(program.outputs, {ref.name: to_numpy(run.value(0, ref.name)) for ref in refs(program.outputs)})


def drop_again(model: Any, dropped: Sequence[Sequence[int]]) -> Any:
    """Another model of the original's kind without the blocks that were removed of it, in the same order.

    Blocks are known by their places: Keras numbers the layers of every model that it builds anew.

    Raises:
        ModelError: it has no such block.
    """
    if not has_graph(model):
        drop(model, dropped)
        return model
    for places in dropped:
        program = record(model, lambda call, path, program: [call], copied=model)
        parts, _ = _parts(program, lambda chosen: 0)
        known = list(parts.values())
        if max(places) >= len(known):
            raise ModelError(
                f"The model given has {len(known)} layers that can leave, and of what was saved number {max(places)} had left."
            )
        model = copy(assemble(reduced(program, [known[place] for place in places])))
    return model


def kept_sizes(sizes: Sizes, model: Any) -> Sizes:
    """What of `sizes` belongs to layers that `model` has."""
    paths, weights = operations(model), named_weights(model)
    attributes = {path: row for path, row in sizes.attributes.items() if path in paths}
    return Sizes(attributes, {name: shape for name, shape in sizes.shapes.items() if name in weights}, sizes.dropped)


def _named(model: Any) -> dict[str, int]:
    """Layers, operations and weights by name, as what they are."""
    return {name: id(item) for name, item in (*operations(model).items(), *named_weights(model).items())}


def _sizes(sizes: Sizes | None, moved: Mapping[str, str], places: tuple[int, ...]) -> Sizes:
    """What was removed before, under the names of what is left, and these blocks."""
    if sizes is None:
        return Sizes({}, {}, (places,))
    attributes = {moved[path]: row for path, row in sizes.attributes.items() if path in moved}
    shapes = {moved[name]: shape for name, shape in sizes.shapes.items() if name in moved}
    return Sizes(attributes, shapes, (*sizes.dropped, places))


def reduced(program: Program, parts: Sequence[_Part]) -> Program:
    """`program` without these blocks, and without the calls that nothing needs then."""
    order = {ref.name: i for i, call in enumerate(program.calls) for ref in refs(call.outputs)}
    mapping: dict[str, Ref] = {}
    for part in sorted(parts, key=lambda part: order[part.end.name]):
        mapping[part.end.name] = mapping.get(part.start.name, part.start)
    calls = [renamed(call, mapping) for call in program.calls]
    found = substituted(program.outputs, mapping)
    needed = {ref.name for ref in refs(found)}
    kept = []
    for call in reversed(calls):
        if any(ref.name in needed and ref.name not in mapping for ref in refs(call.outputs)):
            kept.append(call)
            needed.update(ref.name for ref in call.inputs)
    return replace(program, calls=kept[::-1], outputs=found)


def _parts(program: Program, macs_of: Any) -> tuple[dict[str, _Part], tuple[tuple[str, str], ...]]:
    """The blocks of a program by name, in execution order; (name, reason) of what looks like one."""
    flows, known = _flows(program)
    calls = {ref.name: call for call in program.calls for ref in refs(call.outputs)}
    ends = [ref.name for ref in refs(program.outputs)]
    found, refused = branches(flows, ends)
    whole, more = _whole(program)
    order = {flow.name: i for i, flow in enumerate(flows)}
    taken: set[str] = set()
    parts = {}
    for branch in sorted([*found, *whole], key=lambda branch: order[branch.end]):
        inside = [calls[name] for name in branch.flows]
        name = unique(calls[branch.end].node.layer, taken)
        end = known[branch.end]
        if end.dtype != known[branch.start].dtype:
            refused.append((branch.end, "its shortcut has another dtype"))
            continue
        others = [ref.name for ref in calls[branch.end].inputs if ref.name != branch.start]
        block = _block(name, program, [*inside, calls[branch.end]], macs_of)
        parts[name] = _Part(block, end, known[branch.start], others[0] if branch.flows[-1] != branch.end else None)
    return parts, tuple((calls[name].node.layer, reason) for name, reason in [*refused, *more])


def _block(name: str, program: Program, inside: Sequence[Call], macs_of: Any) -> Block:
    own = {id(call) for call in inside}
    elsewhere = {id(v) for call in program.calls if id(call) not in own for v in getattr(call.operation, "weights", ())}
    layers = dict.fromkeys(call.node.layer for call in inside)
    held = {id(v): v for call in inside for v in getattr(call.operation, "trainable_variables", ()) if id(v) not in elsewhere}
    sizes = [(int(np.prod(v.shape)), keras.backend.standardize_dtype(v.dtype)) for v in held.values()]
    count = sum(size for size, _ in sizes)
    stored = sum(size * (2 if "16" in dtype else 8 if "64" in dtype else 4) for size, dtype in sizes)
    return Block(name, tuple(layers), macs_of(lambda layer: layer in layers), count, stored)


def _flows(program: Program) -> tuple[list[Flow], dict[str, Ref]]:
    known = {ref.name: ref for ref in refs(program.inputs)}
    flows = [Flow(ref.name, (), OTHER, ref.shape) for ref in known.values()]
    for call in program.calls:
        reads = tuple(dict.fromkeys(ref.name for ref in call.inputs))
        made = refs(call.outputs)
        known |= {ref.name: ref for ref in made}
        for ref in made:
            same = len(made) == 1 and all(_alike(known[read].shape, ref.shape) for read in reads)
            flows.append(Flow(ref.name, reads, _role(call, len(call.inputs)) if same else OTHER, ref.shape))
    return flows, known


def _alike(one: Sequence[int | None], other: Sequence[int | None]) -> bool:
    """Whether they may be one shape: a nested Sequential knows the batch that it was first called with."""
    return len(one) == len(other) and all(a == b or a is None or b is None for a, b in zip(one, other, strict=True))


def _role(call: Call, reads: int) -> str:
    kind = type(call.operation).__name__
    if kind == "Add" and reads == 2:
        return ADD
    return PASS if kind in _KEEPS and reads == 1 else OTHER


def _whole(program: Program) -> tuple[list[Branch], list[tuple[str, str]]]:
    """Layers with layers inside, whose own graph has a shortcut from their input to their output."""
    found, refused = [], []
    for call in program.calls:
        made, given = refs(call.outputs), call.inputs
        if not isinstance(call.operation, keras.Layer) or not sublayers(call.operation) or len(made) != 1:
            continue
        if len(given) != 1 or given[0].shape != made[0].shape or isinstance(call.operation, keras.layers.MultiHeadAttention):
            continue
        entry = keras.Input(batch_shape=given[0].shape, dtype=given[0].dtype)
        try:
            inner = keras.Model(entry, call.operation.call(entry))
        except Exception as cause:
            refused.append((made[0].name, f"its call cannot be traced: {short(cause)}"))
            continue
        own = record(inner, lambda call, path, program: [call], copied=inner)
        flows, _ = _flows(own)
        if shortcut(flows, refs(own.inputs)[0].name, refs(own.outputs)[0].name):
            found.append(Branch(made[0].name, given[0].name, (made[0].name,)))
    return found, refused
