"""What layers inside a Keras model compute while it runs: their `call` is wrapped for one pass, and is their own again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras

from whet.data import primary
from whet.keras.losses import wide
from whet.keras.views import walk
from whet.numerics.losses_attention import Attention
from whet.numerics.losses_layers import Heard, attention_in

OUTPUTS, HEARD = "outputs", "heard"


class Hearing(keras.Model):  # type: ignore[misc]
    """A model that runs another and returns `{"outputs": its outputs, "heard": {name: what its layers computed}}`.

    `training`: the mode that it always runs in; None for the mode of the call.
    """

    def __init__(
        self, model: Any, features: Sequence[str] = (), attention: Sequence[str] = (), training: bool | None = None
    ) -> None:
        super().__init__(autocast=False, name="hearing")
        self.inner = model
        self._names, self._mode = (tuple(features), tuple(attention)), training
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The inner model's outputs and what was heard."""
        with listening(self.inner, *self._names) as heard:
            outputs = self.inner(inputs, training=training if self._mode is None else self._mode)
        return {OUTPUTS: outputs, HEARD: dict(heard)}


@contextmanager
def listening(model: Any, features: Sequence[str], attention: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What the layers named `features` return, channels last, and what those named `attention` look at, in the block."""
    layers = dict(walk(model))
    heard: dict[str, Any] = {}
    changed: list[tuple[Any, str, Any]] = []
    try:
        for name in features:
            _wrap(layers[name], "call", _features(layers[name], name, heard), changed)
        for name in attention:
            if hasattr(layers[name], "_compute_attention"):  # which Keras' own documents invite to be overridden
                _wrap(layers[name], "_compute_attention", _attention(layers[name], name, heard), changed)
        yield heard
    finally:
        for layer, method, before in reversed(changed):
            object.__delattr__(layer, method)
            if before is not None:
                object.__setattr__(layer, method, before)


def _wrap(layer: Any, method: str, wrapped: Any, changed: list[tuple[Any, str, Any]]) -> None:
    """Put `wrapped` in the place of a method of this one layer. Keras would track what is set in the usual way."""
    changed.append((layer, method, vars(layer).get(method)))
    object.__setattr__(layer, method, wrapped)


def _features(layer: Any, name: str, heard: dict[str, Any]) -> Any:
    call = layer.call
    is_first = getattr(layer, "data_format", None) == "channels_first"

    def hear(*args: Any, **kwargs: Any) -> Any:
        outputs = call(*args, **kwargs)
        found = primary(outputs)
        if len(getattr(found, "shape", ())) >= 2 and "float" in keras.backend.standardize_dtype(found.dtype):
            heard[name] = wide(keras.ops.moveaxis(found, 1, -1) if is_first and len(found.shape) > 2 else found)
        else:
            heard.pop(name, None)
        return outputs

    return hear


def _attention(layer: Any, name: str, heard: dict[str, Any]) -> Any:
    """Queries, keys and values come as (n, l, h, d), masks as booleans (n, l, l) or with an axis of heads."""
    compute = layer._compute_attention

    def hear(query: Any, key: Any, value: Any, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        found = {part: wide(keras.ops.moveaxis(x, 2, 1)) for part, x in (("query", query), ("key", key), ("value", value))}
        mask = attention_mask
        if mask is None and kwargs.get("use_causal_mask"):
            places = (keras.ops.arange(query.shape[1])[:, None], keras.ops.arange(key.shape[1])[None, :])
            mask = (places[0] >= places[1])[None]
        if mask is not None:
            mask = keras.ops.cast(mask, "bool")
            found["allowed"] = keras.ops.expand_dims(mask, 1) if len(mask.shape) == 3 else mask
        heard[attention_in(name)] = found
        return compute(query, key, value, attention_mask, *args, **kwargs)

    return hear


def both_heard(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Heard:
    """What was heard of both sides, as the losses on layers take it."""
    found: dict[tuple[int, str], Any] = {}
    for side, heard in enumerate((student, teacher)):
        for name, item in heard.items():
            found[side, name] = Attention(**item) if isinstance(item, Mapping) else item
    return found
