"""Quantization-aware training of cifar10/resnet20 in PyTorch: what a step costs, and 4-bit weights and activations.

python benchmarks/qat.py steps               # QAT step / float step, at batch 128
python benchmarks/qat.py train --epochs 1    # W4A4, first and last layer 8 bit, on the exported file
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from cifar import images, resnet20
from torch.nn import functional as F

import whet
from whet.numerics.metrics import ACCURACY
from whet.specs import MSE, QAT, TARGETS, Int, Metric, PerTensor, Quantize, Target, Train


def activations(bits: int) -> Int:
    """Unsigned codes per tensor."""
    return Int(bits, symmetric=False, granularity=PerTensor())


def steps(rounds: int, batch: int, threads: int) -> None:
    """Medians of paired ratios: in every round each kind takes one step on the same batch."""
    torch.set_num_threads(threads)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    ort = TARGETS["onnxruntime"]
    bare = replace(ort, quantized=frozenset(), joined=frozenset())

    def prepared(qat: QAT, target: Target) -> Any:
        spec = Quantize(Int(8), activations(8), qat=qat)
        return whet.torch.prepare(resnet20(), spec, calibration=[x.numpy()], target=target, steps=10**6, progress=False)

    models = {
        "float, batch norm in training": resnet20(),
        "frozen ranges, convolutions and linears": prepared(QAT(learn_scale=False), bare),
        "and residual adds, running observers": prepared(QAT(learn_scale=False, observe=1.0), ort),
        "and learned scales instead of observers": prepared(QAT(), ort),
    }
    taken: dict[str, list[float]] = {name: [] for name in models}
    optimizers = {name: torch.optim.SGD(model.train().parameters(), 1e-4) for name, model in models.items()}
    for index in range(rounds + 2):
        for name, model in models.items():
            started = time.perf_counter()
            optimizers[name].zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizers[name].step()
            if index > 1:
                taken[name].append(time.perf_counter() - started)
    first = np.array(next(iter(taken.values())))
    for name, seconds in taken.items():
        values = np.array(seconds)
        ratio, least = np.median(values / first), values.min() / first.min()
        print(f"{name:45s} {1e3 * np.median(values):8.1f} ms  x {ratio:.2f} (fastest steps: x {least:.2f})", flush=True)


class Crops:
    """Batches of (images, labels), shifted by up to 4 pixels and flipped, anew in every epoch."""

    def __init__(self, x: np.ndarray, y: np.ndarray, batch: int) -> None:
        self.x, self.y, self.batch, self.rng = x, y, batch, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.x) // self.batch

    def __iter__(self) -> Any:
        order = self.rng.permutation(len(self.x))
        for start in range(0, len(self) * self.batch, self.batch):
            rows = order[start : start + self.batch]
            padded = np.pad(self.x[rows], ((0, 0), (0, 0), (4, 4), (4, 4)))
            made = np.empty_like(self.x[rows])
            for i, (dy, dx, flip) in enumerate(zip(*self.rng.integers(0, (9, 9, 2), (len(rows), 3)).T, strict=True)):
                cut = padded[i, :, dy : dy + 32, dx : dx + 32]
                made[i] = cut[:, :, ::-1] if flip else cut
            yield made, self.y[rows]


def train(bits: int, epochs: int, rate: float, examples: int, batch: int, threads: int) -> None:
    """Accuracy of the exported file after post-training quantization alone, and after QAT."""
    torch.set_num_threads(threads)
    x, y = images("train", 50_000)
    order = np.random.default_rng(0).permutation(len(x))[:examples]  # they are sorted by class
    x, y = x[order], y[order]
    test = images("test", 10_000)
    spec = Quantize(
        Int(bits),
        activations(bits),
        observer=MSE(),
        weight_observer=MSE(),
        qat=QAT(epochs=epochs, learning_rate=rate),
        overrides={"conv1": Int(8), "linear": Int(8)},
    )
    options: dict[str, Any] = {"calibration": [x[:512]], "seed": 0}
    tested = [(test[0][i : i + 500], test[1][i : i + 500]) for i in range(0, len(test[0]), 500)]
    with TemporaryDirectory() as folder:
        for name, own, more in (
            ("post-training", replace(spec, qat=None), {}),
            (f"{epochs} epochs of QAT", spec, {"train": Crops(x, y, batch), "fit": Train()}),
        ):
            started = time.perf_counter()
            made = whet.quantize(resnet20(), own, **options, **more, progress=False)
            seconds = time.perf_counter() - started
            file = made.export(Path(folder) / "model.onnx", overwrite=True)
            found = whet.measure(file, tested, metric=Metric(ACCURACY.fn, name="accuracy"), progress=False)
            print(f"W{bits}A{bits} {name}: {found} after {seconds:.0f} s", flush=True)
            for row in (made.steps[-1].train or {}).get("history", ()):
                print("   ", row, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "train"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--examples", type=int, default=50_000)
    given = parser.parse_args()
    if given.what == "steps":
        steps(given.rounds, given.batch, given.threads)
    else:
        train(given.bits, given.epochs, given.rate, given.examples, given.batch, given.threads)
