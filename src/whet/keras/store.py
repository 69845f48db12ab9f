"""A Keras model on disk, without pickle: the architecture and weights as `.keras`, or the weights alone."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from whet.errors import ModelError, RuntimeFileError
from whet.keras.blocks import drop_again, kept_sizes
from whet.keras.clone import has_graph, operations
from whet.keras.model import copy, random_state_kept, short
from whet.keras.sizes import Sizes, note, noted, resize
from whet.keras.views import to_numpy, walk
from whet.specs.base import import_function

MODEL, WEIGHTS = "model.keras", "model.weights.h5"


def save_model(model: Any, folder: Path) -> dict[str, Any]:
    """Write `model` into `folder`: architecture and weights as model.keras, which holds no code.

    What cannot be rebuilt from such a file (Lambda layers, custom classes that are not registered, a layer shared across
    nested models) is written as weights alone, and loading needs the code; the file is read back to find out. The result
    is plain: `{"file", "class": "module:name", "layers": the names of all layers in walking order, "needs_model": the
    reason or None}`, and `"sizes"` where channels were removed: `whet.keras.sizes.Sizes` as plain values.

    Raises:
        ModelError: Keras cannot write the model.
    """
    reason = _unbuildable(model)
    try:
        if reason is None:
            model.save(folder / MODEL)
            reason = _differs(model, folder / MODEL)
        if reason is not None:
            (folder / MODEL).unlink(missing_ok=True)
            model.save_weights(folder / WEIGHTS)
    except (TypeError, ValueError, NotImplementedError) as cause:
        raise ModelError(f"The model {model.name!r} cannot be saved: {short(cause)}") from cause
    names = [layer.name for _, layer in walk(model)]
    file = MODEL if reason is None else WEIGHTS
    kept = {"file": file, "class": _class(model), "layers": names, "needs_model": reason}
    sizes = noted(model)
    return kept if sizes is None else kept | {"sizes": sizes.to_dict()}


def _differs(model: Any, file: Path) -> str | None:
    """Why what Keras rebuilds from `file` is not `model`; None if it is."""
    try:
        with random_state_kept():
            again = keras.saving.load_model(file, compile=False, safe_mode=True)
    except (TypeError, ValueError, ImportError) as cause:
        return f"Keras cannot rebuild it from a file ({short(cause).rstrip('.')})"
    old, new = ([to_numpy(weight) for weight in made.weights] for made in (model, again))
    if len(old) != len(new) or not all(np.array_equal(a, b) for a, b in zip(old, new, strict=True)):
        return "Keras rebuilds it from a file with other weights"
    return None


def _unbuildable(model: Any) -> str | None:
    """Why `model` cannot be rebuilt from a file without running code from it; None if it can."""
    for path, layer in [*walk(model), (model.name, model)]:
        cls = type(layer)
        if isinstance(layer, keras.layers.Lambda):
            return f"the layer {path!r} is a Lambda, whose Python code is never saved"
        if not cls.__module__.startswith("keras.") and not _is_registered(cls):
            return f"the class {cls.__name__} of {path!r} is not registered (@keras.saving.register_keras_serializable())"
        for value in vars(layer).values():
            code = getattr(value, "__code__", None)
            module = str(getattr(value, "__module__", "keras."))
            if code is not None and not module.startswith("keras.") and not _is_registered(value):
                return f"the function {getattr(value, '__name__', value)!r} of {path!r} is not registered"
    return None


def _is_registered(thing: Any) -> bool:
    name = keras.saving.get_registered_name(thing)
    return keras.saving.get_registered_object(name) is thing


def load_model(folder: Path, kept: dict[str, Any], model: Any) -> Any:
    """The model that `save_model` wrote, with the same weights and layer names.

    Without `model` it is rebuilt from the file; Keras' safe mode is on, so that no code in the file ever runs. `model` is
    an instance of the original (a copy of it is loaded), a callable without arguments that builds one, or a text
    `module:function` that names such a callable.

    Raises:
        ModelError: `model` is needed and missing, is none of these, or has other weights than were saved.
        RuntimeFileError: the file is missing or damaged.
    """
    file = folder / kept["file"]
    if not file.is_file():
        raise RuntimeFileError(f"Cannot read the model {str(file)!r}: there is no such file.")
    if file.suffix == ".keras" and not zipfile.is_zipfile(file):
        raise RuntimeFileError(f"Cannot read the model {str(file)!r}: it is damaged, or no .keras file.")
    if model is None:
        loaded = _rebuild(file, kept)
    else:
        loaded = _dropped(_build(model, kept), kept)
        _check_layers(loaded, kept)
        _rename(loaded, kept)
        loaded = _resized(loaded, kept)
        try:
            loaded.load_weights(file)
        except (ValueError, KeyError) as cause:
            raise ModelError(
                f"The model given ({_class(loaded)}) does not take the weights that were saved ({kept['class']}): "
                f"{short(cause)} Build it with the original's arguments."
            ) from cause
        except (OSError, zipfile.BadZipFile) as cause:
            raise RuntimeFileError(f"Cannot read the weights {str(file)!r}: {short(cause)}") from cause
    _rename(loaded, kept)
    note(loaded, _sizes(kept))
    return loaded


def _rename(model: Any, kept: dict[str, Any]) -> None:
    """*In place*: layers that a custom layer makes for itself are numbered anew each time."""
    for (_, layer), name in zip(walk(model), kept["layers"], strict=False):
        if layer.name != name:
            layer.name = name


def _sizes(kept: dict[str, Any]) -> Sizes | None:
    return Sizes.from_dict(kept["sizes"]) if "sizes" in kept else None


def _dropped(model: Any, kept: dict[str, Any]) -> Any:
    """A model of the original's kind without the blocks that were removed before it was saved."""
    sizes, listed = _sizes(kept), len(list(walk(model)))
    return model if sizes is None or listed == len(kept["layers"]) else drop_again(model, sizes.dropped)


