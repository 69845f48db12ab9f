"""The weights of a PyTorch model on disk: safetensors, tied weights once, no pickle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from whet.errors import ModelError, RuntimeFileError
from whet.specs.base import import_function
from whet.torch.blocks import SKIPPED, skip_again
from whet.torch.model import copy
from whet.torch.rebuild import again
from whet.torch.surgery import GRAPH, SIZES, noted, resize

WEIGHTS = "model.safetensors"


def save_model(model: Any, folder: Path) -> dict[str, Any]:
    """Write the state of `model` to `folder`/model.safetensors, without pickle; a tied weight is written once.

    The result is plain: `{"file", "class": "module:name", "training", "aliases": {name: the name it is stored under}}`, and
    `"sizes": {module path: {attribute: value}}` where channels were removed, `"skipped"` where layers were, `"graphs"` where
    a graph was built of the rest.

    Raises:
        ModelError: the state holds something that is not a tensor.
    """
    tensors: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise ModelError(
                f"The state {name!r} of the model is a {type(value).__name__}; only tensors are saved, never pickles. "
                "Keep it in a buffer, or drop get_extra_state()."
            )
        value = value.detach()
        where = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and where in first:
            aliases[name] = first[where]
            continue
        first[where] = name
        # A view into a larger tensor is stored alone; safetensors takes neither shared nor strided memory.
        tensors[name] = value.clone(memory_format=torch.contiguous_format)
    try:
        save_file(tensors, folder / WEIGHTS)
    except (SafetensorError, KeyError, ValueError) as cause:
        raise ModelError(f"The weights cannot be stored as safetensors: {cause}.") from cause
    kept = {"file": WEIGHTS, "class": _class(model), "training": model.training, "aliases": aliases}
    kept |= {"sizes": noted(model, SIZES)} if noted(model, SIZES) else {}
    kept |= {"skipped": noted(model, SKIPPED)} if noted(model, SKIPPED) else {}
    graphs = noted(model, GRAPH)
    return kept | {"class": graphs[0]["class"], "graphs": graphs} if graphs else kept


def load_model(folder: Path, kept: dict[str, Any], model: Any) -> Any:
    """The model that `save_model` wrote: `model` rebuilt, with the stored values and dtypes.

    `model` is an instance of the original (a copy of it is loaded), a callable without arguments that builds one, or a
    text `module:function` that names such a callable.

    Raises:
        ModelError: `model` is missing, is none of these, or has other weights than were saved.
        RuntimeFileError: the file is missing or damaged.
    """
    made = _build(model, kept)
    try:
        state = load_file(folder / kept["file"])
    except (OSError, SafetensorError) as cause:
        raise RuntimeFileError(f"Cannot read the weights {str(folder / kept['file'])!r}: {cause}.") from cause
    state |= {alias: state[name] for alias, name in kept["aliases"].items()}
    skip_again(made, kept.get("skipped", {}))
    for graph in kept.get("graphs", [])[len(noted(made, GRAPH) or []) :]:  # `model` may be such a graph itself
        made = again(made, graph, kept.get("sizes", {}))
    if "sizes" in kept:
        resize(made, {name: tuple(tensor.shape) for name, tensor in state.items()}, kept["sizes"])
    _check(made, state, kept)
    # In each tensor's own dtype, so that what is read is what was written; `.data` keeps ties.
    for name, tensor in made.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin) and tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)
    made.load_state_dict(state)
    made.train(kept["training"])
    return made


def _build(model: Any, kept: dict[str, Any]) -> Any:
    name = kept["class"]
    if model is None:
        raise ModelError(
            f"A PyTorch model's weights were saved, not its code. Pass model=: an instance of {name}, a function without "
            "arguments that builds it, or the text 'module:function' that names one."
        )
    if isinstance(model, torch.nn.Module):
        return copy(model)
    builder: Callable[[], Any] = import_function(model) if isinstance(model, str) else model
    if not callable(builder):
        raise ModelError(f"model= must be a torch.nn.Module or a function that builds one, got a {type(model).__name__}.")
    try:
        made = builder()
    except TypeError as cause:
        raise ModelError(f"model= must build {name} when called without arguments: {cause}.") from cause
    if not isinstance(made, torch.nn.Module):
        raise ModelError(f"model= must build a torch.nn.Module ({name}), but it returned a {type(made).__name__}.")
    return made


def _check(made: Any, state: dict[str, Any], kept: dict[str, Any]) -> None:
    """Refuse a model whose state has other names or shapes than `state`."""
    own = made.state_dict(keep_vars=True)
    problems = [f"no {name}" for name in sorted(state) if name not in own]
    problems += [f"{name} was not saved" for name in own if name not in state]
    for name in (name for name in own if name in state):
        tensor = own[name]
        if isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin):
            continue
        if tensor.is_meta:
            raise ModelError(f"{name} of the model given is on the meta device. Build it on the CPU.")
        if tensor.shape != state[name].shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, saved was {tuple(state[name].shape)}")
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(
            f"The model given ({_class(made)}) is not the one that was saved ({kept['class']}): "
            f"{'; '.join(problems[:5])}{more}. Build it with the original's arguments."
        )


def _class(model: Any) -> str:
    return f"{type(model).__module__}:{type(model).__qualname__}"
