"""What a teacher adds to a training step of a Keras ResNet-20, in Whet's loop and in Keras' own `fit`; graph mode.

    python benchmarks/keras_distillation.py [--batches 8] [--epochs 3] [--record FILE.json]

ResNet-20 is taught by ResNet-20. Every row is the processor time of the fastest whole epoch but the first, which compiles, on
one thread, per batch. The bound is the student's step, the teacher's forward pass where it runs, and 10 % of both.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tables
from keras_litert import resnet20
from keras_quantization import one_thread

import whet
from whet.specs import DIST, DKD, Distill, Features, LogitsMSE, SoftTargets, Train

LOSSES = {
    "soft targets": SoftTargets(),
    "DKD": DKD(),
    "DIST": DIST(),
    "logits": LogitsMSE(),
    "features": Features("layer2-2-conv2", "layer2-2-conv2"),
}


class Timed:
    """Batches of 64 that note the processor time of every whole pass over them."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x, self.y, self.passes = x, y, list[float]()

    def __len__(self) -> int:
        return len(self.x) // 64

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        begun = time.process_time()
        for start in range(0, len(self.x), 64):
            yield self.x[start : start + 64], self.y[start : start + 64]
        self.passes.append(time.process_time() - begun)


class Stamp(keras.callbacks.Callback):  # type: ignore[misc]
    """The processor time of every epoch of `fit`."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begin to count."""
        self.begun = time.process_time()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Note what was counted."""
        self.epochs.append(time.process_time() - self.begun)


def by_whet(x: np.ndarray, y: np.ndarray, loss: Any, teacher: Any, epochs: int) -> float:
    """Seconds a batch of `whet.fit`."""
    data = Timed(x, y)
    spec = Train(epochs=epochs, apply=[] if loss is None else [Distill([loss])])
    whet.fit(resnet20({}), spec, train=data, teacher=teacher, progress=False)
    return min(data.passes[-epochs + 1 :]) / len(data)


def by_keras(x: np.ndarray, y: np.ndarray, loss: Any, teacher: Any, epochs: int) -> float:
    """Seconds a batch of Keras' `fit`, with `DistillationCallback`."""
    stamp, model = Stamp(), resnet20({})
    taught = [] if loss is None else [whet.keras.DistillationCallback(Distill([loss]), teacher)]
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), entropy, jit_compile=False)
    model.fit(x, y, batch_size=64, epochs=epochs, verbose=0, callbacks=[*taught, stamp])
    return min(stamp.epochs[1:]) * 64 / len(x)


def forward(teacher: Any, x: np.ndarray, epochs: int) -> float:
    """Seconds a batch of the teacher's forward pass."""
    found = []
    for _ in range(epochs):
        begun = time.process_time()
        for start in range(0, len(x), 64):
            whet.keras.predict(teacher, x[start : start + 64])
        found.append(time.process_time() - begun)
    return min(found[1:]) * 64 / len(x)


def main() -> int:
    """Print the table."""
    options = tables.parser(__doc__)
    options.add_argument("--batches", type=int, default=8)
    options.add_argument("--epochs", type=int, default=3)
    given = options.parse_args()
    one_thread()
    batches, epochs = (2, 2) if given.quick else (given.batches, given.epochs)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64 * batches, 32, 32, 3)).astype("float32"), rng.integers(0, 10, 64 * batches)
    head = f"Keras on {keras.backend.backend()}: a batch of 64, the fastest of {epochs - 1} epochs of {batches} batches"
    columns, command = ("", "CPU s", "bound, CPU s", "to reach"), "python benchmarks/keras_distillation.py"
    table = tables.Table("distill-overhead-keras", head, columns, command, record=given.record)
    teacher = resnet20({})
    passed = forward(teacher, x, epochs)
    table.add("teacher forward", f"{passed:.3f}", "", "")
    with TemporaryDirectory() as folder:
        store = whet.teacher_outputs(teacher, x, Path(folder) / "store", progress=False)
        for where, train in (("whet.fit", by_whet), ("fit", by_keras)):
            alone = train(x, y, None, None, epochs)
            table.add(f"{where}: student alone", f"{alone:.3f}", "", "")
            rows = [(f"{where}: {name}", loss, teacher) for name, loss in LOSSES.items()]
            for name, loss, source in [*rows, (f"{where}: soft targets, stored", SoftTargets(), store)]:
                bound = 1.1 * (alone + (passed if source is teacher else 0.0))
                seconds = train(x, y, loss, source, epochs)
                table.add(name, f"{seconds:.3f}", f"{bound:.3f}", tables.against(seconds, round(bound, 3), most=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
