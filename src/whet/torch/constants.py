"""Channels that leave but were not zero: what they always were is added to the layers that read them.

A channel whose weights are zero, or whose batch norm scales it to nothing, is a constant c behind its bias and activation
(`σ(0) = 1/2`). A linear layer that reads it adds `W[:, channel] · c` to its outputs, and this goes into its bias, or into the
running mean of the batch norm behind it. A convolution's kernel is summed; where it reads padding the original adds less, and
this is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from whet.graph.cutting import CONSTANT, Constants, kinds_of
from whet.graph.groups import Gone
from whet.graph.ids import IntArray
from whet.torch.attributes import first_names
from whet.torch.groups import Reading, layer_of
from whet.torch.interception import map_tensors
from whet.torch.program import arguments as positional
from whet.torch.rebuild_layers import arguments

UNSEEN = -1


@dataclass(frozen=True, slots=True)
class Role:
    """Arguments of a linear operation by name; the channel axis of its input, the axis of its weight that is summed over."""

    input: str
    weight: str
    bias: str
    channel: int
    reads: int


_ROLES = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), Role("input", "weight", "bias", 1, 1)),
    "linear": Role("input", "weight", "bias", -1, 1),
    "addmm": Role("mat1", "mat2", "self", -1, 0),
}


class Seen(torch.nn.Module):  # type: ignore[misc]  # torch is Any to the type checker
    """Notes the least and greatest value of every channel that passes."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.low: Any = None
        self.high: Any = None

    def forward(self, x: Any) -> None:
        """Note the values of `x`."""
        rows = x.detach().movedim(self.axis, 0).flatten(1).double()
        low, high = rows.amin(1), rows.amax(1)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


@dataclass(frozen=True, slots=True)
class Reader:
    """A linear operation that reads channels which leave. at: their positions."""

    node: Any
    weight: str
    role: Role
    at: IntArray
    seen: Seen


def put_back(found: Constants) -> None:
    """Put the tensors back."""
    for tensor, values in reversed(found.before):
        tensor.data = values


def fold_constants(model: Any, reading: Reading, gone: Gone) -> Constants:
    """*In place*: biases take over what channels that are `gone` always were; what cannot be taken over is told.

    Whether a channel is constant is seen on the example that the model was read with and on other numbers in its place.
    """
    found, kinds = Constants(), dict.fromkeys(np.flatnonzero(gone).tolist(), UNSEEN)
    for reader in _readers(model, reading, gone):
        low, high = (side.cpu().numpy()[reader.at] for side in (reader.seen.low, reader.seen.high))
        kind = kinds_of(low, high)
        roots = reading.groups.held_roots()[reader.weight][reader.role.reads][reader.at]
        for root, one in zip(roots.tolist(), kind.tolist(), strict=True):
            kinds[root] = max(kinds[root], one)
        is_constant = kind == CONSTANT
        if is_constant.any():
            _fold(model, reader, reader.at[is_constant], ((low + high) / 2)[is_constant], found)
    found.count(kinds.values())
    return found


def _readers(model: Any, reading: Reading, gone: Gone) -> list[Reader]:
    """The linear operations that read channels which leave, after the graph has run on two batches."""
    graph, first, held = reading.program.module(check_guards=False), first_names(model), reading.groups.held_roots()
    found: list[Reader] = []
    for node in list(graph.graph.nodes):
        role = _ROLES.get(_operation(node))
        given = arguments(node) if role else {}
        if role is None or given[role.weight].op != "get_attr" or given.get("groups", 1) != 1:
            continue
        name = first[str(given[role.weight].target)]
        at = np.flatnonzero(gone[held[name][role.reads]])
        if len(at):
            path, seen = f"whet_seen_{len(found)}", Seen(role.channel)
            graph.add_submodule(path, seen)
            with graph.graph.inserting_before(node):
                graph.graph.call_module(path, (given[role.input],))
            found.append(Reader(node, name, role, at, seen))
    graph.recompile()
    with torch.no_grad():
        for inputs in (reading.inputs, map_tensors(reading.inputs, _others)) if found else ():
            args, kwargs = positional(inputs)
            graph(*args, **kwargs)
    return found


def _operation(node: Any) -> str:
    """The name of an operation of the graph; empty for other nodes."""
    return node.target._schema.name.split("::")[-1] if isinstance(node.target, torch._ops.OpOverload) else ""


def _others(tensor: Any) -> Any:
    """Other inputs of the same kind: what varies with the inputs varies between the two."""
    turned = tensor.flip(-1) if tensor.ndim else tensor
    if not tensor.is_floating_point():
        return turned
    waves = torch.sin(torch.arange(tensor.numel(), device=tensor.device, dtype=torch.float32) * 1.7).reshape(tensor.shape)
    return turned * -1.5 + waves.to(tensor.dtype)


def _fold(model: Any, reader: Reader, at: IntArray, values: Any, found: Constants) -> None:
    """Add what channels `at` always were, `values`, to what `reader` makes."""
    row: dict[str, Any] = {"layer": layer_of(reader.node), "channels": len(at), "largest": float(np.abs(values).max())}
    name, sign, reason = _receiver(reader)
    if reason:
        found.left.append({**row, "reason": reason})
        return
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    into, weight = tensors[name], tensors[reader.weight].detach()
    columns = weight.index_select(reader.role.reads, torch.from_numpy(at).to(weight.device)).double()
    columns = (
        columns.movedim(reader.role.reads, 0).flatten(2).sum(2) if weight.ndim > 2 else columns.movedim(reader.role.reads, 0)
    )
    found.before.append((into, into.data))
    into.data = into.data + (sign * (torch.from_numpy(values).to(columns) @ columns)).to(into.dtype)
    found.folded.append({**row, "into": name, "borders": "differ" if _pads(reader.node) else "exact"})


def _receiver(reader: Reader) -> tuple[str, int, str]:
    """The tensor that takes the constant, its sign, and why none does."""
    node, given = reader.node, arguments(reader.node)
    if len(given[reader.role.weight].users) > 1:
        return "", 0, "its weight is read several times"
    bias = given.get(reader.role.bias)
    if bias is not None:
        alone = bias.op == "get_attr" and len(bias.users) == 1
        return (str(bias.target), 1, "") if alone else ("", 0, "its bias is not its alone")
    users = list(node.users)
    norm = arguments(users[0]) if len(users) == 1 and _operation(users[0]) == "batch_norm" else {}
    mean = norm.get("running_mean")
    if mean is not None and mean.op == "get_attr" and len(mean.users) == 1 and not norm["training"]:
        return str(mean.target), -1, ""
    return "", 0, "it has no bias, and no batch norm reads it alone"


def _pads(node: Any) -> bool:
    """Whether a convolution reads zeros around its input."""
    padding = arguments(node).get("padding", 0)
    listed = padding if isinstance(padding, list | tuple) else [padding]
    return any(n not in (0, "valid") for n in listed)
