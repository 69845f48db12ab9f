"""Post-training quantization of ResNet-20 on CIFAR-10: 8, 4, 3 and 2 bits, on exported files, peers beside.

    python benchmarks/uniform.py [--quick] [--bits 4 3] [--record out/quantization.json]

1,024 training images without labels calibrate; first and last layer in 8 bits, activations in 8; top-1 of the exported file,
run by its runtime, on the 10,000 test images. Codes of 2, 3 and 4 bits of convolutions are stored in int8, which integer
kernels read: the file is no smaller for them. Seconds are of quantizing alone, of the wall and of the processor.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tables
import torch
from cifar import images, resnet20
from peers import PEERS

import whet
from whet.runtimes.sessions import open_session, parts
from whet.specs import GPTQ, MSE, TARGETS, AdaRound, BiasCorrection, Int, Quantize
from whet.torch import export
from whet.torch.program import quietly

CALIBRATION, BATCH = 1024, 128
EDGES = {"conv1": Int(8), "linear": Int(8)}
BARS = {8: 88.0, 4: 87.6, 3: 86.0, 2: 75.0}
MOST_SECONDS = 120
TUNED: dict[str, Any] = {"weight_observer": MSE(), "correct_bias": BiasCorrection(), "overrides": EDGES}
NEAREST, BIASES, GPTQ_, ADAROUND, BLOCKS = "nearest", "nearest, biases", "GPTQ", "AdaRound", "AdaRound, blocks"

RECIPES: dict[str, Callable[[int], Quantize]] = {
    NEAREST: lambda bits: Quantize(Int(bits), overrides=EDGES),
    BIASES: lambda bits: Quantize(Int(bits), correct_bias=BiasCorrection(), overrides=EDGES),
    GPTQ_: lambda bits: Quantize(Int(bits), rounding=GPTQ(), **TUNED),
    ADAROUND: lambda bits: Quantize(Int(bits), rounding=AdaRound(), **TUNED),
    BLOCKS: lambda bits: Quantize(Int(bits), rounding=AdaRound(blocks=True), **TUNED),
}
ROWS = [
    *((8, NEAREST, target) for target in ("onnxruntime", "openvino", "executorch")),
    (8, BIASES, "onnxruntime"),
    (8, GPTQ_, "onnxruntime"),
    *((bits, name, "onnxruntime") for bits in (4, 3, 2) for name in (NEAREST, GPTQ_)),
    *((bits, ADAROUND, "onnxruntime") for bits in (4, 3, 2)),
    *((bits, BLOCKS, "onnxruntime") for bits in (3, 2)),
]
QUICK = [(8, NEAREST, "onnxruntime"), (4, GPTQ_, "onnxruntime")]


class Bench:
    """The model, its images, and the table that grows."""

    def __init__(self, folder: Path, quick: bool, record: Path | None) -> None:
        self.folder, self.model = folder, resnet20()
        self.x, self.y = images("test", 500 if quick else 10_000)
        calibration, _ = images("train", 256 if quick else CALIBRATION)
        self.batches = [calibration[i : i + BATCH] for i in range(0, len(calibration), BATCH)]
        self.table = tables.Table(
            "uniform",
            f"ResNet-20 on CIFAR-10, {len(self.x):,} test images, {len(calibration):,} calibration images without labels, "
            f"{torch.get_num_threads()} thread(s)",
            ("", "run by", "top-1, % [95 %]", "to reach", "s", "CPU s", "bytes"),
            "python benchmarks/uniform.py",
            record=record,
        )
        self.plain = folder / "float.onnx"
        export(self.model, None, TARGETS["onnxruntime"], self.plain, example=self.batches[0])

    def row(self, label: str, target: str, path: Path, seconds: tuple[str, str], bar: str = "") -> float:
        """Run the file, add its row; top-1 in per cent."""
        session = open_session(path, threads=torch.get_num_threads())
        found = np.concatenate([session.run(self.x[i : i + 250]) for i in range(0, len(self.x), 250)]).argmax(-1)
        right = int(np.sum(found == self.y))
        value = 100 * right / len(self.y)
        size = sum(item.stat().st_size for item in parts(path))
        self.table.add(
            label, target, tables.top1(right, len(self.y)), bar and tables.against(value, float(bar)), *seconds, f"{size:,}"
        )
        return value

    def ours(self, bits: int, name: str, target: str) -> None:
        """A row of Whet's."""
        clock = tables.Clock()
        spec = RECIPES[name](bits)
        made = whet.quantize(self.model, spec, calibration=self.batches, target=target, progress=False)
        seconds = clock.read()
        path = made.export(self.folder / f"ours{TARGETS[target].suffix}", overwrite=True)
        wanted = name == GPTQ_ or (bits == 8 and name == NEAREST)
        self.row(f"W{bits}A8 {name}", target, path, seconds, str(BARS[bits]) if wanted and len(self.y) == 10_000 else "")
        if name == GPTQ_ and float(seconds[1]) > MOST_SECONDS:
            self.table.note(f"W{bits}A8 {name} took more than {MOST_SECONDS} s.")

    def peer(self, name: str, target: str, work: Any) -> None:
        """A row of a peer's."""
        clock, path = tables.Clock(), self.folder / f"peer{TARGETS[target].suffix}"
        with quietly():
            work(self.plain, self.batches, path)
        self.row(f"W8A8 {name}", target, path, clock.read())


def main() -> int:
    """Print the table."""
    options = tables.parser(__doc__)
    options.add_argument("--bits", nargs="+", type=int, choices=list(BARS), help="only these rows; peers with 8")
    given: argparse.Namespace = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), given.quick, given.record)
        bench.row("float", "onnxruntime", bench.plain, ("", ""))
        for bits, name, target in QUICK if given.quick else ROWS:
            if given.bits is None or bits in given.bits:
                bench.ours(bits, name, target)
        for name, (target, work) in PEERS.items() if given.bits is None or 8 in given.bits else ():
            if not (given.quick and target == "executorch"):
                bench.peer(name, target, work)
        bench.table.note("Seconds of ExecuTorch's peer include its lowering, those of the others the writing of the file.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
