"""A smaller model as a graph of its operations, for models whose own code fixes sizes (`Prune(rebuild="graph")`).

The result is a `torch.fx.GraphModule` of the forward pass: the layers are the model's own, parameters keep their names, and
what the model's code did between them is calls of torch's functions. Batch norms and dropouts follow `.train()` and `.eval()`;
it takes masks, quantizes, saves, loads and exports like any model. What the code decided while it was traced (in inference
mode, on a batch like the example) is fixed in it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from whet.errors import ModelError
from whet.graph.groups import Gone, Groups
from whet.graph.ids import IntArray
from whet.graph.structure import Site
from whet.torch.calls import shapes
from whet.torch.groups import Reading, read_model
from whet.torch.rebuild_layers import arguments, ordinary
from whet.torch.surgery import GRAPH, SIZES, holders, note, noted, resize, sliced

Sizes = list[int]


class RebuiltModel(torch.fx.GraphModule):  # type: ignore[misc]  # torch is Any to the type checker
    """A graph that is copied with its hooks and attributes, which a GraphModule would lose."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of the graph's argument trees
            made = super().__deepcopy__(memo)
            for name, value in vars(self).items():
                if name not in ("_graph", "_modules", "_parameters", "_buffers"):
                    made.__dict__[name] = copy.deepcopy(value, memo)
        return made


def rebuilt(model: Any, reading: Reading, kept: Mapping[str, Mapping[int, IntArray]], sizes: Mapping[str, Sizes]) -> Any:
    """The graph of `reading` with only the `kept` positions of its tensors, and with the new `sizes` of its sites.

    sizes: for the name of an operation, what the sizes written into it become, in the order of its site's pieces.

    Raises:
        ModelError: a size is written into an operation that is not known here.
    """
    traced = reading.program.module(check_guards=False)
    graph = RebuiltModel(traced, traced.graph)
    places = holders(graph)
    for name, axes in kept.items():
        if name in places:
            where, key = places[name][0]
            new = sliced(where[key].detach(), axes)
            if isinstance(where[key], torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=where[key].requires_grad)
            for where, key in places[name]:  # several for a tied tensor
                where[key] = new
    for node in graph.graph.nodes:
        if node.name in sizes:
            _rewrite(node, sizes[node.name])
    ordinary(graph, model, kept, sizes)
    graph.training = model.training
    return graph


def new_sizes(groups: Groups, gone: Gone) -> dict[str, Sizes]:
    """What becomes of the sizes of every site of which any changes."""
    ids = groups.structure.ids

    def left(site: Site) -> Sizes:
        return [int((~gone[ids.find(piece)]).sum()) for piece in site.pieces]

    return {site.name: left(site) for site in groups.structure.sites if left(site) != [len(piece) for piece in site.pieces]}


def _set(node: Any, name: str, value: Any) -> None:
    names = [a.name for a in node.target._schema.arguments]
    if name in node.kwargs or names.index(name) >= len(node.args):
        node.kwargs = {**node.kwargs, name: value}
    else:
        at = names.index(name)
        node.args = (*node.args[:at], value, *node.args[at + 1 :])


def _rewrite(node: Any, sizes: Sizes) -> None:
    op = node.target._schema.name.split("::")[-1]
    if op not in _REWRITES:
        raise ModelError(f"The sizes of {op} cannot be rewritten. Name the layers around it in keep=.")
    _REWRITES[op](node, sizes, arguments(node))


def _shape(name: str) -> Callable[[Any, Sizes, dict[str, Any]], None]:
    """A list with one number for each dimension of the result. -1 stays; what the graph computes becomes -1 if it changes."""

    def rewrite(node: Any, sizes: Sizes, given: dict[str, Any]) -> None:
        rows = zip(given[name], shapes(node)[0], sizes, strict=True)
        _set(node, name, [new if isinstance(n, int) and n != -1 else n if old == new else -1 for n, old, new in rows])

    return rewrite


def _unflatten(node: Any, sizes: Sizes, given: dict[str, Any]) -> None:
    start = given["dim"] % (len(sizes) - len(given["sizes"]) + 1)
    inside = sizes[start : start + len(given["sizes"])]
    _set(node, "sizes", [new if isinstance(n, int) and n != -1 else n for n, new in zip(given["sizes"], inside, strict=True)])


