"""A Keras model as it is handed in: checked, copied, run."""

from __future__ import annotations

import inspect
import random
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from whet.errors import DataError, ModelError
from whet.keras.sizes import Sizes, drop, note, noted, resize
from whet.keras.views import assign_copy, own_weights, to_numpy, walk

Model = Any
Layer = Any

_OWN = tuple(f"whet.keras.{name}" for name in ("quantize", "convert", "learned", "arithmetic", "variants"))
_forwards: weakref.WeakKeyDictionary[Model, Callable[[Any], Any]] = weakref.WeakKeyDictionary()


def validate(model: Model) -> None:
    """Check that `model` can be compressed.

    Raises:
        ModelError: it is not built, has no weights, is already quantized, or holds NaN or Inf (tensor and index are named).
    """
    if not model.built or not all(layer.built for _, layer in walk(model)):
        raise ModelError(
            f"The model {model.name!r} is not built: its weights do not exist yet. Call it once on a batch, "
            "or give it an Input layer, and pass it again."
        )
    if not model.weights:
        raise ModelError(f"The model {model.name!r} has no weights: there is nothing to compress.")
    for path, layer in walk(model):
        if any(kind.__module__ in _OWN for kind in type(layer).__mro__):
            raise ModelError(
                f"The layer {path!r} is Whet's own: this model is quantized already, or prepared for training. Pass the float "
                "model it was made from; a prepared one becomes a result with whet.finish(model)."
            )
        mode = getattr(layer, "quantization_mode", None)
        if mode is not None:
            raise ModelError(
                f"The layer {path!r} is already quantized ({mode}, by keras' quantize()). "
                "Pass the float model: Whet quantizes it."
            )
    named = [(path, layer) for path, layer in walk(model)] + [("", model)]
    seen: set[int] = set()
    for path, layer in named:
        for variable in own_weights(layer):
            if id(variable) not in seen:
                seen.add(id(variable))
                _check_finite(f"{path}/{variable.name}".lstrip("/"), variable)


def _check_finite(name: str, variable: Any) -> None:
    array = to_numpy(variable)
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return
    wrong = np.argwhere(~np.isfinite(array))
    bad = tuple(int(i) for i in wrong[0])
    raise ModelError(
        f"The weight {name!r} holds {array[bad]} at index {bad}, and {len(wrong)} non-finite values in all. "
        "Load a sound checkpoint."
    )


def copy(model: Model) -> Model:
    """An independent copy with the same weights, names and trainable flags; it is not compiled.

    Functional and Sequential models are cloned layer by layer, nested ones too; other classes are made again from
    `get_config()`. No class needs to be registered. The random state of the process is left as it was.

    Raises:
        ModelError: a class cannot be made again from its configuration.
    """
    with random_state_kept(), keras.saving.custom_object_scope(custom_objects(model)):
        try:
            new = _clone(model)
        except Exception as cause:
            raise ModelError(
                f"The model {model.name!r} ({type(model).__name__}) could not be copied: {short(cause).rstrip('.')}. "
                "Whet works on a copy, made from get_config(). Give each custom class a get_config() that returns the "
                "arguments of its constructor, and let the constructor pass **kwargs on to super().__init__."
            ) from cause
        if not is_plain(model) and (sizes := noted(model)) is not None:
            _resized(model, new, sizes)
    transfer(model, new)
    note(new, noted(model))
    return new


def _resized(model: Model, new: Model, sizes: Sizes) -> None:
    """*In place*: a class of the user's has made all layers, in the original's sizes, and numbered them anew."""
    if len(list(walk(new))) != len(list(walk(model))):
        drop(new, sizes.dropped)
    for (_, old_layer), (_, new_layer) in zip(walk(model), walk(new), strict=False):
        new_layer.name = old_layer.name
    resize(new, sizes, dict(walk(new)))


def _clone(model: Model) -> Model:
    if not is_plain(model):
        return _revive(model)
    # Keras would make nested classes derived from Functional plain Functional models: they are made beforehand.
    derived = [layer for _, layer in walk(model) if isinstance(layer, keras.Model) and not is_plain(layer)]
    made = {id(layer): _revive(layer) for layer in derived}
    clone = keras.models.clone_model(model, clone_function=_clone_layer, recursive=True, cache=made)
    if not clone.built:  # a Sequential without Input, built by its first call
        clone.build(model.inputs[0].shape)
    return clone


