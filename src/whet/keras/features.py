"""What layers inside a Keras model compute, as further outputs of a model that shares its weights."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import keras

from whet.errors import ModelError


def with_features(model: Any, *names: str) -> Any:
    """A model that returns `(outputs, {layer name: its output, …})`, made of the same layers: training it trains `model`.

    `names` are names or patterns of layers of a Functional or Sequential model; of a layer that is called more than once,
    its first output is taken. Together with `layer_loss` it distills
    features in your own loop: one forward pass of each model gives logits and features.

        student, teacher = with_features(student, "conv2"), with_features(teacher, "conv4")
        logits, found = student(x, training=True)
        loss = layer_loss(AttentionTransfer("conv2", "conv4"), found["conv2"], teacher(x, training=False)[1]["conv4"])

    Raises:
        ModelError: the model has no layer graph, or a name matches none of its layers.
    """
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise ModelError(
            f"{type(model).__name__} has no layer graph to take features from. Make it with the Functional or Sequential API, "
            "or let its call() return the features."
        )
    layers = {layer.name: layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)}
    chosen: dict[str, Any] = {}
    for name in names:
        found = [name] if name in layers else [layer for layer in layers if fnmatchcase(layer, name)]
        if not found:
            raise ModelError(f"{name!r} matches no layer of the model {model.name!r}. Its layers: {', '.join(layers)}.")
        chosen |= {each: _output(layers[each]) for each in found}
    if not chosen:
        raise ModelError("with_features needs the name of at least one layer.")
    # The structures that a Functional model was made with; a Sequential has one input and one output.
    inputs, outputs = (getattr(model, f"_{which}_struct", None) for which in ("inputs", "outputs"))
    try:
        return keras.Model(
            model.inputs[0] if inputs is None else inputs,
            (model.outputs[0] if outputs is None else outputs, chosen),
            name=model.name,
        )
    except ValueError as cause:
        raise ModelError(
            f"Of {', '.join(chosen)} not every output is made from the inputs of {model.name!r}: a layer that was first "
            "called in another model gives that one's. Choose other layers."
        ) from cause


def _output(layer: Any) -> Any:
    try:
        return layer.output
    except (AttributeError, ValueError) as cause:
        raise ModelError(f"The layer {layer.name!r} has no output: it was never called in this model.") from cause
