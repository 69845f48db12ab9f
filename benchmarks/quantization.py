"""Quantization measured: accuracy, seconds and bytes of exported files, peers beside where they can run.

    python benchmarks/quantization.py [--sections accuracy …] [--images 10000]

accuracy: ResNet-20 on CIFAR-10 after calibration with 1,024 training images without labels, first and last layer in 8 bits,
activations in 8; top-1 of the exported ONNX file, run by ONNX Runtime, on the test images. Codes of 2, 3 and 4 bits of
convolutions are stored in int8, which is what its kernels read: the file is no smaller for them. Seconds are of the wall and
of the processor, for quantizing alone. Peers: ONNX Runtime's quantize_static and NNCF, in 8 bits, which is all they offer here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar import images, resnet20

import whet
from whet.specs import GPTQ, MSE, TARGETS, AdaRound, BiasCorrection, Int, Quantize
from whet.torch import export

CALIBRATION, BATCH = 1024, 128
EDGES = {"conv1": Int(8), "linear": Int(8)}
BARS = {8: 0.880, 4: 0.876, 3: 0.860, 2: 0.75}
MOST_SECONDS = 120

RECIPES: dict[str, Callable[[int], Quantize]] = {
    "nearest": lambda bits: Quantize(Int(bits), overrides=EDGES),
    "biases corrected": lambda bits: Quantize(Int(bits), correct_bias=BiasCorrection(), overrides=EDGES),
    "GPTQ, scales of least output error, biases": lambda bits: Quantize(
        Int(bits), rounding=GPTQ(), weight_observer=MSE(), correct_bias=BiasCorrection(), overrides=EDGES
    ),
    "AdaRound, the same": lambda bits: Quantize(
        Int(bits), rounding=AdaRound(), weight_observer=MSE(), correct_bias=BiasCorrection(), overrides=EDGES
    ),
}
ROWS = [
    (8, "nearest"),
    (8, "biases corrected"),
    (8, "GPTQ, scales of least output error, biases"),
    (4, "nearest"),
    (4, "biases corrected"),
    (4, "GPTQ, scales of least output error, biases"),
    (4, "AdaRound, the same"),
    (3, "nearest"),
    (3, "GPTQ, scales of least output error, biases"),
    (2, "nearest"),
    (2, "GPTQ, scales of least output error, biases"),
]


def accuracy(given: argparse.Namespace) -> None:
    """The table of post-training quantization."""
    x, y = images("test", given.images)
    calibration, _ = images("train", CALIBRATION)
    batches = [calibration[i : i + BATCH] for i in range(0, CALIBRATION, BATCH)]
    model = resnet20()
    print(f"ResNet-20, {len(x):,} test images, {CALIBRATION:,} calibration images, {torch.get_num_threads()} threads\n")
    print(f"{'':46} {'top-1':>7} {'seconds':>8} {'cpu':>6} {'bytes':>10}")
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float.onnx"
        export(model, None, TARGETS["onnxruntime"], plain, example=batches[0])
        _row("float", run_onnx(plain, x, y), 0, 0, plain)
        for bits, name in ROWS:
            if given.bits is None or bits in given.bits:
                _accuracy_row(model, bits, name, batches, x, y, Path(folder) / f"{bits}{name[:4]}.onnx")
        for name, peer in (("quantize_static", _static), ("NNCF", _nncf)) if given.bits is None else ():
            path = Path(folder) / f"{name}.onnx"
            start, spent = time.perf_counter(), time.process_time()
            with _quietly():
                peer(plain, batches, path)
            seconds = time.perf_counter() - start, time.process_time() - spent
            _row(f"W8A8 {name}", run_onnx(path, x, y), *seconds, path)


def _accuracy_row(
    model: Any, bits: int, name: str, batches: list[np.ndarray], x: np.ndarray, y: np.ndarray, path: Path
) -> None:
    start, spent = time.perf_counter(), time.process_time()
    made = whet.quantize(model, RECIPES[name](bits), calibration=batches, target="onnxruntime", progress=False)
    seconds, cpu = time.perf_counter() - start, time.process_time() - spent
    made.export(path)
    top1 = run_onnx(path, x, y)
    bar = ""
    if name.startswith("GPTQ"):
        bar = f"  {'reached' if top1 >= BARS[bits] else 'MISSED'}: {BARS[bits]:.1%}"
        bar += "" if seconds < MOST_SECONDS else f"  SLOWER than {MOST_SECONDS} s"
    _row(f"W{bits}A8 {name}", top1, seconds, cpu, path, bar)


def _row(name: str, top1: float, seconds: float, cpu: float, path: Path, note: str = "") -> None:
    print(f"{name:46} {top1:7.2%} {seconds:8.1f} {cpu:6.1f} {path.stat().st_size:10,}{note}", flush=True)


def run_onnx(path: Path, x: np.ndarray, y: np.ndarray) -> float:
    """Top-1 of an ONNX file, run by ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    found = [session.run(None, {name: x[i : i + BATCH]})[0].argmax(1) for i in range(0, len(x), BATCH)]
    return float(np.mean(np.concatenate(found) == y))


def _static(model: Path, batches: list[np.ndarray], path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.items = iter([{"x": batch} for batch in batches])

        def get_next(self) -> Any:
            return next(self.items, None)

    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(str(model), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **types)


def _nncf(model: Path, batches: list[np.ndarray], path: Path) -> None:
    import nncf
    import onnx

    data = nncf.Dataset([{"x": batch} for batch in batches])
    onnx.save(nncf.quantize(onnx.load(model), data, subset_size=len(batches)), path)


@contextlib.contextmanager
def _quietly() -> Any:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {"accuracy": accuracy}


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    options.add_argument("--images", type=int, default=10_000)
    options.add_argument("--bits", nargs="+", type=int, choices=list(BARS), help="only these rows of the accuracy table")
    given = options.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    for name in given.sections:
        print(f"--- {name}")
        SECTIONS[name](given)


if __name__ == "__main__":
    main()
