"""int4 linear weights on ONNX Runtime: latency, bytes and agreement at batches 1, 8 and 64, beside the float file.

    python benchmarks/int4.py [--size 1024] [--group 32]

ONNX Runtime runs the file's DequantizeLinear and MatMul as MatMulNBits, with activations rounded to 8 bits inside.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

import whet
import whet.torch
from whet import Dynamic, Int, PerGroup, Quantize
from whet.runtimes.content import read_dtypes
from whet.runtimes.latency import alternate
from whet.runtimes.sessions import open_session
from whet.specs import find_target

BATCHES = (1, 8, 64)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="input and output features")
    parser.add_argument("--group", type=int, default=32, help="input features that share a scale")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(given.size, given.size)).eval()
    rng = np.random.default_rng(0)
    inputs = {rows: rng.standard_normal((rows, given.size)).astype(np.float32) for rows in BATCHES}
    specs = {
        "int8 per channel": Quantize(Int(8), None),
        f"int4 groups of {given.group}": Quantize(Int(4, granularity=PerGroup(given.group)), None),
        "int4 per channel": Quantize(Int(4), None),
        "int8, dynamic activations": Quantize(Int(8), Dynamic()),
    }
    with tempfile.TemporaryDirectory() as folder:
        files, simulated = {}, {}
        files["float32"] = Path(folder) / "float.onnx"
        whet.torch.export(model, None, find_target("onnxruntime", "torch"), files["float32"], example=inputs[8])
        for number, (name, spec) in enumerate(specs.items()):
            result = whet.quantize(model, spec, example=inputs[8], target="onnxruntime", progress=False)
            files[name] = result.export(Path(folder) / f"{number}.onnx")
            simulated[name] = result.side.predict(result.model, inputs[8])
        sessions = {name: open_session(path, threads=1) for name, path in files.items()}
        print(f"{given.size} x {given.size}, one thread, median of alternating runs in ms; dB: file against simulation")
        print(f"{'':28}" + "".join(f"batch {rows:<6}" for rows in BATCHES) + "      bytes   dB    computes")
        medians = {}
        for rows in BATCHES:
            for name, timings in zip(sessions, alternate(list(sessions.values()), inputs[rows]), strict=True):
                medians[name, rows] = timings.latency(batch=rows, threads=1).p50
        for name, path in files.items():
            cells = "".join(f"{medians[name, rows]:<12.4f}" for rows in BATCHES)
            kinds = ", ".join(f"{op} {'/'.join(types)}" for op, types in read_dtypes(path)["computed"].items())
            agreement = "" if name not in simulated else f"{_sqnr(simulated[name], sessions[name].run(inputs[8])):5.1f}"
            print(f"{name:28}{cells}{path.stat().st_size:>11,}  {agreement:5}  {kinds}")


def _sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise in dB."""
    return float(10 * np.log10(np.sum(expected**2) / np.sum((expected - found) ** 2)))


if __name__ == "__main__":
    main()
