"""What a PyTorch training stands on between two steps, as plain values and NumPy arrays: tensors, optimizers, generators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from whet.torch.sharding import divided, whole

_TENSOR = {"dtype", "shape", "bytes"}


def packed(tree: Any) -> Any:
    """`tree` with every tensor as its type, shape and bytes: NumPy lacks some of torch's types."""
    if isinstance(tree, Mapping):
        return {key: packed(item) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return [packed(item) for item in tree]
    if not isinstance(tree, torch.Tensor):
        return tree
    tensor = whole(tree.detach()).cpu().contiguous()
    kind = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": kind, "shape": list(tensor.shape), "bytes": tensor.reshape(-1).view(torch.uint8).numpy()}


def unpacked(tree: Any) -> Any:
    """What `packed` made `tree` of, on the CPU."""
    if isinstance(tree, list):
        return [unpacked(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if set(tree) == _TENSOR:
        return torch.from_numpy(tree["bytes"].copy()).view(getattr(torch, tree["dtype"])).reshape(tree["shape"])
    return {key: unpacked(item) for key, item in tree.items()}


def optimizer_state(optimizer: Any) -> list[list[Any]]:
    """The moments of an optimizer, by the index of their parameter."""
    return [[index, state] for index, state in optimizer.state_dict()["state"].items()]


def load_optimizer(optimizer: Any, state: list[list[Any]]) -> None:
    """*In place*: the moments of `optimizer_state`; the groups' settings stay."""
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {index: {key: divided(value, parameters[index]) for key, value in moments.items()} for index, moments in state}
    optimizer.load_state_dict({"state": own, "param_groups": groups})


def generator_states(source: Any) -> dict[str, Any]:
    """Where torch's random numbers stand: the global ones, those of each GPU in use, and the loader's own."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        found |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    own = getattr(source, "generator", None)
    return found | ({"loader": own.get_state()} if isinstance(own, torch.Generator) else {})


def set_generator_states(source: Any, states: Mapping[str, Any]) -> None:
    """Go on with the random numbers of `generator_states`."""
    for name, state in states.items():
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == "loader":
            source.generator.set_state(state)
        else:
            torch.cuda.set_rng_state(state, name)