def _pad(node: Any, sizes: Sizes, given: dict[str, Any]) -> None:
    name = "pad" if "pad" in given else "padding"
    pairs = [(sizes[i], sizes[i + 1]) for i in range(0, len(sizes), 2)][::-1]
    old = given[name]
    flat = [n for pair in pairs for n in pair][: len(old)]
    _set(node, name, [new if before > 0 else before for before, new in zip(old, flat, strict=True)])


def _split(node: Any, sizes: Sizes, given: dict[str, Any]) -> None:
    name = "split_size" if "split_size" in given else "split_sizes"
    _set(node, name, sizes if isinstance(given[name], list | tuple) else sizes[0])


def _slice(node: Any, sizes: Sizes, given: dict[str, Any]) -> None:
    _set(node, "start", sizes[0])
    _set(node, "end", sizes[1])


def _narrow(node: Any, sizes: Sizes, given: dict[str, Any]) -> None:
    _set(node, "start", sizes[0])
    _set(node, "length", sizes[1] - sizes[0])


def _groups(name: str) -> Callable[[Any, Sizes, dict[str, Any]], None]:
    return lambda node, sizes, given: _set(node, name, sizes[0])


def _same(node: Any, sizes: Sizes, given: dict[str, Any]) -> None:
    """The operation works its sizes out itself."""


_REWRITES: dict[str, Callable[[Any, Sizes, dict[str, Any]], None]] = {
    **dict.fromkeys(
        ("view expand broadcast_to _unsafe_view zeros ones full empty new_zeros new_ones new_full new_empty").split(),
        _shape("size"),
    ),
    "reshape": _shape("shape"),
    "unflatten": _unflatten,
    **dict.fromkeys(("flatten", "squeeze", "unsqueeze"), _same),
    **dict.fromkeys(("pad", "constant_pad_nd", "zero_pad2d"), _pad),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "slice": _slice,
    "narrow": _narrow,
    **{f"{kind}{n}d": _groups("groups") for kind in ("conv", "conv_transpose") for n in (1, 2, 3)},
    "group_norm": _groups("num_groups"),
    "channel_shuffle": _groups("groups"),
}


def plain_record(model: Any, example: Any, kept: Mapping[str, Mapping[int, IntArray]], sizes: Mapping[str, Sizes]) -> Any:
    """What `again` needs to rebuild the same graph from the same original, in plain values."""
    return {
        "class": f"{type(model).__module__}:{type(model).__qualname__}",
        "example": _outline(example),
        "shapes": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
        "kept": {name: {str(axis): positions.tolist() for axis, positions in axes.items()} for name, axes in kept.items()},
        "sites": {name: list(new) for name, new in sizes.items()},
    }


def again(model: Any, record: Mapping[str, Any], sizes: Mapping[str, Mapping[str, Any]]) -> Any:
    """The graph that was saved, from the original `model`; its values are loaded next.

    Raises:
        ModelError: the model is another one than was saved.
    """
    shapes = {name: tuple(shape) for name, shape in record["shapes"].items()}
    resize(model, shapes, sizes)
    reading = read_model(model, _zeros(record["example"]), dynamic=True)
    kept = {
        name: {int(axis): np.asarray(positions, np.int64) for axis, positions in axes.items()}
        for name, axes in record["kept"].items()
    }
    found = rebuilt(model, reading, kept, record["sites"])
    keep_records(model, found, record)
    return found


def keep_records(model: Any, graph: Any, record: Mapping[str, Any]) -> None:
    """Hand what is known of `model`'s removals on to the graph made of it."""
    note(graph, GRAPH, [*(noted(model, GRAPH) or []), dict(record)])
    if noted(model, SIZES):
        note(graph, SIZES, noted(model, SIZES))


def _outline(value: Any) -> Any:
    """The structure, shapes and dtypes of a batch, in plain values."""
    if isinstance(value, Mapping):
        return {"mapping": {str(key): _outline(item) for key, item in value.items()}}
    if isinstance(value, tuple | list):
        return {"tuple": [_outline(item) for item in value]}
    array = np.asarray(value)
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


def _zeros(outline: Mapping[str, Any]) -> Any:
    if "mapping" in outline:
        return {key: _zeros(item) for key, item in outline["mapping"].items()}
    if "tuple" in outline:
        return tuple(_zeros(item) for item in outline["tuple"])
    return np.zeros(outline["shape"], outline["dtype"])
