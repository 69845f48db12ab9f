"""What every operation of a torch.export graph does to dimensions: a table from its name to a rule over ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from whet.graph import moves
from whet.graph.ids import Value
from whet.graph.structure import Site
from whet.torch.calls import Call, shapes
from whet.torch.dimensions_recurrent import RECURRENT

Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = dict(RECURRENT)
# Elementwise, but without torch's own tag for it
_POINTWISE = set(
    "relu6 relu6_ dropout dropout_ feature_dropout alpha_dropout hardswish hardswish_ hardsigmoid selu contiguous clone to "
    "type_as detach detach_ alias lift_fresh_copy _to_copy copy_ float where masked_fill masked_fill_ clamp clamp_ hardtanh "
    "hardtanh_ prelu softplus mish logsigmoid rsub square pow div multiply subtract divide true_divide rrelu threshold conj "
    "expand_as fill_ zero_ celu elu leaky_relu leaky_relu_ silu silu_ gelu".split()
)
_LIKE = "zeros_like ones_like full_like empty_like rand_like randn_like".split()
_MIXES = "softmax log_softmax _softmax cumsum cumprod sort flip roll softmin logcumsumexp".split()
_REDUCES = (
    "mean sum amax amin max min prod argmax argmin any all norm linalg_vector_norm var std logsumexp var_mean std_mean median"
).split()


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def read(call: Call) -> Any:
    """The ids of what `call` results in: a value, or a list of values."""
    found = RULES.get(call.op)
    if found is None and (torch.Tag.pointwise in getattr(call.node.target, "tags", ()) or call.op in _POINTWISE):
        found = _pointwise
    try:
        made = _unknown(call) if found is None else found(call)
    except (KeyError, TypeError, ValueError, IndexError):
        made = _unknown(call)  # an overload whose arguments are not those the rule knows
    return made if _fits(made, call) else _unknown(call)


def _fits(made: Any, call: Call) -> bool:
    """Whether the rule gives what the operation does: a rule that is wrong for a case never passes unseen."""
    listed = made if isinstance(made, list) else [made]
    told = shapes(call.node)
    return all(tuple(map(len, value)) == shape for value, shape in zip(listed, told, strict=False)) and len(listed) <= len(told)


def _unknown(call: Call) -> Any:
    what = f"{call.op} in {call.layer or 'the model'}"
    if not call.node.all_input_nodes:
        return call.s.fresh(call.shape, f"{what} makes a constant of this size")
    for value in call.tensors():
        call.s.fix(value, f"{what} cannot be followed")
    made = [call.s.fresh(shape, f"{what} cannot be followed") for shape in shapes(call.node)]
    return made if isinstance(call.node.meta.get("val"), list | tuple) else made[0]


def _pointwise(call: Call) -> Value:
    return call.s.elementwise(*call.tensors()) if call.node.all_input_nodes else call.s.fresh(call.shape, "a constant")


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def _filled(call: Call) -> Value:
    """One number everywhere: it is as large as what it meets, where its size can be set."""
    made = call.s.fresh(call.shape)
    if made:
        call.s.sites.append(Site(call.node.name, made))
    return made


@rule(*_LIKE)
def _like(call: Call) -> Value:
    return call.value("self")


@rule(*_MIXES)
def _mixes(call: Call) -> Any:
    made = call.s.along(call.value("self"), call.dims("dims" if call.op in ("flip", "roll") else "dim"), call.op)
    return [made, made] if call.op == "sort" else made


@rule(*_REDUCES)
def _reduces(call: Call) -> Any:
    if call["other"] is not None:
        return _pointwise(call)
    made = call.s.reduce(call.value("self"), call.dims(), bool(call["keepdim"]), call.op)
    return [made] * len(shapes(call.node)) if isinstance(call.node.meta.get("val"), list | tuple) else made


@rule("conv1d", "conv2d", "conv3d", "convolution")
def _conv(call: Call) -> Value:
    x, weight, bias = call.value("input"), call.value("weight"), call.maybe("bias")
    if call["transposed"] or len(x) != len(weight):
        raise ValueError("not an ordinary convolution of a batch")
    return call.s.conv(x, weight, bias, call.shape[2:], groups=call["groups"], layer=call.layer, name=call.node.name)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(call: Call) -> Value:
    x, weight, bias = call.value("input"), call.value("weight"), call.maybe("bias")
    if len(x) != len(weight):
        raise ValueError("without a batch")
    return call.s.conv_transpose(x, weight, bias, call.shape[2:], groups=call["groups"], layer=call.layer, name=call.node.name)


@rule("linear")
def _linear(call: Call) -> Value:
    x, weight, bias = call.value("input"), call.value("weight"), call.maybe("bias")
    if not call.is_weight("weight"):
        return call.s.unknown(call.tensors(), call.shape, f"linear with a computed weight in {call.layer}")
    return call.s.linear(x, weight, bias, layer=call.layer)


@rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(call: Call) -> Value:
    second = next(name for name in ("other", "mat2", "vec", "tensor") if name in call.arguments)
    return _product(call, "self", second)


def _product(call: Call, first: str, second: str) -> Value:
    weight = 1 if call.is_weight(second) else 0 if call.is_weight(first) else None
    return call.s.matmul(call.value(first), call.value(second), weight=weight, layer=call.layer)


@rule("addmm", "baddbmm")
def _addmm(call: Call) -> Value:
    first = "mat1" if call.op == "addmm" else "batch1"
    return call.s.elementwise(_product(call, first, first[:-1] + "2"), call.value("self"))


@rule("einsum")
def _einsum(call: Call) -> Value:
    nodes = call["tensors"]
    if "." in call["equation"] or "->" not in call["equation"] or len(nodes) != 2:
        raise ValueError("an equation that is not followed")
    weights = [k for k, node in enumerate(nodes) if node in call._constants]
    return call.s.einsum(call["equation"], call.listed("tensors"), weight=weights[-1] if weights else None, layer=call.layer)


@rule("scaled_dot_product_attention")
def _attention(call: Call) -> Value:
    return call.s.attention(
        call.value("query"), call.value("key"), call.value("value"), call.maybe("attn_mask"), layer=call.layer
    )


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(call: Call) -> Value:
    vectors = [call.maybe(name) for name in ("weight", "bias", "running_mean", "running_var")]
    return call.s.channel_norm(call.value("input"), *vectors)


@rule("layer_norm", "rms_norm")
def _layer_norm(call: Call) -> Value:
    return call.s.layer_norm(call.value("input"), len(call["normalized_shape"]), call.maybe("weight"), call.maybe("bias"))


@rule("group_norm")
def _group_norm(call: Call) -> Value:
    vectors = call.maybe("weight"), call.maybe("bias")
    return call.s.group_norm(call.value("input"), call["num_groups"], *vectors, name=call.node.name)


@rule("_weight_norm")
def _weight_norm(call: Call) -> Value:
    v, g, dim = call.value("v"), call.value("g"), call["dim"]
    call.s.fix(v, "a weight norm runs over it", [d for d in range(len(v)) if d != dim])
    return call.s.elementwise(v, g)


@rule("embedding")
def _embedding(call: Call) -> Value:
    return call.s.take(call.value("weight"), 0, [len(axis) for axis in call.value("indices")])


@rule("index_select")
def _index_select(call: Call) -> Value:
    return call.s.take(call.value("self"), call.dim(), [len(call.value("index")[0])])


@rule("index")
def _index(call: Call) -> Value:
    x, given = call.value("self"), call["indices"]
    at = [d for d, node in enumerate(given) if node is not None]
    if at != list(range(at[0], at[-1] + 1)) or any(node.meta["val"].dtype == torch.bool for node in given if node is not None):
        raise ValueError("scattered or boolean indices")
    call.s.fix(x, "looked up by index", at)
    out = call.shape[at[0] : len(call.shape) - (len(x) - at[-1] - 1)]
    return (*x[: at[0]], *call.s.fresh(out, "an axis of an index"), *x[at[-1] + 1 :])


def _window(ndim: int) -> Rule:
    def found(call: Call) -> Any:
        made = call.s.window(call.tensors()[0], call.shape, ndim)
        return [made] * len(shapes(call.node)) if isinstance(call.node.meta.get("val"), list | tuple) else made

    return found


for _n in (1, 2, 3):
    for _kind in ("max_pool{}d", "avg_pool{}d", "adaptive_avg_pool{}d", "adaptive_max_pool{}d", "max_pool{}d_with_indices"):
        RULES[_kind.format(_n)] = _window(_n)
    for _kind in ("upsample_nearest{}d", "_upsample_nearest_exact{}d"):
        RULES[_kind.format(_n)] = _window(_n)
RULES.update({"upsample_linear1d": _window(1), "upsample_trilinear3d": _window(3), "grid_sampler": _window(2)})
RULES.update({"upsample_bilinear2d": _window(2), "upsample_bicubic2d": _window(2), "_upsample_bilinear2d_aa": _window(2)})


@rule("cat", "concat", "concatenate")
def _cat(call: Call) -> Value:
    values = call.listed("tensors")
    return moves.concat(call.s, values, call.dim(ndim=len(values[0])))


@rule("stack")
def _stack(call: Call) -> Value:
    values = call.listed("tensors")
    return moves.stack(call.s, values, call.dim(ndim=len(values[0]) + 1))


@rule("chunk")
def _chunk(call: Call) -> list[Value]:
    return moves.chunk(call.s, call.value("self"), len(shapes(call.node)), call.dim(), call.node.name)


@rule("split", "split_with_sizes", "tensor_split")
def _split(call: Call) -> list[Value]:
    x, dim = call.value("self"), call.dim()
    sizes = [shape[dim] for shape in shapes(call.node)]
    if len(set(sizes)) > 1 or isinstance(call["split_size"] if "split_size" in call.arguments else call["split_sizes"], list):
        return moves.split(call.s, x, sizes, dim, call.node.name)
    parts = moves.chunk(call.s, x, len(sizes), dim, call.node.name)
    call.s.sites.append(Site(call.node.name, (parts[0][dim],)))
    return parts


@rule("unbind")
def _unbind(call: Call) -> list[Value]:
    return [moves.select(call.s, call.value("self"), call.dim(), "unbind")] * len(shapes(call.node))


@rule("slice")
def _slice(call: Call) -> Value:
    x, d = call.value("self"), call.dim()
    n = len(x[d])
    start, stop, _ = slice(call["start"], call["end"]).indices(n)
    return moves.cut(call.s, x, d, start, max(stop, start), int(call["step"] or 1), call.node.name)


@rule("narrow")
def _narrow(call: Call) -> Value:
    start = int(call["start"])
    return moves.cut(call.s, call.value("self"), call.dim(), start, start + int(call["length"]), 1, call.node.name)


@rule("select")
def _select(call: Call) -> Value:
    return moves.select(call.s, call.value("self"), call.dim(), "select")


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d", "zero_pad2d")
def _pad(call: Call) -> Value:
    x = call.value("self")
    flat = call["pad"] if "pad" in call.arguments else call["padding"]
    pairs = [(int(flat[i]), int(flat[i + 1])) for i in range(0, len(flat), 2)]
    amounts = [(0, 0)] * (len(x) - len(pairs)) + pairs[::-1]
    constant = call.op in ("constant_pad_nd", "zero_pad2d") or call["mode"] == "constant"
    return moves.pad(call.s, x, amounts, call.node.name, constant=constant)


@rule("view", "reshape", "_unsafe_view", "_reshape_copy", "view_copy")
def _reshape(call: Call) -> Value:
    given = call["size"] if "size" in call.arguments else call["shape"]
    if isinstance(given, torch.dtype):
        raise ValueError("a view as another dtype")
    free = [d for d, n in enumerate(given) if isinstance(n, int) and n == -1]
    return moves.reshape(call.s, call.value("self"), call.shape, call.node.name, free)


@rule("flatten")
def _flatten(call: Call) -> Value:
    return moves.reshape(call.s, call.value("self"), call.shape, call.node.name, range(len(call.shape)))


@rule("unflatten")
def _unflatten(call: Call) -> Value:
    d, sizes = call.dim(), call["sizes"]
    free = [i for i in range(len(call.shape)) if not d <= i < d + len(sizes) or sizes[i - d] == -1]
    return moves.reshape(call.s, call.value("self"), call.shape, call.node.name, free)


@rule("squeeze", "unsqueeze")
def _squeeze(call: Call) -> Value:
    return moves.reshape(call.s, call.value("self"), call.shape, call.node.name, range(len(call.shape)))


@rule("transpose", "swapaxes", "transpose_")
def _transpose(call: Call) -> Value:
    x = list(call.value("self"))
    names = ("dim0", "dim1") if "dim0" in call.arguments else ("axis0", "axis1")
    one, two = (call.dim(name) for name in names)
    x[one], x[two] = x[two], x[one]
    return tuple(x)


@rule("t", "numpy_T", "mT", "matrix_H", "adjoint")
def _t(call: Call) -> Value:
    x = call.value("self")
    return x[::-1] if call.op in ("t", "numpy_T") else (*x[:-2], x[-1], x[-2])


@rule("permute")
def _permute(call: Call) -> Value:
    return moves.permute(call.value("self"), call.dims("dims"))


@rule("expand", "broadcast_to")
def _expand(call: Call) -> Value:
    return moves.expand(call.s, call.value("self"), call.shape, call.node.name)


@rule("repeat", "tile")
def _repeat(call: Call) -> Value:
    x, times = call.value("self"), call["repeats"] if "repeats" in call.arguments else call["dims"]
    x = (*(call.s.ids.fresh(1, "a dimension of size 1") for _ in range(len(times) - len(x))), *x)
    return moves.repeat(x, times)


@rule("repeat_interleave")
def _repeat_interleave(call: Call) -> Value:
    if not isinstance(call["repeats"], int) or call["dim"] is None:
        raise ValueError("repeats that vary")
    return moves.repeat_each(call.value("self"), call["repeats"], call.dim())


@rule("pixel_shuffle")
def _pixel_shuffle(call: Call) -> Value:
    return moves.pixel_shuffle(call.s, call.value("self"), call["upscale_factor"])


@rule("pixel_unshuffle")
def _pixel_unshuffle(call: Call) -> Value:
    return moves.pixel_unshuffle(call.s, call.value("self"), call["downscale_factor"])


@rule("channel_shuffle")
def _channel_shuffle(call: Call) -> Value:
    return moves.channel_shuffle(call.s, call.value("self"), int(call["groups"]), call.node.name)


@rule("glu")
def _glu(call: Call) -> Value:
    return call.s.elementwise(*moves.chunk(call.s, call.value("self"), 2, call.dim(), call.node.name))
