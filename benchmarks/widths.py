"""What ONNX Runtime's time follows in CIFAR-10's ResNets: shortcuts of option A in two forms, and a block's inner width.

    OMP_NUM_THREADS=1 python benchmarks/widths.py [shortcuts] [widths] [--quick] [--record out/it.json]

Medians of processor time on one thread, files in alternation. Data: see benchmarks/cifar.py; a block's weights are random.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cifar
import numpy as np
import onnxruntime
import torch
from tables import Table, chosen, parser
from torch import nn

import whet
from whet.specs import find_target
from whet.torch import onnx_pads

COMMAND = "OMP_NUM_THREADS=1 python benchmarks/widths.py"
BLOCKS = 3
STAGES = {16: (32, (4, 8, 12, 16)), 32: (16, (8, 12, 16, 24, 32)), 64: (8, (8, 16, 24, 32, 48, 56, 64))}


class Inner(nn.Module):
    """A basic block of `channels` whose two convolutions meet in `width` channels."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, width, 3, 1, 1), nn.Conv2d(width, channels, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


def session(model: Any, side: int) -> Any:
    """The model's float file, opened on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        example = np.zeros((2, 3, side, side), np.float32)
        whet.torch.export(model.eval(), None, find_target("onnxruntime", "torch"), path, example=example)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def medians(sessions: list[Any], batch: int, side: int, rounds: int) -> list[float]:
    """Milliseconds of processor time of one call, each file in its turn; every second call counts."""
    x = np.random.default_rng(0).normal(size=(batch, 3, side, side)).astype(np.float32)
    found: list[list[float]] = [[] for _ in sessions]
    for _ in range(rounds):
        for index, one in enumerate(sessions):
            one.run(None, {one.get_inputs()[0].name: x})
            started = time.process_time()
            one.run(None, {one.get_inputs()[0].name: x})
            found[index].append(time.process_time() - started)
    return [1e3 * float(np.median(row)) for row in found]


def shortcuts(rounds: int, record: Path | None) -> None:
    """ResNets whose shortcuts are slices and pads, or convolutions."""
    columns = ("model", "batch", "slices and pads, ms", "convolutions, ms", "less")
    table = Table("shortcuts", "Shortcuts of option A in two forms", columns, f"{COMMAND} shortcuts", record=record)
    for name in ("resnet20", "resnet56"):
        model, largest = getattr(cifar, name)(), onnx_pads._LARGEST
        onnx_pads._LARGEST = 0  # no shortcut is small enough to become a convolution
        padded = session(model, 32)
        onnx_pads._LARGEST = largest
        for batch in (1, 8):
            old, new = medians([padded, session(model, 32)], batch, 32, rounds)
            table.add(name, batch, f"{old:.3f}", f"{new:.3f}", f"{1 - new / old:.1%}")


def widths(rounds: int, record: Path | None) -> None:
    """Blocks of every inner width, beside the full one."""
    columns = ("channels", "the full block, ms", "inner width: share of its time (share of its MACs)")
    table = Table("widths", "A block's time against its inner width, batch 8", columns, f"{COMMAND} widths", record=record)
    for channels, (side, inner) in STAGES.items():
        stem = nn.Sequential(nn.Conv2d(3, channels, 3, 1, 1), nn.ReLU())
        models = [nn.Sequential(*stem, *(Inner(channels, width) for _ in range(BLOCKS))) for width in inner]
        alone, *others = medians([session(m, side) for m in (stem, *models)], 8, side, rounds)
        times = [(ms - alone) / BLOCKS for ms in others]
        shares = (f"{w}: {ms / times[-1]:.2f} ({w / channels:.2f})" for w, ms in zip(inner, times, strict=True))
        table.add(f"{channels} at {side} × {side}", f"{times[-1]:.3f}", ", ".join(shares))


SECTIONS = {"shortcuts": shortcuts, "widths": widths}


def main() -> None:
    """Run the sections that are named, or both."""
    options = parser(__doc__ or "")
    options.add_argument("sections", nargs="*")
    given = options.parse_args()
    torch.manual_seed(0)
    for name in chosen(given.sections, SECTIONS, "section"):
        SECTIONS[name](3 if given.quick else 40, given.record)


if __name__ == "__main__":
    main()
