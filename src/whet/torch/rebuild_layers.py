"""A traced graph in the words of ordinary models: torch's own layers and public functions, which train and quantize.

torch.export writes inner operations with the flags of inference in them. Here every operation that is all of one call of one
of torch's layers becomes a call of that layer again (so batch norms and dropouts follow `.train()` and `.eval()`), and every
other becomes the public function of the same name, with `self.training` for its flag.
"""

from __future__ import annotations

import copy
import inspect
import operator
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from whet.graph.ids import IntArray
from whet.torch.attributes import first_names, layer_attributes

_FLAGS = ("training", "train")  # arguments of operations that say whether the model trains
_SIZED = (nn.modules.conv._ConvNd, nn.GroupNorm)  # layers whose sites are attributes of theirs
_END = 2**63 - 1


def ordinary(graph: Any, model: Any, kept: Mapping[str, Mapping[int, IntArray]], rewritten: Iterable[str]) -> None:
    """*In place*: the operations of `graph`, a GraphModule that already holds the smaller tensors, as layers and functions.

    model: what was traced, whose layers are taken over. kept: the positions that are left of its tensors. rewritten: operations
    whose sizes are no longer those of the layer.
    """
    modules, calls, first = dict(model.named_modules()), _calls(graph), first_names(model)
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        path = _layer(node, modules, calls)
        if path and (node.name not in rewritten or isinstance(modules[path], _SIZED)):
            _take_over(graph, path, modules[path], kept, first)
            _call_layer(graph.graph, node, path)
        else:
            _call_function(graph.graph, node)
    for node in reversed(graph.graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.graph.erase_node(node)
    graph.recompile()


def _place(node: Any) -> tuple[str, str]:
    """One call of one module: its key in the trace, and its path."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    key, (path, _) = next(reversed(stack.items()))
    return str(key), str(path).removeprefix("L__self__").lstrip(".")


def _calls(graph: Any) -> Counter[str]:
    """How many operations there are in every call of a module."""
    return Counter(_place(node)[0] for node in graph.graph.nodes if node.op == "call_function")


def _layer(node: Any, modules: Mapping[str, Any], calls: Counter[str]) -> str:
    """The path of the layer of torch's own whose call this operation is; empty where it is none."""
    key, path = _place(node)
    module = modules.get(path)
    if not path or module is None or calls[key] != 1 or not type(module).__module__.startswith("torch.nn.modules."):
        return ""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    own = {f"{path}.{name}" for name in (*module._parameters, *module._buffers)}
    read = [source for source in node.all_input_nodes if source.op == "get_attr"]
    given = [source for source in node.all_input_nodes if source.op != "get_attr"]
    fits = len(given) == 1 and not any(hooks) and all(source.target in own for source in read)
    return path if fits and isinstance(node.meta.get("val"), torch.Tensor) else ""


def _take_over(
    graph: Any, path: str, module: Any, kept: Mapping[str, Mapping[int, IntArray]], first: Mapping[str, str]
) -> None:
    """Put a copy of `module` at its path in `graph`, with the tensors that `graph` holds there and attributes that fit them."""
    held = dict(graph.named_modules(remove_duplicate=False)).get(path)
    if type(held) is type(module):
        return  # called before
    made = copy.copy(module)
    for name in ("_parameters", "_buffers"):
        made.__dict__[name] = {**vars(module)[name], **(vars(held)[name] if held is not None else {})}
    vars(made).update(layer_attributes(made, path, kept, first))
    graph.add_submodule(path, made)


def _call_layer(graph: Any, node: Any, path: str) -> None:
    source = next(source for source in node.all_input_nodes if source.op != "get_attr")
    with graph.inserting_before(node):
        _replace(graph, node, graph.call_module(path, (source,)))


def _replace(graph: Any, old: Any, new: Any) -> None:
    new.meta = new.meta or dict(old.meta)
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def _call_function(graph: Any, node: Any) -> None:
    """The operation as a public function or method; one that is nowhere public stays as it is."""
    name = node.target._schema.name.split("::")[-1]
    if name == "_assert_tensor_metadata":  # what the trace was: it would tie the graph to one device
        graph.erase_node(node)
        return
    with graph.inserting_before(node):
        _flag(graph, node)
        if name in _SPECIAL:
            _replace(graph, node, _SPECIAL[name](graph, node, arguments(node)))
            return
        known = (getattr(torch, name, None), getattr(functional, name, None))
        found = next((function for function in known if _takes_the_same(function, node)), None)
        if found is not None:
            _replace(graph, node, graph.call_function(found, node.args, node.kwargs))
        elif hasattr(torch.Tensor, name) and node.target._schema.arguments[0].name == "self":
            _replace(graph, node, graph.call_method(name, node.args, node.kwargs))


def _takes_the_same(function: Any, node: Any) -> bool:
    """Whether a function has the operation's arguments in their order, as what is not written in Python always has."""
    if isinstance(function, types.FunctionType):
        own = list(inspect.signature(function).parameters)
        names = [given.name for given, _ in zip(node.target._schema.arguments, node.args, strict=False)]
        return [own[0], *names[1:]] == own[: len(names)] and not node.kwargs
    return isinstance(function, types.BuiltinFunctionType)


def _flag(graph: Any, node: Any) -> None:
    """An argument that says "does not train" asks the model from now on."""
    for i, (given, value) in enumerate(zip(node.target._schema.arguments, node.args, strict=False)):
        if given.name in _FLAGS and value is False:
            node.update_arg(i, graph.create_node("get_attr", "training"))


def arguments(node: Any) -> dict[str, Any]:
    """The arguments of an operation by their names in its schema."""
    schema = node.target._schema
    return {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)} | dict(node.kwargs)


