"""Quantization of a Keras 3 ResNet-20 (channels last) on CIFAR-10: post-training at 8, 4 and 3 bits, and what QAT costs.

    python benchmarks/keras_quantization.py [bits] [steps] [blocks]

bits: top-1 of the exported LiteRT file on the 10,000 test images where the target takes the weights, and of the simulation;
the first and last layer in 8 bits, 1,024 training images for calibration, no labels. Codes of 4 and 3 bits are stored in whole
bytes. blocks: the same at 3 bits with block-wise reconstruction. steps: the time of a training step, with frozen, observed and
learned ranges, against the float model as people train it and against the same model with its batch norms folded, all timed in
alternation; eager graph and XLA. Without arguments: bits and steps.

The weights are PyTorch's own, and so are those of benchmarks/quantization.py. The folder of data, `$WHET_DATA` or
`../shared/data`, holds cifar10/resnet20.safetensors and the images.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras_litert import images, resnet20, run
from safetensors.numpy import load_file

import whet
from whet.keras.clone import assemble
from whet.keras.trace import lowered
from whet.runtimes.sessions import open_session
from whet.specs import QAT, AdaRound, BiasCorrection, Int, Quantize

EDGES = {"conv1": Int(8), "linear": Int(8)}
TUNED: dict[str, Any] = {"rounding": AdaRound(), "correct_bias": BiasCorrection(), "overrides": EDGES}
ROWS: dict[str, tuple[Quantize, float]] = {  # and the top-1 to reach
    "W8A8, nearest": (Quantize(), 88.0),
    "W4A8, nearest": (Quantize(Int(4), overrides=EDGES), 0.0),
    "W4A8, AdaRound": (Quantize(Int(4), **TUNED), 87.6),
    "W3A8, nearest": (Quantize(Int(3), overrides=EDGES), 0.0),
    "W3A8, AdaRound": (Quantize(Int(3), **TUNED), 86.0),
}
BLOCKS = {"W3A8, blocks": (Quantize(Int(3), **(TUNED | {"rounding": AdaRound(blocks=True)})), 86.0)}
GOALS = {"frozen": {False: 1.5, True: 1.2}, "observed": {False: 1.5, True: 1.2}, "learned": {False: 1.5, True: 1.2}}
BATCH, ROUNDS = 128, 12


def main() -> int:
    """Print the tables; 1 when a number misses its goal, 2 when the data is missing."""
    folder = Path(os.environ.get("WHET_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "cifar10"
    if not (folder / "resnet20.safetensors").is_file():
        print(f"The data is missing: there is no {folder}/resnet20.safetensors. Set WHET_DATA to the folder above cifar10/.")
        return 2
    wanted = sys.argv[1:] or ["bits", "steps"]
    model = resnet20(load_file(folder / "resnet20.safetensors"))
    missed = 0
    if "bits" in wanted:
        missed += bits(model, folder, ROWS)
    if "blocks" in wanted:
        missed += bits(model, folder, BLOCKS)
    if "steps" in wanted:
        missed += sum(steps(model, jit) for jit in (False, True))
    return 1 if missed else 0


def bits(model: Any, folder: Path, rows: dict[str, tuple[Quantize, float]]) -> int:
    """One row for each scheme; how many missed their goal."""
    x, y = images(folder / "test_jpeg_bytes.npz")
    calibration, _ = images(folder / "train_jpeg_bytes.npz", 1024)
    print(f"float model: {top1(lambda part: whet.keras.predict(model, part), x, y):.2f} %")
    missed = 0
    for name, (spec, goal) in rows.items():
        started = time.monotonic()
        done = whet.quantize(model, spec, calibration=calibration, target="litert", progress=False)
        seconds = time.monotonic() - started
        with tempfile.TemporaryDirectory() as place:
            session = open_session(done.export(Path(place) / "model.tflite"), threads=1)
            file = top1(session.run, x, y)
            size = (Path(place) / "model.tflite").stat().st_size
        simulated = top1(lambda part, made=done.model: whet.keras.predict(made, part), x, y)
        against = f" (goal {goal})" if goal else ""
        print(
            f"{name:15} file {file:.2f} %{against}, simulation {simulated:.2f} %, {size:,} bytes, {seconds:.1f} s", flush=True
        )
        missed += file < goal
    return missed


def top1(call: Any, x: Any, y: Any) -> float:
    """Per cent of the images that are given their class."""
    return 100 * float(np.mean(run(call, x).argmax(-1) == y))


def steps(model: Any, jit: bool) -> int:
    """Medians of the time of one training step; how many missed their goal."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(BATCH, 32, 32, 3)).astype("float32"), rng.integers(0, 10, BATCH)
    kinds = {
        "frozen": QAT(learn_scale=False),
        "observed": QAT(learn_scale=False, observe=1.0),
        "learned": QAT(),
    }
    made = {"float": whet.keras.copy(model), "folded": assemble(lowered(model))}
    for name, qat in kinds.items():
        options: dict[str, Any] = {"calibration": [x], "target": "litert", "steps": 10_000, "progress": False}
        made[name] = whet.keras.prepare(model, Quantize(qat=qat), **options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for network in made.values():
        network.compile(keras.optimizers.SGD(1e-3, momentum=0.9), loss, jit_compile=jit)
        network.train_on_batch(x, y)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(ROUNDS):
        for name, network in made.items():
            started = time.perf_counter()
            network.train_on_batch(x, y)
            seconds[name].append(time.perf_counter() - started)
    print(f"a step on {BATCH} images, {'XLA' if jit else 'eager graph'}:")
    missed = 0
    for name, taken in seconds.items():
        ratios = [float(np.median(taken) / np.median(seconds[base])) for base in ("float", "folded")]
        goal = GOALS.get(name, {}).get(jit)
        against = "" if goal is None else f" (goal {goal})"
        print(f"  {name:9} {1e3 * np.median(taken):7.1f} ms, {ratios[0]:.2f} x float{against}, {ratios[1]:.2f} x folded")
        missed += goal is not None and ratios[0] > goal
    return missed


if __name__ == "__main__":
    raise SystemExit(main())