def is_plain(model: Model) -> bool:
    """Whether it is Keras' own Functional or Sequential, not a class derived from them."""
    return isinstance(model, keras.Model) and type(model).__module__.startswith("keras.")


def _clone_layer(layer: Layer) -> Layer:
    if not isinstance(layer, keras.Layer):  # a node made by keras.ops
        return type(layer).from_config(layer.get_config())
    if isinstance(layer, keras.layers.Lambda):
        config = layer.get_config()
        return keras.layers.Lambda(
            layer.function, output_shape=layer._output_shape, mask=layer.mask, arguments=layer.arguments, name=config["name"]
        )
    return _revive(layer)


def _revive(layer: Layer) -> Layer:
    """A layer or model of the same class and configuration, built like it."""
    base = ("name", "trainable", "dtype")  # what Layer.get_config adds, and a bare constructor does not take
    accepted = inspect.signature(type(layer).__init__).parameters
    named = [name for name, p in accepted.items() if p.kind is not p.VAR_KEYWORD][1:]
    own = [name for name in named if name not in base]
    if own and isinstance(layer, keras.Model) and type(layer).get_config is keras.Model.get_config:
        # Keras 3.15 forgets the arguments of a model's constructor, and would silently take its defaults.
        raise ModelError(f"{type(layer).__name__} takes {', '.join(own)} and has no get_config() that returns them")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The object being serialized includes a `lambda`")
        config = layer.get_config()
    # The user's own functions (a lambda as activation) are taken as they are, not from their serialized form.
    config |= {key: value for key, value in vars(layer).items() if key in config and _is_own_function(value)}
    if len(named) + 1 == len(accepted):
        config = {key: value for key, value in config.items() if key in accepted or key not in base}
    new = type(layer).from_config(config)
    if layer.built and not new.built and isinstance(layer, keras.Model):
        build = layer.get_build_config()
        if build:
            new.build_from_config(build)
            new.built = True  # Keras builds the layers and forgets to say so of the model
    return new


def transfer(model: Model, new: Model) -> None:
    """Give `new` the weights, states, names and trainable flags of `model`, layer by layer.

    Raises:
        ModelError: they are not made of the same layers.
    """
    pairs = list(zip(walk(model), walk(new), strict=False))
    if len(list(walk(model))) != len(list(walk(new))):
        raise ModelError(_unlike(model, f"it has {len(list(walk(model)))} layers and its copy {len(list(walk(new)))}"))
    for (path, old_layer), (_, new_layer) in [*pairs, (("", model), ("", new))]:
        if type(old_layer) is not type(new_layer):
            raise ModelError(_unlike(model, f"{path!r} is a {type(old_layer).__name__}, its copy a {type(new_layer).__name__}"))
        _transfer_layer(path or model.name, old_layer, new_layer)


def _transfer_layer(path: str, old: Layer, new: Layer) -> None:
    old_weights, new_weights = own_weights(old), own_weights(new)
    shapes = [tuple(w.shape) for w in old_weights], [tuple(w.shape) for w in new_weights]
    if shapes[0] != shapes[1]:
        raise ModelError(_unlike(old, f"{path!r} has weights of shapes {shapes[0]}, its copy {shapes[1]}"))
    for source, goal in zip(old_weights, new_weights, strict=True):
        assign_copy(goal, source)
    if isinstance(old, keras.layers.Normalization):
        new.finalize_state()
    if new.name != old.name:  # layers that a custom layer makes for itself are numbered anew in every copy
        new.name = old.name
    if new.trainable != old.trainable and not isinstance(old, keras.Model):
        new.trainable = old.trainable


def _unlike(model: Model, what: str) -> str:
    return (
        f"The model {model.name!r} could not be copied: {what}. A custom class must make the same layers again from its "
        "get_config()."
    )


def custom_objects(model: Model) -> dict[str, Any]:
    """The classes and functions that `model` is made of, by name, so that none needs to be registered."""
    found: dict[str, Any] = {type(model).__name__: type(model)}
    for _, layer in walk(model):
        if not type(layer).__module__.startswith("keras."):
            found[type(layer).__name__] = type(layer)
        for value in vars(layer).values():
            if _is_own_function(value):
                found[value.__name__] = value
    return {name: item for name, item in found.items() if not item.__module__.startswith("keras.")}


