"""One model of every family that keras.applications builds, with random weights, and inputs for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np


def models() -> dict[str, Callable[[], tuple[Any, Any]]]:
    """(Model, inputs) by name; small images, 10 classes."""
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras

    sizes = {"Xception": 71, "InceptionV3": 75, "InceptionResNetV2": 75}
    narrow = {"MobileNet": {"alpha": 0.25}, "MobileNetV2": {"alpha": 0.35}, "MobileNetV3Small": {"alpha": 0.75}}
    names = (
        "VGG16 ResNet50 ResNet50V2 InceptionV3 InceptionResNetV2 Xception DenseNet121 MobileNet MobileNetV2 MobileNetV3Small "
        "NASNetMobile EfficientNetB0 EfficientNetV2B0 ConvNeXtTiny"
    ).split()

    def build(name: str) -> tuple[Any, Any]:
        keras.backend.clear_session()
        keras.utils.set_random_seed(0)
        shape = (sizes.get(name, 32), sizes.get(name, 32), 3)
        made = getattr(keras.applications, name)(weights=None, input_shape=shape, classes=10, **narrow.get(name, {}))
        return spread(made), np.random.default_rng(1).normal(size=(4, *shape)).astype(np.float32)

    return {name: lambda name=name: build(name) for name in names}


def spread(model: Any) -> Any:
    """*In place*: statistics, scales and offsets of norms that differ from channel to channel, so that a mix-up shows."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if len(variable.shape) == 1:
            low, high = (-0.1, 0.1) if variable.name in ("beta", "bias", "moving_mean") else (0.8, 1.25)
            variable.assign(rng.uniform(low, high, variable.shape).astype(np.float32))
    return model
