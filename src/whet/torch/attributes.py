"""Attributes of modules that say how many channels there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from whet.errors import ModelError
from whet.graph.groups import Gone, Groups
from whet.graph.ids import IntArray
from whet.torch.views import is_conv1d

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """`module.name = value`."""

    module: Any
    path: str
    name: str
    value: Any


def own_changes(model: Any, groups: Groups, gone: Gone) -> list[Change]:
    """Attributes of torch's own layers whose tensors have become smaller."""
    changes = []
    kept, first = groups.kept(gone), first_names(model)
    for path, module in model.named_modules():
        new = layer_attributes(module, path, kept, first)
        changes += [Change(module, path, key, value) for key, value in new.items() if vars(module).get(key) != value]
    return changes


def layer_attributes(
    module: Any, path: str, kept: Mapping[str, Mapping[int, IntArray]], first: Mapping[str, str]
) -> dict[str, Any]:
    """What the attributes of a layer of torch's own are that has lost positions; nothing of one that has not.

    module: it holds the smaller tensors already, and its old attributes. kept: the positions that are left, under the `first`
    names of the tensors.

    Raises:
        ModelError: its groups would keep different numbers of channels.
    """

    def left(key: str) -> Mapping[int, IntArray]:
        tensor = getattr(module, key, None)
        return {} if tensor is None else kept.get(first.get(f"{path}.{key}" if path else key, ""), {})

    lost = any(left(key) for key in (*module._parameters, *module._buffers))
    return _attributes(module, path, left) if lost else {}


def first_names(model: Any) -> dict[str, str]:
    """For every name of a tensor the first of its names, under which groups hold it."""
    first: dict[int, str] = {}
    names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in names}


def _attributes(module: Any, path: str, left: Any) -> dict[str, Any]:
    weight: Any = getattr(module, "weight", None)  # computed, where it is parametrized: then its bias tells what is left
    rows = left("weight").get(0, left("bias").get(0))
    if isinstance(module, _CONV):
        groups = _groups_left(module.groups, module.out_channels, rows, path)
        return {"groups": groups, "in_channels": weight.shape[1] * groups, "out_channels": weight.shape[0]}
    if isinstance(module, _CONV_TRANSPOSE):
        groups = _groups_left(module.groups, module.in_channels, left("weight").get(0), path)
        return {"groups": groups, "in_channels": weight.shape[0], "out_channels": weight.shape[1] * groups}
    if isinstance(module, nn.Linear):
        return {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    if isinstance(module, nn.Bilinear):
        return {"in1_features": weight.shape[1], "in2_features": weight.shape[2], "out_features": weight.shape[0]}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        vector = weight if weight is not None else module.running_mean
        return {"num_features": len(vector)}
    if isinstance(module, nn.GroupNorm):
        return {
            "num_groups": _groups_left(module.num_groups, module.num_channels, rows, path),
            "num_channels": len(weight),
        }
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": weight.shape[1]}
    if isinstance(module, nn.RNNBase):
        return {"input_size": module.weight_ih_l0.shape[1], "hidden_size": module.weight_hh_l0.shape[1]}
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": len(weight)}
    if is_conv1d(module):
        return {"nx": weight.shape[0], "nf": weight.shape[1]} if hasattr(module, "nx") else {"nf": weight.shape[1]}
    return {}


def _groups_left(groups: int, size: int, kept: IntArray | None, path: str) -> int:
    """How many of a layer's groups are left: all where each lost as many rows, else those that are whole."""
    if kept is None or groups == 1:
        return groups
    counts = np.bincount(kept // (size // groups), minlength=groups)
    if len(set(counts.tolist())) == 1:
        return groups
    if set(counts.tolist()) <= {0, size // groups}:
        return int((counts > 0).sum())
    raise ModelError(f"The groups of {path} would keep different numbers of channels: {counts.tolist()}.")


def candidates(module: Any, pairs: Iterable[tuple[int, int]]) -> list[Change]:
    """Integer attributes of `module` (also within tuples) that hold an old size of `pairs` = (old, new).

    Where one old size has several new ones, the attribute is left alone.
    """
    news: dict[int, set[int]] = {}
    for old, new in pairs:
        news.setdefault(old, set()).add(new)
    sure = {old: min(new) for old, new in news.items() if len(new) == 1}
    found = []
    for name, value in vars(module).items():
        if name in ("training", "_version") or isinstance(value, bool):
            continue
        if isinstance(value, int) and value in sure:
            found.append(Change(module, "", name, sure[value]))
        elif isinstance(value, tuple | list) and any(type(n) is int and n in sure for n in value):
            replaced = [sure.get(n, n) if type(n) is int else n for n in value]
            found.append(Change(module, "", name, type(value)(replaced) if type(value) in (tuple, list) else value))
    return found
