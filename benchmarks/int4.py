"""int4 linear weights on ONNX Runtime: latency, bytes and agreement at batches 1, 8 and 64, beside the float file.

    python benchmarks/int4.py [--size 1024] [--group 32] [--quick] [--record out/quantization.json]

ONNX Runtime runs the file's DequantizeLinear and MatMul as MatMulNBits, with activations rounded to 8 bits inside.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tables
import torch

import whet
import whet.torch
from whet import Dynamic, Int, PerGroup, Quantize
from whet.runtimes.content import read_dtypes
from whet.runtimes.latency import alternate
from whet.runtimes.sessions import open_session
from whet.specs import find_target

BATCHES = (1, 8, 64)


def main() -> int:
    """Print the table."""
    options = tables.parser(__doc__)
    options.add_argument("--size", type=int, default=1024, help="input and output features")
    options.add_argument("--group", type=int, default=32, help="input features that share a scale")
    given = options.parse_args()
    size = 128 if given.quick else given.size
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(size, size)).eval()
    rng = np.random.default_rng(0)
    inputs = {rows: rng.standard_normal((rows, size)).astype(np.float32) for rows in BATCHES}
    with tempfile.TemporaryDirectory() as folder:
        files, simulated = written(model, inputs[8], given.group, Path(folder))
        sessions = {name: open_session(path, threads=1) for name, path in files.items()}
        medians = {}
        for rows in BATCHES:
            for name, timings in zip(sessions, alternate(list(sessions.values()), inputs[rows]), strict=True):
                medians[name, rows] = timings.latency(batch=rows, threads=1).p50
        table = tables.Table(
            "int4",
            f"A linear layer of {size} x {size} in ONNX Runtime, one thread: median ms of alternating runs; dB: file against "
            "simulation",
            ("", *(f"batch {rows}, ms" for rows in BATCHES), "bytes", "dB", "computes"),
            "python benchmarks/int4.py",
            record=given.record,
        )
        for name, path in files.items():
            cells = [f"{medians[name, rows]:.4f}" for rows in BATCHES]
            kinds = ", ".join(f"{op} {'/'.join(types)}" for op, types in read_dtypes(path)["computed"].items())
            agreement = "" if name not in simulated else f"{_sqnr(simulated[name], sessions[name].run(inputs[8])):.1f}"
            table.add(name, *cells, f"{path.stat().st_size:,}", agreement, kinds)
    return 0


def written(model: Any, example: np.ndarray, group: int, folder: Path) -> tuple[dict[str, Path], dict[str, np.ndarray]]:
    """The files of every scheme, the float one first, and what the simulation of each says of `example`."""
    specs = {
        "int8 per channel": Quantize(Int(8), None),
        f"int4 groups of {group}": Quantize(Int(4, granularity=PerGroup(group)), None),
        "int4 per channel": Quantize(Int(4), None),
        "int8, dynamic activations": Quantize(Int(8), Dynamic()),
    }
    files, simulated = {"float32": folder / "float.onnx"}, {}
    whet.torch.export(model, None, find_target("onnxruntime", "torch"), files["float32"], example=example)
    for number, (name, spec) in enumerate(specs.items()):
        result = whet.quantize(model, spec, example=example, target="onnxruntime", progress=False)
        files[name] = result.export(folder / f"{number}.onnx")
        simulated[name] = result.side.predict(result.model, example)
    return files, simulated


def _sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise in dB."""
    return float(10 * np.log10(np.sum(expected**2) / np.sum((expected - found) ** 2)))


if __name__ == "__main__":
    sys.exit(main())
