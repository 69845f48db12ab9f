"""The operations of a model over ids: what every operation does to the dimensions of the tensors it reads.

A reader walks a model in execution order and calls one function here for every operation. Convolutions and matrix products
give their weight's ids to what they produce and unite those of what they read; elementwise operations unite position by
position; the rest moves ids about (`whet.graph.moves`). What cannot be followed is fixed and named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from whet.graph.ids import Ids, IntArray, Value

SPATIAL = "a spatial or time axis"
GROUPS = "convolution groups"


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A parameter or buffer: its ids, bytes for each element, whether it is a parameter, and the axis of what it produces."""

    value: Value
    itemsize: int
    is_parameter: bool
    out: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(len(axis) for axis in self.value)


@dataclass(frozen=True, slots=True, eq=False)
class Cost:
    """Multiply-accumulates of one operation: `constant · Π len(dim)`."""

    layer: str
    constant: int
    dims: tuple[IntArray, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """An operation with sizes written into it (a view, a pad, a split): size i is the number of ids in `pieces[i]`.

    free: further dimensions, whose sizes the operation works out by itself (-1); the code may hold them all the same.
    """

    name: str
    pieces: tuple[IntArray, ...]
    free: tuple[IntArray, ...] = ()


@dataclass(slots=True)
class Structure:
    """What a reader has gathered: ids, the tensors that hold weights, costs, and the sizes written into operations."""

    ids: Ids = field(default_factory=Ids)
    held: dict[str, Held] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    heads: list[IntArray] = field(default_factory=list)  # the head axes of attention
    balanced: bool = False  # a pad of n before and n after keeps as many on both sides, so that one number still says it

    def hold(self, name: str, shape: Sequence[int], *, itemsize: int, is_parameter: bool, out: int = 0) -> Value:
        """Ids for a parameter or buffer, the same ones at every call of the same name."""
        if name not in self.held:
            self.held[name] = Held(self.fresh(shape), itemsize, is_parameter, out)
        return self.held[name].value

    def fresh(self, shape: Sequence[int], reason: str | None = None) -> Value:
        """New ids for a tensor of `shape`; dimensions of size 1 are always fixed."""
        return tuple(self.ids.fresh(n, reason or ("a dimension of size 1" if n <= 1 else None)) for n in shape)

    def fix(self, value: Value, reason: str, dims: Sequence[int] | None = None) -> None:
        """Fix the dimensions `dims` of a tensor, by default all."""
        for d in range(len(value)) if dims is None else dims:
            self.ids.fix(value[d], reason)

    # --- operations that compute

    def elementwise(self, *values: Value) -> Value:
        """Broadcast against each other, right-aligned; equal positions unite."""
        ndim = max(len(value) for value in values)
        out = []
        for back in range(ndim, 0, -1):
            axes = [value[-back] for value in values if len(value) >= back]
            size = next((len(axis) for axis in axes if len(axis) != 1), 1)
            full = [axis for axis in axes if len(axis) == size]
            for other in full[1:]:
                self.ids.unite(full[0], other)
            out.append(full[0])
        return tuple(out)

    def conv(
        self,
        x: Value,
        weight: Value,
        bias: Value | None,
        spatial: Sequence[int],
        *,
        groups: int = 1,
        layer: str = "",
        name: str = "",
    ) -> Value:
        """Convolution: x (N, C, …), weight (C', C/groups, …), bias (C')."""
        rows, columns = weight[0], weight[1]
        self._window(x, weight)
        self.ids.contract(columns)
        self._grouped(x[1], rows, columns, groups, None, name)
        if bias is not None:
            self.ids.unite(rows, bias[0])
        self._count(layer, (len(x[0]), *spatial, *map(len, weight[2:])), (rows, columns))
        return (x[0], rows, *self.fresh(spatial, SPATIAL))

    def conv_transpose(
        self,
        x: Value,
        weight: Value,
        bias: Value | None,
        spatial: Sequence[int],
        *,
        groups: int = 1,
        layer: str = "",
        name: str = "",
    ) -> Value:
        """Transposed convolution: x (N, C, …), weight (C, C'/groups, …), bias (C')."""
        rows, columns = weight[0], weight[1]
        self._window(x, weight)
        self.ids.contract(rows)
        out = columns if groups == 1 else self.ids.fresh(len(columns) * groups)
        self._grouped(out, rows, columns, groups, x[1], name)
        if bias is not None:
            self.ids.unite(out, bias[0])
        self._count(layer, (len(x[0]), *map(len, x[2:]), *map(len, weight[2:])), (rows, columns))
        return (x[0], out, *self.fresh(spatial, SPATIAL))

    def _window(self, x: Value, weight: Value) -> None:
        self.fix(x, SPATIAL, range(2, len(x)))
        self.fix(weight, "a kernel axis", range(2, len(weight)))

    def _grouped(self, wide: IntArray, rows: IntArray, columns: IntArray, groups: int, x: IntArray | None, name: str) -> None:
        """Both channel axes of a convolution are (group, index in the group); the weight's columns are the index alone."""
        if x is not None:
            self.ids.unite(rows, x)
        if groups == 1:
            self.ids.unite(wide, columns)
            return
        group = self.ids.fresh(groups)
        self.sites.append(Site(name, (group,)))
        self.ids.link(wide, (group, columns))
        self.ids.link(rows, (group, self.ids.fresh(len(rows) // groups)))

    def matmul(self, x: Value, y: Value, *, weight: int | None = None, layer: str = "") -> Value:
        """`x @ y` with broadcast batch dimensions. weight: which operand (0 or 1) holds weights; None for two activations."""
        left, right = (x if len(x) > 1 else (self.ids.fresh(1, "a dimension of size 1"), x[0])), y
        right = y if len(y) > 1 else (y[0], self.ids.fresh(1, "a dimension of size 1"))
        self.ids.unite(left[-1], right[-2])
        if weight is None:
            self.ids.fix(left[-1], "summed over between two activations (the scale of attention depends on it)")
        else:
            self.ids.contract(left[-1] if weight == 0 else right[-2])
        batch = self.elementwise(left[:-2], right[:-2]) if len(left) > 2 or len(right) > 2 else ()
        if weight is None and len(batch) > 1:
            self.heads.append(batch[-1])
        self._count(layer, (), (*batch, left[-2], left[-1], right[-1]))
        return (*batch, *((left[-2],) if len(x) > 1 else ()), *((right[-1],) if len(y) > 1 else ()))

    def linear(self, x: Value, weight: Value, bias: Value | None, *, layer: str = "") -> Value:
        """`x Wᵀ + b`: x (…, C), weight (C', C), bias (C')."""
        out = self.matmul(x, (weight[1], weight[0]), weight=1, layer=layer)
        return out if bias is None else self.elementwise(out, bias)

    def attention(self, q: Value, k: Value, v: Value, mask: Value | None = None, *, layer: str = "") -> Value:
        """Scaled dot products: (…, H, T, D); with fewer heads in k and v, each serves the next few of q."""
        for value in (q, k, v):
            self.fix(value, "the size of an attention head", [len(value) - 1])
            self.fix(value, SPATIAL, [len(value) - 2])
        k, v = (self._repeat_heads(value, q) for value in (k, v))
        batch = self.elementwise(q[:-2], k[:-2], v[:-2])
        if len(batch) > 1:
            self.heads.append(batch[-1])
        if mask is not None:
            self.elementwise((*batch, q[-2], k[-2]), mask)
        self._count(layer, (), (*batch, q[-2], k[-2], q[-1]))
        self._count(layer, (), (*batch, q[-2], k[-2], v[-1]))
        return (*batch, q[-2], v[-1])

    def _repeat_heads(self, value: Value, q: Value) -> Value:
        if len(q) < 3 or len(value[-3]) in (1, len(q[-3])):
            return value
        return (*value[:-3], np.repeat(value[-3], len(q[-3]) // len(value[-3])), *value[-2:])

    def einsum(self, equation: str, values: Sequence[Value], *, weight: int | None = None, layer: str = "") -> Value:
        """`torch.einsum` without an ellipsis."""
        inputs, _, output = equation.replace(" ", "").partition("->")
        seen: dict[str, IntArray] = {}
        for letters, value in zip(inputs.split(","), values, strict=True):
            for letter, axis in zip(letters, value, strict=True):
                if letter in seen:
                    self.ids.unite(seen[letter], axis)
                seen.setdefault(letter, axis)
        for letter in sorted(set(seen) - set(output)):
            if weight is None:
                self.ids.fix(seen[letter], "summed over between two activations (the scale of attention depends on it)")
        if weight is not None:
            letters = inputs.split(",")[weight]
            for letter, axis in zip(letters, values[weight], strict=True):
                if letter not in output:
                    self.ids.contract(axis)
        self._count(layer, (), tuple(seen.values()))
        return tuple(seen[letter] for letter in output)

    def _count(self, layer: str, sizes: Sequence[int], dims: tuple[IntArray, ...]) -> None:
        self.costs.append(Cost(layer, math.prod(sizes), dims))

    # --- norms, reductions, lookups

    def channel_norm(self, x: Value, *vectors: Value | None, axis: int = 1) -> Value:
        """Batch norm: the scale, shift and statistics of each channel."""
        for vector in vectors:
            if vector is not None:
                self.ids.unite(x[axis], vector[0])
        return x

    def layer_norm(self, x: Value, ndim: int, *vectors: Value | None) -> Value:
        """Statistics over the last `ndim` dimensions, which therefore stay."""
        dims = range(len(x) - ndim, len(x))
        for vector in vectors:
            if vector is not None:
                self.elementwise(x, vector)
        self.fix(x, "a layer norm takes statistics over it", dims)
        return x

    def group_norm(self, x: Value, groups: int, *vectors: Value | None, axis: int = 1, name: str = "") -> Value:
        """Statistics over the channels of a group: whole groups can leave."""
        inside = self.ids.fresh(len(x[axis]) // groups, "a group norm takes statistics over it")
        group = self.ids.fresh(groups)
        self.ids.link(x[axis], (group, inside))
        self.sites.append(Site(name, (group,)))
        return self.channel_norm(x, *vectors, axis=axis)

    def along(self, x: Value, dims: Sequence[int], what: str) -> Value:
        """An operation that mixes the positions of `dims` and keeps the shape (softmax, cumulative sum)."""
        self.fix(x, f"{what} mixes it", dims)
        return x

    def reduce(self, x: Value, dims: Sequence[int], keep: bool, what: str) -> Value:
        """A sum, mean or maximum over `dims`."""
        gone = {d % max(len(x), 1) for d in dims}
        self.fix(x, f"{what} runs over it", sorted(gone))
        if keep:
            return tuple(self.ids.fresh(1, "a dimension of size 1") if d in gone else axis for d, axis in enumerate(x))
        return tuple(axis for d, axis in enumerate(x) if d not in gone)

    def window(self, x: Value, shape: Sequence[int], ndim: int) -> Value:
        """Pooling or interpolation over the last `ndim` dimensions."""
        first = len(x) - ndim
        self.fix(x, SPATIAL, range(first, len(x)))
        return (*x[:first], *self.fresh(shape[first:], SPATIAL))

    def take(self, x: Value, dim: int, index: Sequence[int]) -> Value:
        """Rows of `dim` looked up by an index tensor of sizes `index` (an embedding, `x[:, ids]`)."""
        self.fix(x, "looked up by index", [dim])
        return (*x[:dim], *self.fresh(index, "an axis of an index"), *x[dim + 1 :])

    def unknown(self, values: Sequence[Value], shape: Sequence[int], what: str) -> Value:
        """An operation that is not followed: all it reads is fixed."""
        for value in values:
            self.fix(value, f"{what} cannot be followed")
        return self.fresh(shape, f"{what} cannot be followed")
