"""Post-training quantization of a Keras 3 ResNet-20 (channels last) on CIFAR-10, on exported files, PyTorch's beside.

    python benchmarks/keras_quantization.py [--quick] [--bits 4 3] [--blocks] [--record out/quantization.json]

The weights, the images, their order and the specs are those of benchmarks/uniform.py: 1,024 training images without labels,
first and last layer in 8 bits, activations in 8; top-1 of the LiteRT and the ONNX file, each run by its runtime, on the 10,000
test images, beside the simulation's, and of PyTorch's ONNX file. Codes of 4, 3 and 2 bits are stored in whole bytes, which is
what integer kernels read. Seconds are of quantizing alone, of the wall and of the processor. KERAS_BACKEND=torch works too.
blocks: the rounding of whole blocks learned, at 3 and 2 bits.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cifar
import keras
import numpy as np
import tables
import torch
from keras_litert import resnet20, run
from safetensors.numpy import load_file
from uniform import ADAROUND, BARS, BATCH, BLOCKS, CALIBRATION, GPTQ_, MOST_SECONDS, NEAREST, RECIPES

import whet
from whet.runtimes.sessions import open_session, parts
from whet.specs import TARGETS

ROWS = [(8, NEAREST), (8, GPTQ_), (4, NEAREST), (4, GPTQ_), (4, ADAROUND), (3, NEAREST), (3, GPTQ_), (2, NEAREST), (2, GPTQ_)]
QUICK = [(8, NEAREST), (4, GPTQ_)]
NEAR = 0.2  # points that the frameworks may be apart


class Bench:
    """The models, the images, and the table that grows."""

    def __init__(self, folder: Path, quick: bool, record: Path | None) -> None:
        self.folder, self.quick = folder, quick
        self.models = {"Keras": resnet20(load_file(cifar.folder() / "resnet20.safetensors")), "PyTorch": cifar.resnet20()}
        x, self.y = cifar.images("test", 500 if quick else 10_000)
        calibration, _ = cifar.images("train", 256 if quick else CALIBRATION)
        self.images = {"Keras": np.ascontiguousarray(x.transpose(0, 2, 3, 1)), "PyTorch": x}
        last = {"Keras": np.ascontiguousarray(calibration.transpose(0, 2, 3, 1)), "PyTorch": calibration}
        self.batches = {name: [a[i : i + BATCH] for i in range(0, len(a), BATCH)] for name, a in last.items()}
        self.table = tables.Table(
            "keras",
            f"ResNet-20 in Keras on {keras.backend.backend()}, {len(x):,} test images, {len(calibration):,} calibration images "
            "without labels, one thread",
            ("", "made in", "run by", "top-1, % [95 %]", "simulation", "to reach", "s", "CPU s", "bytes"),
            "python benchmarks/keras_quantization.py",
            record=record,
        )

    def row(self, bits: int, name: str) -> None:
        """One scheme, in both frameworks."""
        found = [
            self._one(bits, name, *where)
            for where in (("Keras", "litert"), ("Keras", "onnxruntime"), ("PyTorch", "onnxruntime"))
        ]
        apart = max(abs(value - found[-1]) for value in found[:-1])
        if apart > NEAR and not self.quick:
            self.table.note(f"W{bits}A8 {name}: {apart:.2f} points from PyTorch.")

    def _one(self, bits: int, name: str, framework: str, target: str) -> float:
        clock = tables.Clock()
        options: dict[str, Any] = {"calibration": self.batches[framework], "target": target, "progress": False}
        made = whet.quantize(self.models[framework], RECIPES[name](bits), **options)
        seconds = clock.read()
        path = made.export(self.folder / f"made{TARGETS[target].suffix}", overwrite=True)
        x = self.images[framework]
        right = int(np.sum(run(open_session(path, threads=1).run, x).argmax(-1) == self.y))
        simulated = ""
        if framework == "Keras":
            classes = run(lambda part: whet.keras.predict(made.model, part), x).argmax(-1)
            simulated = f"{100 * np.mean(classes == self.y):.2f}"
        value = 100 * right / len(x)
        judged = not self.quick and (name == GPTQ_ or (bits, name) == (8, NEAREST))
        bar = tables.against(value, BARS[bits]) if judged else ""
        size = f"{sum(item.stat().st_size for item in parts(path)):,}"
        shown = (tables.top1(right, len(x)), simulated, bar, *seconds, size)
        self.table.add(f"W{bits}A8 {name}", framework, target, *shown)
        if float(seconds[1]) > MOST_SECONDS:
            self.table.note(f"W{bits}A8 {name} in {framework} took more than {MOST_SECONDS} s of the processor.")
        return value


def main() -> int:
    """Print the table."""
    options = tables.parser(__doc__)
    options.add_argument("--bits", nargs="+", type=int, choices=list(BARS), help="only these rows")
    options.add_argument("--blocks", action="store_true", help="block-wise reconstruction at 3 and 2 bits, and nothing else")
    given: argparse.Namespace = options.parse_args()
    one_thread()
    rows = [(3, BLOCKS), (2, BLOCKS)] if given.blocks else QUICK if given.quick else ROWS
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), given.quick, given.record)
        for bits, name in rows:
            if given.bits is None or bits in given.bits:
                bench.row(bits, name)
    return 0


def one_thread() -> None:
    """Frameworks compute on one thread, so that processor seconds compare."""
    torch.set_num_threads(1)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)


if __name__ == "__main__":
    sys.exit(main())
