"""Every family of keras.applications, with random weights, loses 30 % of its channels: how exactly, or why it does not.

python benchmarks/zoo_keras.py               # all, about two minutes of processor time
python benchmarks/zoo_keras.py MobileNet VGG16
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import whet
from whet.errors import WhetError
from whet.specs import Channel, Prune


@dataclass(frozen=True)
class Row:
    """What became of one model. error: the oracle's largest difference over the largest output; said: the refusal."""

    family: str
    parameters: int
    left: int
    macs: int
    macs_left: int
    error: float
    seconds: float
    stays: tuple[str, ...]
    said: str = ""


def models() -> dict[str, Callable[[], Any]]:
    """One model of every family that keras.applications builds, by name; small images, 10 classes."""
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from keras import applications

    sizes = {"Xception": 71, "InceptionV3": 75, "InceptionResNetV2": 75}
    narrow = {"MobileNet": {"alpha": 0.25}, "MobileNetV2": {"alpha": 0.35}, "MobileNetV3Small": {"alpha": 0.75}}
    names = (
        "VGG16 ResNet50 ResNet50V2 InceptionV3 InceptionResNetV2 Xception DenseNet121 MobileNet MobileNetV2 MobileNetV3Small "
        "NASNetMobile EfficientNetB0 EfficientNetV2B0 ConvNeXtTiny"
    ).split()

    def make(name: str) -> Callable[[], Any]:
        side = sizes.get(name, 32)
        options = {"weights": None, "input_shape": (side, side, 3), "classes": 10, **narrow.get(name, {})}
        return lambda: getattr(applications, name)(**options)

    return {name: make(name) for name in names}


def spread(model: Any) -> Any:
    """*In place*: statistics, scales and offsets of norms that differ from channel to channel, so that a mix-up shows."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if len(variable.shape) == 1:
            low, high = (-0.1, 0.1) if variable.name in ("beta", "bias", "moving_mean") else (0.8, 1.25)
            variable.assign(rng.uniform(low, high, variable.shape).astype(np.float32))
    return model


def keras_rows(names: tuple[str, ...] = (), sparsity: float = 0.3) -> Iterator[Row]:
    """A row for each of the models (all, if none is named), as soon as it is known."""
    for name, make in models().items():
        if not names or name in names:
            yield _row(name, make, sparsity)


def _row(name: str, make: Callable[[], Any], sparsity: float) -> Row:
    import keras

    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    model = spread(make())
    x = np.random.default_rng(1).normal(size=(4, *model.input_shape[1:])).astype(np.float32)
    before = whet.inspect(model, x)
    started = time.process_time()
    try:
        made = whet.prune(model, Prune(sparsity, granularity=Channel(), round_to=1), example=x, progress=False)
    except WhetError as refusal:
        seconds = time.process_time() - started
        return Row(name, before.parameters, before.parameters, before.macs, before.macs, np.nan, seconds, (), str(refusal))
    seconds, after = time.process_time() - started, whet.inspect(made.model, x)
    stays = tuple(f"{row['name']}: {row['reason']}" for row in made.steps[-1].skipped)
    error = float(made.steps[-1].removal["oracle"])
    return Row(name, before.parameters, after.parameters, before.macs, after.macs, error, seconds, stays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--sparsity", type=float, default=0.3)
    args = parser.parse_args()
    for row in keras_rows(tuple(args.names), args.sparsity):
        print(f"{row.family}: {row.parameters:,} → {row.left:,} parameters, {row.macs:,} → {row.macs_left:,} MACs,", end=" ")
        print(f"{row.seconds:.1f} s of processor time; {row.said or f'off by {row.error:.1e}'}", flush=True)
        for line in row.stays:
            print(f"    stays: {line}")


if __name__ == "__main__":
    main()
