"""What a step of quantization-aware training of a Keras ResNet-20 costs, beside a float step; eager graph and XLA.

    python benchmarks/keras_qat_steps.py [--rounds 20] [--batch 128] [--record out/quantization.json]

In every round each kind takes one step of Keras' own `train_on_batch` on the same batch: forward, cross-entropy, backward, SGD.
Printed are medians of the paired ratios, of processor time (which other work disturbs least) on one thread and against two
float models: as people train it, with batch norms in training mode, and with the same treatment as the quantized one, batch
norms folded into the convolutions. The second says what quantizing costs; the first what the user pays.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cifar
import keras
import numpy as np
import tables
from keras_litert import resnet20
from keras_quantization import one_thread
from safetensors.numpy import load_file

import whet
from whet.keras.clone import assemble
from whet.keras.trace import lowered
from whet.specs import QAT, Quantize

FLOAT, FOLDED = "float, batch norms in training", "float, batch norms folded"
KINDS = {
    "frozen ranges": QAT(learn_scale=False),
    "running observers": QAT(learn_scale=False, observe=1.0),
    "learned scales": QAT(),
}
BARS = {False: 1.5, True: 1.2}


def models(batch: Any) -> dict[str, Callable[[], Any]]:
    """What makes each kind; the quantized ones round additions too."""
    source = resnet20(load_file(cifar.folder() / "resnet20.safetensors"))
    options: dict[str, Any] = {"calibration": [batch], "target": "litert", "steps": 10**6, "progress": False}

    def prepared(qat: QAT) -> Callable[[], Any]:
        return lambda: whet.keras.prepare(source, Quantize(qat=qat), **options)

    plain = {FLOAT: lambda: whet.keras.copy(source), FOLDED: lambda: assemble(lowered(source))}
    return plain | {name: prepared(qat) for name, qat in KINDS.items()}


def seconds(made: dict[str, Any], x: Any, y: Any, rounds: int, *, jit: bool) -> dict[str, list[tuple[float, float]]]:
    """(processor seconds, seconds) of every step of every model; two rounds before are not counted."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for model in made.values():
        model.compile(keras.optimizers.SGD(1e-4), loss, jit_compile=jit)
    for index in range(rounds + 2):
        for name, model in made.items():
            wall, cpu = time.perf_counter(), time.process_time()
            model.train_on_batch(x, y)
            if index > 1:
                taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return taken


def main() -> int:
    """Print the table."""
    options = tables.parser(__doc__)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--batch", type=int, default=128)
    given = options.parse_args()
    one_thread()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(given.batch, 32, 32, 3)).astype(np.float32), rng.integers(0, 10, given.batch)
    rounds = 3 if given.quick else given.rounds
    table = tables.Table(
        "keras-steps",
        f"A training step of ResNet-20 in Keras {keras.__version__} on {keras.backend.backend()}, batch {given.batch}, one "
        f"thread, W8A8, additions too; medians of {rounds} paired ratios of processor time",
        ("", "compiled", "CPU ms", "× float, batch norms in training", "× float, batch norms folded", "to reach"),
        "python benchmarks/keras_qat_steps.py",
        record=given.record,
    )
    makers = models(x)
    for jit, how in ((False, "graph"), (True, "XLA")):
        taken = seconds({name: make() for name, make in makers.items()}, x, y, rounds, jit=jit)
        for name, pairs in taken.items():
            own = [cpu for cpu, _ in pairs]
            plain, fair = (
                statistics.median(a / b for a, (b, _) in zip(own, taken[base], strict=True)) for base in (FLOAT, FOLDED)
            )
            bar = tables.against(plain, BARS[jit], most=True) if name in KINDS else ""
            table.add(name, how, f"{1e3 * statistics.median(own):.0f}", f"{plain:.2f}", f"{fair:.2f}", bar)
    return 0


if __name__ == "__main__":
    sys.exit(main())
