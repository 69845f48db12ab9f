"""Every scheme written for every target: what the file stores, and what its runtime computes in.

    python benchmarks/schemes.py [--targets litert executorch …] [--quick] [--record out/quantization.json]

A convolution of 32 to 64 channels and a linear layer, exported and run. A cell says "stored: computes": the type that most
bytes of the file are stored in, and the types that the operations compute in, as the runtime has optimized the graph; or
"refused", where exporting is an error that names the way out. LiteRT files come from Keras, the others from PyTorch.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tables

import whet
from whet import Dynamic, Float, Int, PerGroup, Quantize
from whet.errors import ExportError, SpecError
from whet.runtimes.content import read_dtypes
from whet.runtimes.sessions import open_session
from whet.specs import NF4, TARGETS, KMeans, Piecewise, PowerOfTwo

SCHEMES: dict[str, Quantize] = {
    "`Int(8)`, static": Quantize(),
    "`Int(4)`, static": Quantize(Int(4)),
    "`Int(2)`, static": Quantize(Int(2)),
    "`Int(8)` alone": Quantize(Int(8), None),
    "`Int(4)` alone": Quantize(Int(4), None),
    "`Int(2)` alone": Quantize(Int(2), None),
    "`Int(4, granularity=PerGroup(32))` alone": Quantize(Int(4, granularity=PerGroup(32)), None),
    "`Int(4, symmetric=False)` alone": Quantize(Int(4, symmetric=False), None),
    "`Int(16)` alone": Quantize(Int(16), None),
    "`KMeans(bits=4)`": Quantize(KMeans(bits=4), None),
    "`NF4()`": Quantize(NF4(), None),
    "`PowerOfTwo(4)`": Quantize(PowerOfTwo(4), None),
    "`Piecewise(4)`": Quantize(Piecewise(4), None),
    '`Float("float8_e4m3")`': Quantize(Float("float8_e4m3"), None),
    '`Float("float16")`': Quantize(Float("float16"), None),
    '`Float("bfloat16")`': Quantize(Float("bfloat16"), None),
    "`Int(8)`, `Dynamic()`": Quantize(Int(8), Dynamic()),
}

OPERATIONS = ("conv", "gemm", "matmul", "linear", "fully", "dense", "addmm")  # parts of their names, in any runtime


def torch_model() -> tuple[Any, Any]:
    """A small network and its images, channels first."""
    import torch

    torch.manual_seed(0)
    parts = (torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model = torch.nn.Sequential(*parts, torch.nn.Linear(64, 32)).eval()
    return model, np.random.default_rng(0).normal(size=(32, 32, 8, 8)).astype(np.float32)


def keras_model() -> tuple[Any, Any]:
    """The same in Keras, channels last."""
    import keras

    keras.utils.set_random_seed(0)
    L = keras.layers
    parts = [L.Input((8, 8, 32)), L.Conv2D(64, 3, padding="same", activation="relu"), L.GlobalAveragePooling2D(), L.Dense(32)]
    return keras.Sequential(parts), np.random.default_rng(0).normal(size=(32, 8, 8, 32)).astype(np.float32)


COLUMNS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "onnxruntime": torch_model,
    "openvino": torch_model,
    "litert": keras_model,
    "executorch": torch_model,
    "torch": torch_model,
}


def cell(model: Any, x: Any, spec: Quantize, target: str, folder: Path) -> str:
    """What the file stores and computes in, or that it is refused."""
    try:
        made = whet.quantize(model, spec, calibration=[x], target=target, progress=False)
        path = made.export(folder / f"model{TARGETS[target].suffix}", overwrite=True)
    except (ExportError, SpecError):
        return "refused"
    open_session(path, threads=1).run(x)
    found = read_dtypes(path)
    kinds = [
        f"{op} {'/'.join(types)}" for op, types in (found["computed"] or {}).items() if any(n in op.lower() for n in OPERATIONS)
    ]
    stored = max(found["stored"].items(), key=lambda item: item[1])[0]
    return f"{stored}: {', '.join(kinds) or 'not told'}"


def main() -> int:
    """Print the table."""
    options = tables.parser(__doc__)
    options.add_argument("--targets", nargs="+", default=list(COLUMNS), choices=list(COLUMNS))
    given = options.parse_args()
    table = tables.Table(
        "schemes",
        "The type that most bytes of the file are stored in, and what the operations compute in",
        ("", *given.targets),
        "python benchmarks/schemes.py",
        record=given.record,
    )
    models = {make: make() for make in dict.fromkeys(COLUMNS[target] for target in given.targets)}
    with tempfile.TemporaryDirectory() as folder:
        for name, spec in list(SCHEMES.items())[: 2 if given.quick else None]:
            table.add(name, *(cell(*models[COLUMNS[target]], spec, target, Path(folder)) for target in given.targets))
    return 0


if __name__ == "__main__":
    sys.exit(main())
