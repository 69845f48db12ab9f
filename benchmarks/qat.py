"""Quantization-aware training of ResNet-20 on CIFAR-10 with 4-bit weights and activations, first and last layer 8 bit.

    python benchmarks/qat.py [--settings "teacher, 1e-3" …] [--epochs 3] [--quick] [--record out/quantization.json]

Top-1 of the exported file, run by ONNX Runtime, on the 10,000 test images: after post-training quantization alone, and after
training with 50,000 images, shifted by up to 4 pixels and flipped. Every setting named is run once and reported; no epoch is
chosen by test images. An epoch takes three to four minutes of one processor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tables
import torch
from cifar import images, resnet20

import whet
from whet.runtimes.sessions import open_session
from whet.specs import GPTQ, MSE, QAT, BiasCorrection, Distill, Int, PerTensor, Quantize, SoftTargets, Train

EDGES = {"conv1": Int(8), "linear": Int(8)}
BAR = 87.3
TUNED: dict[str, Any] = {"weight_observer": MSE(), "rounding": GPTQ(), "correct_bias": BiasCorrection()}


@dataclass(frozen=True)
class Setting:
    """How one run trains. start: what the post-training solution that it begins at has beyond nearest rounding."""

    rate: float = 1e-3
    teacher: bool = True
    batch: int = 128
    start: str = "nearest"

    def spec(self, epochs: int) -> Quantize:
        """As Whet's spec."""
        more = {"weight_observer": MSE()} if self.start == "nearest" else TUNED
        activations = Int(4, symmetric=False, granularity=PerTensor())
        qat = QAT(epochs=epochs, learning_rate=self.rate)
        return Quantize(Int(4), activations, observer=MSE(), qat=qat, overrides=EDGES, **more)

    def fit(self) -> Train:
        """Adam, cosine to zero; the original teaches at temperature 4, with a tenth of the weight left to the labels."""
        return Train(apply=(Distill([SoftTargets(4.0)]),)) if self.teacher else Train()


SETTINGS = {
    "teacher, 1e-3": Setting(),
    "teacher, 4e-4": Setting(rate=4e-4),
    "teacher, 2e-3": Setting(rate=2e-3),
    "teacher, 4e-4, from GPTQ": Setting(rate=4e-4, start="GPTQ"),
    "labels alone, 4e-4": Setting(rate=4e-4, teacher=False),
}


class Crops:
    """Batches of (images, labels), shifted by up to 4 pixels and flipped, anew in every epoch."""

    def __init__(self, x: np.ndarray, y: np.ndarray, batch: int) -> None:
        self.x, self.y, self.batch, self.rng = x, y, batch, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.x) // self.batch

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = self.rng.permutation(len(self.x))
        for start in range(0, len(self) * self.batch, self.batch):
            rows = order[start : start + self.batch]
            padded = np.pad(self.x[rows], ((0, 0), (0, 0), (4, 4), (4, 4)))
            made = np.empty_like(self.x[rows])
            for i, (dy, dx, flip) in enumerate(zip(*self.rng.integers(0, (9, 9, 2), (len(rows), 3)).T, strict=True)):
                cut = padded[i, :, dy : dy + 32, dx : dx + 32]
                made[i] = cut[:, :, ::-1] if flip else cut
            yield made, self.y[rows]


def new_table(epochs: int, trained_on: int, test: int, record: Path | None) -> tables.Table:
    """The table, empty."""
    return tables.Table(
        "qat",
        f"ResNet-20, W4A4, first and last layer 8 bit: {epochs} epochs of {trained_on:,} images, the ONNX file on {test:,} "
        f"test images; Adam, cosine to zero, {torch.get_num_threads()} thread(s)",
        ("", "post-training, % [95 %]", "trained, % [95 %]", "to reach", "loss of each epoch", "s", "CPU s"),
        "python benchmarks/qat.py",
        record=record,
    )


def run(given: argparse.Namespace) -> None:
    """Train every setting that was named."""
    (x, y), test = images("train", 2_000 if given.quick else 50_000), images("test", 500 if given.quick else 10_000)
    epochs = 1 if given.quick else given.epochs
    table = new_table(epochs, len(x), len(test[0]), given.record)
    for name in given.settings[:1] if given.quick else given.settings:
        setting = SETTINGS[name]
        spec, batches = setting.spec(epochs), [x[i : i + 128] for i in range(0, 1024, 128)]
        plain = whet.quantize(resnet20(), replace(spec, qat=None), calibration=batches, progress=False)
        before, _ = right(plain, test)
        clock = tables.Clock()
        train = Crops(x, y, setting.batch)
        made = whet.quantize(resnet20(), spec, calibration=batches, train=train, fit=setting.fit(), progress=False)
        seconds = clock.read()
        after, losses = right(made, test), [row["loss"] for row in (made.steps[-1].train or {})["history"]]
        bar = "" if given.quick else tables.against(100 * after[0] / after[1], BAR)
        cells = (tables.top1(before, after[1]), tables.top1(*after), bar, " ".join(f"{loss:.3f}" for loss in losses))
        table.add(name, *cells, *seconds)


def right(made: whet.Compressed, test: tuple[np.ndarray, np.ndarray]) -> tuple[int, int]:
    """How many test images the exported file gives their class, and how many there are."""
    x, y = test
    with TemporaryDirectory() as folder:
        session = open_session(made.export(Path(folder) / "model.onnx"), threads=torch.get_num_threads())
        found = np.concatenate([session.run(x[i : i + 250]) for i in range(0, len(x), 250)]).argmax(-1)
    return int(np.sum(found == y)), len(y)


def main() -> int:
    """Print the table."""
    options = tables.parser(__doc__)
    options.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    run(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
