"""An int8 LiteRT file of a convolutional Keras 3 model, on the 10,000 test images of CIFAR-10.

    python benchmarks/keras_litert.py

A ResNet-20 (channels last, option-A shortcuts) is built in Keras with trained weights, quantized on 512 training images,
exported, and run by LiteRT. Printed: top-1 of the file, the simulation and the float model; on how many images file and
simulation agree; whether the codes and scales in the file are ours bit for bit; operators by type; the latency of int8 and
float on one core, timed in alternation; and which kernels ran.

The folder of data, `$WHET_DATA` or `../shared/data`, holds cifar10/resnet20.safetensors and the images as JPEG bytes.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers as L
from safetensors.numpy import load_file

import whet
from whet.keras.quantize import bias_codes, planned
from whet.keras.views import to_numpy
from whet.runtimes.content import read_dtypes
from whet.runtimes.latency import alternate
from whet.runtimes.sessions import open_session
from whet.specs import TARGETS

CALIBRATION = 512
BATCH = 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> int:
    """Print the table; 1 when the data is missing or a number misses its goal."""
    folder = Path(os.environ.get("WHET_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "cifar10"
    weights = folder / "resnet20.safetensors"
    if not weights.is_file():
        print(f"The data is missing: there is no {weights}. Set WHET_DATA to the folder that holds cifar10/.", file=sys.stderr)
        return 1
    x, y = images(folder / "test_jpeg_bytes.npz")
    calibration, _ = images(folder / "train_jpeg_bytes.npz", CALIBRATION)
    model = resnet20(load_file(weights))
    quantized = whet.quantize(model, calibration=calibration, target="litert", progress=False)
    with tempfile.TemporaryDirectory() as place:
        path = quantized.export(Path(place) / "int8.tflite")
        float_path = Path(place) / "float.tflite"
        export_float(model, float_path, calibration[:BATCH])
        return report(model, quantized, path, float_path, x, y)


def report(model: Any, quantized: Any, path: Path, float_path: Path, x: Any, y: Any) -> int:
    """Measure, print, and compare with the goals."""
    sessions = [open_session(float_path, threads=1), open_session(path, threads=1)]
    outputs = {
        "float model": run(lambda part: whet.keras.predict(model, part), x),
        "simulation": run(lambda part: whet.keras.predict(quantized.model, part), x),
        "int8 file": run(sessions[1].run, x),
    }
    chosen = {name: scores.argmax(-1) for name, scores in outputs.items()}
    for name, classes in chosen.items():
        print(f"top-1, {name}: {100 * np.mean(classes == y):.2f} %")
    agreement = 100 * float(np.mean(chosen["int8 file"] == chosen["simulation"]))
    print(f"agreement of file and simulation: {agreement:.2f} % (goal: at least 99.5 %)")
    print(f"signal to noise: file against simulation {noise(outputs['int8 file'], outputs['simulation']):.1f} dB, ", end="")
    print(f"float against simulation {noise(outputs['float model'], outputs['simulation']):.1f} dB")
    same, count = same_codes(model, quantized.plan, path)
    print(f"codes and scales read back bit for bit: {same} of {count} weights and biases")
    for operator, kinds in sorted(read_dtypes(path)["computed"].items()):
        print(f"  {operator}: {', '.join(f'{n} x {kind}' for kind, n in kinds.items())}")
    floats, ints = (float(np.median(timed.ms)) for timed in alternate(sessions, x[:BATCH], runs=None))
    print(f"latency, batch {BATCH}, one core: float {floats:.2f} ms, int8 {ints:.2f} ms, {floats / ints:.2f} x")
    print(f"bytes: float {float_path.stat().st_size:,}, int8 {path.stat().st_size:,}")
    print(f"runtime: {sessions[1].runtime}")
    return 0 if agreement >= 99.5 and same == count else 1


def images(path: Path, count: int | None = None) -> tuple[Any, Any]:
    """Normalized float32 images, (n, 32, 32, 3), and their classes, in a random order that is the same every time: the files
    are sorted by class."""
    from PIL import Image

    data = np.load(path)
    rows = np.random.default_rng(0).permutation(len(data["y"]))[:count]
    blob, offset = data["blob"].tobytes(), data["offset"]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(blob[offset[i] : offset[i + 1]]))) for i in rows])
    return ((pixels / 255 - MEAN) / STD).astype(np.float32), data["y"][rows].astype(np.int64)


def resnet20(tensors: dict[str, Any]) -> Any:
    """The network of He et al. 2015 (arXiv:1512.03385) for CIFAR, from PyTorch's weights."""
    entry = keras.Input((32, 32, 3), name="image")
    x = L.ReLU()(convolved(entry, 16, 1, "conv1", "bn1"))
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(3):
            stride, path = 2 if stage > 1 and block == 0 else 1, f"layer{stage}.{block}"
            z = L.ReLU()(convolved(x, width, stride, f"{path}.conv1", f"{path}.bn1"))
            z = convolved(z, width, 1, f"{path}.conv2", f"{path}.bn2")
            if stride == 2:
                x = shortened(x, width)
            x = L.ReLU()(L.Add()([z, x]))
    model = keras.Model(entry, L.Dense(10, name="linear")(L.GlobalAveragePooling2D()(x)), name="resnet20")
    for layer in model.layers:
        names = (f"{layer.name.replace('-', '.')}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))
        arrays = [tensors[name] for name in names if name in tensors]
        if arrays:
            kernel = arrays[0]
            arrays[0] = kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
            layer.set_weights(arrays)
    return model


def shortened(x: Any, width: int) -> Any:
    """Option A: every second position, and zeros for the new channels; by layers that only move values."""
    x = L.MaxPooling2D(1, strides=2)(x)
    _, height, length, channels = x.shape
    flat = L.Reshape((height * length, channels, 1))(x)
    padded = L.ZeroPadding2D(((0, 0), (width // 4, width // 4)))(flat)
    return L.Reshape((height, length, width))(padded)


def convolved(x: Any, width: int, stride: int, name: str, norm: str) -> Any:
    """A 3x3 convolution, padded by one on every side as PyTorch does, and its batch norm."""
    padded = L.ZeroPadding2D(1)(x) if stride == 2 else x
    kind = "valid" if stride == 2 else "same"
    made = L.Conv2D(width, 3, strides=stride, padding=kind, use_bias=False, name=name.replace(".", "-"))(padded)
    return L.BatchNormalization(epsilon=1e-5, name=norm.replace(".", "-"))(made)


def export_float(model: Any, path: Path, example: Any) -> None:
    """The float file to compare with."""
    whet.keras.export(model, None, TARGETS["litert"], path, example=example)


def run(call: Any, x: Any) -> Any:
    """Outputs for all of `x`, in batches."""
    return np.concatenate([np.asarray(call(x[i : i + 250])) for i in range(0, len(x), 250)])


def noise(found: Any, wanted: Any) -> float:
    """Signal to noise in dB."""
    return float(10 * np.log10(np.sum(wanted**2) / max(np.sum((found - wanted) ** 2), 1e-30)))


def same_codes(model: Any, plan: Any, path: Path) -> tuple[int, int]:
    """(how many planned weights and biases are in the file with our codes and scales, how many there are)."""
    from ai_edge_litert import schema_py_generated as schema

    content = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    found = set()
    for tensor in content.subgraphs[0].tensors:
        data = content.buffers[tensor.buffer].data
        if data is not None and tensor.quantization is not None and tensor.quantization.scale is not None:
            found.add((bytes(data), np.asarray(tensor.quantization.scale, np.float32).tobytes()))
    program = planned(model, plan)
    wanted = []
    for name, params in plan.weights.items():
        codes = params.encode(to_numpy(program.kernels[name].variable)).astype(np.int8)
        codes = codes.transpose(3, 0, 1, 2) if codes.ndim == 4 else codes.T
        wanted.append((codes.tobytes(), params.scale.astype(np.float32).tobytes()))
    wanted += [(codes.tobytes(), scale.astype(np.float32).tobytes()) for _, codes, scale in bias_codes(program, plan)]
    return sum(item in found for item in wanted), len(wanted)


if __name__ == "__main__":
    raise SystemExit(main())