def _is_own_function(value: Any) -> bool:
    return inspect.isfunction(value) and not value.__module__.startswith("keras.")


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Python's and NumPy's global random states are the same after the block: Keras draws layer seeds from them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def predict(model: Model, inputs: Any) -> Any:
    """Outputs in inference mode as NumPy arrays, in the model's own structure. `inputs` as `Batches` yields them.

    The model's compiled state is untouched. The forward pass is compiled once for each model object: a model whose
    layers are exchanged after its first prediction must be copied.

    Raises:
        DataError: the model does not take these inputs.
    """
    return keras.tree.map_structure(to_numpy, forward(model, inputs))


def forward(model: Model, inputs: Any) -> Any:
    """As `predict`, with the backend's own tensors."""
    arranged = arrange(model, inputs)
    if model not in _forwards:
        _forwards[model] = _compiled(weakref.ref(model))
    try:
        return _forwards[model](keras.tree.map_structure(keras.ops.convert_to_tensor, arranged))
    except Exception as cause:
        raise DataError(f"The model {model.name!r} cannot run on inputs of {describe(inputs)}: {short(cause)}") from cause


def _compiled(reference: Callable[[], Model]) -> Callable[[Any], Any]:
    """The forward pass on this backend; it holds the model weakly, so that nothing outlives it."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
        def call(inputs: Any) -> Any:
            return reference()(inputs, training=False)

        function = tf.function(call, reduce_retracing=True)
        function._omit_frequent_tracing_warning = True  # many models are run, each traced once: not what it warns of
        return function  # type: ignore[no-any-return]
    if backend == "jax":
        import jax

        def stateless(trainable: Any, others: Any, inputs: Any) -> Any:
            return reference().stateless_call(trainable, others, inputs, training=False)[0]

        compiled = jax.jit(stateless)

        def run(inputs: Any) -> Any:
            model = reference()
            values = [[v.value for v in part] for part in (model.trainable_variables, model.non_trainable_variables)]
            return compiled(*values, inputs)

        return run
    if backend == "torch":
        import torch

        def eager(inputs: Any) -> Any:
            with torch.no_grad():
                return reference()(inputs, training=False)

        return eager
    return lambda inputs: reference()(inputs, training=False)


def arrange(model: Model, inputs: Any) -> Any:
    """`inputs` in the structure that a Functional model declares: a dict is matched by input names, a tuple by order.

    Raises:
        DataError: an input is missing or of another shape, or there are too many.
    """
    declared = model.inputs if is_plain(model) else None
    if not declared:
        return inputs
    structure = getattr(model, "_inputs_struct", declared[0])  # the structure the model was made with; Sequential has one input
    if isinstance(inputs, Mapping):
        names = list(structure) if isinstance(structure, Mapping) else [tensor.name for tensor in declared]
        missing = [name for name in names if name not in inputs]
        if missing:
            raise DataError(f"The model {model.name!r} needs an input named {missing[0]!r}; the batch has {sorted(inputs)}.")
        given = [inputs[name] for name in names]
    else:
        given = list(inputs) if isinstance(inputs, tuple | list) else [inputs]
    if len(given) != len(declared):
        raise DataError(f"The model {model.name!r} takes {len(declared)} inputs, got {len(given)} of {describe(inputs)}.")
    for tensor, array in zip(declared, given, strict=True):
        want, got = tuple(tensor.shape), tuple(array.shape)
        if len(want) == len(got) and any(w is not None and w != g for w, g in zip(want[1:], got[1:], strict=True)):
            raise DataError(f"The input {tensor.name!r} of {model.name!r} has shape {want}, got an array of shape {got}.")
    if isinstance(structure, Mapping):
        return dict(zip(structure, given, strict=True))
    return keras.tree.pack_sequence_as(structure, given) if isinstance(structure, list | tuple) else given[0]


def describe(value: Any) -> str:
    """The shapes of a batch, for messages."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(describe(item) for item in value) + ")"
    return f"shape {tuple(value.shape)}"


def short(cause: BaseException) -> str:
    """What another library's message says first; of Keras and TensorFlow wrappers, what failed inside them."""
    lines = str(cause).split("\n")
    node = next((i for i, line in enumerate(lines) if "[[{{node" in line), 0)
    paragraphs = [lines[node - 1]] if node else str(cause).split("\n\n")
    if paragraphs[0].startswith("Exception encountered when calling") and len(paragraphs) > 1:
        paragraphs = paragraphs[1:]
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", paragraphs[0]).split()) or type(cause).__name__
    return text if len(text) <= 400 else f"{text[:400]}…"