def _slice(graph: Any, node: Any, given: dict[str, Any]) -> Any:
    start, end, step = given.get("start"), given.get("end"), given.get("step", 1)
    if start in (None, 0) and end in (None, _END) and step == 1:
        return given["self"]
    part = slice(start or None, None if end == _END else end, None if step == 1 else step)
    return graph.call_function(operator.getitem, (given["self"], (*_before(node, given), part)))


def _select(graph: Any, node: Any, given: dict[str, Any]) -> Any:
    return graph.call_function(operator.getitem, (given["self"], (*_before(node, given), given["index"])))


def _before(node: Any, given: dict[str, Any]) -> list[slice]:
    """Whole axes in front of the one that is indexed."""
    return [slice(None)] * (given.get("dim", 0) % given["self"].meta["val"].ndim)


def _pad(graph: Any, node: Any, given: dict[str, Any]) -> Any:
    how = {name: given[name] for name in ("mode", "value") if given.get(name) is not None}
    return graph.call_function(functional.pad, (given["self"], list(given["pad"])), how)


def _embedding(graph: Any, node: Any, given: dict[str, Any]) -> Any:
    padding = given.get("padding_idx", -1)
    return graph.call_function(
        functional.embedding, (given["indices"], given["weight"]), {} if padding == -1 else {"padding_idx": padding}
    )


def _index(graph: Any, node: Any, given: dict[str, Any]) -> Any:
    places = tuple(slice(None) if part is None else part for part in given["indices"])
    return graph.call_function(operator.getitem, (given["self"], places))


def _interpolate(mode: str) -> Callable[[Any, Any, dict[str, Any]], Any]:
    def call(graph: Any, node: Any, given: dict[str, Any]) -> Any:
        if node.target._overloadname != "vec":
            return graph.call_function(node.target, node.args, node.kwargs)
        names = {"output_size": "size", "scale_factors": "scale_factor", "align_corners": "align_corners"}
        chosen = {new: given[old] for old, new in names.items() if given.get(old) is not None}
        return graph.call_function(functional.interpolate, (given["input"],), {**chosen, "mode": mode})

    return call


def _to(graph: Any, node: Any, given: dict[str, Any]) -> Any:
    if given.get("dtype") is None or "other" in given:
        return graph.call_method("to", node.args, node.kwargs)
    return graph.call_method("to", (given["self"], given["dtype"]))


def _sym_size(graph: Any, node: Any, given: dict[str, Any]) -> Any:
    return graph.call_method("size", (given["self"], given["dim"]))


_SPECIAL: dict[str, Callable[[Any, Any, dict[str, Any]], Any]] = {
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "embedding": _embedding,
    "index": _index,
    **dict.fromkeys(("to", "_to_copy"), _to),
    "sym_size": _sym_size,
    "upsample_nearest2d": _interpolate("nearest"),
    "upsample_bilinear2d": _interpolate("bilinear"),
}