def _resized(model: Any, kept: dict[str, Any]) -> Any:
    """A model of the original's sizes without what was removed before it was saved; its weights are still to be loaded."""
    sizes = _sizes(kept)
    if sizes is None:
        return model
    resize(model, kept_sizes(sizes, model), operations(model))
    return copy(model) if has_graph(model) else model


def _rebuild(file: Path, kept: dict[str, Any]) -> Any:
    if kept["needs_model"] is not None:
        raise ModelError(
            f"Only the weights were saved, because {kept['needs_model']}. Pass model=: an instance of {kept['class']}, a "
            "function without arguments that builds it, or the text 'module:function' that names one."
        )
    try:
        with random_state_kept():
            return keras.saving.load_model(file, compile=False, safe_mode=True)
    except (OSError, zipfile.BadZipFile) as cause:
        raise RuntimeFileError(f"Cannot read the model {str(file)!r}: {short(cause)}") from cause
    except (TypeError, ValueError, ImportError) as cause:
        raise ModelError(
            f"The model {kept['class']} cannot be rebuilt from {str(file)!r}: {short(cause)} Import the module that registers "
            "its classes, or pass model=: an instance of the original or a function that builds it."
        ) from cause


def _build(model: Any, kept: dict[str, Any]) -> Any:
    name = kept["class"]
    if isinstance(model, keras.Model):
        return copy(model)
    builder: Callable[[], Any] = import_function(model) if isinstance(model, str) else model
    if not callable(builder):
        raise ModelError(f"model= must be a keras.Model or a function that builds one, got a {type(model).__name__}.")
    try:
        made = builder()
    except TypeError as cause:
        raise ModelError(f"model= must build {name} when called without arguments: {cause}.") from cause
    if not isinstance(made, keras.Model):
        raise ModelError(f"model= must build a keras.Model ({name}), but it returned a {type(made).__name__}.")
    if not made.built or not made.weights:
        raise ModelError(f"model= must build a model with weights; this {type(made).__name__} was never called. Call it once.")
    return made


def _check_layers(made: Any, kept: dict[str, Any]) -> None:
    count = len(list(walk(made)))
    if count != len(kept["layers"]):
        raise ModelError(
            f"The model given ({_class(made)}) is not the one that was saved ({kept['class']}): it has {count} layers, "
            f"saved were {len(kept['layers'])}. Build it with the original's arguments."
        )


def _class(model: Any) -> str:
    return f"{type(model).__module__}:{type(model).__qualname__}"
