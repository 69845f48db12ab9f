"""Measured latency and sensitivity: what is chosen, and what it costs before anything is trained.

    OMP_NUM_THREADS=1 python benchmarks/structures.py [--only latency,sensitivity] [--quick] [--record out/it.json]

Accuracies are of CIFAR-10 test images, by the framework; times of ONNX Runtime, one row and one thread, beside the original in
the same run. Data: see benchmarks/cifar.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from cifar import images, resnet20
from tables import Clock, Table, chosen, parser, top1

import whet
from whet import BySensitivity, Channel, Global, Prune

COMMAND = "OMP_NUM_THREADS=1 python benchmarks/structures.py"


def right(made: Any, test: tuple[np.ndarray, np.ndarray]) -> int:
    """How many of the test images are classified rightly."""
    x, y = test
    parts = [made.side.predict(made.model, x[i : i + 256]).argmax(-1) for i in range(0, len(x), 256)]
    return int(np.sum(np.concatenate(parts) == y))


def original(model: Any, test: Any) -> str:
    """The accuracy of the model as it is."""
    from whet.pipeline.compressed import start

    return top1(right(start(model, example=test[0][:2]), test), len(test[1]))


def latency(train: Any, test: Any, record: Any) -> None:
    """ResNet-20 to several times."""
    table = Table(
        "latency",
        "Channels of ResNet-20 removed to a time on ONNX Runtime",
        ("asked", "promised by the table", "measured", "original, ms", "pruned, ms", "rounds", "files timed", "seconds (CPU)"),
        f"{COMMAND} --only latency",
        record=record,
    )
    for limit in (0.85, 0.7, 0.55):
        clock = Clock()
        spec = Prune(latency=limit, granularity=Channel())
        told = whet.prune(resnet20(), spec, example=test[0][:2], progress=False).steps[0].control["latency"]
        table.add(
            f"{limit:.2f}",
            f"{told['predicted']:.2f}",
            f"{told['measured']:.2f}" + (" (missed)" if told["missed"] else ""),
            f"{told['original_ms']:.3f}",
            f"{told['measured_ms']:.3f}",
            len(told["trials"]),
            told["files"],
            clock.read()[1],
        )


def sensitivity(train: Any, test: Any, record: Any) -> None:
    """Masks on ResNet-20 by each allocation."""
    table = Table(
        "sensitivity",
        "Masks on ResNet-20 without training, by allocation",
        ("sparsity", "Uniform()", "Global()", "BySensitivity()", "seconds of BySensitivity (CPU)"),
        f"{COMMAND} --only sensitivity",
        record=record,
    )
    x, y = train
    data = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 128, 64)]
    for sparsity in (0.3, 0.5, 0.6):
        cells, seconds = [], ""
        for allocation in (whet.Uniform(), Global(), BySensitivity(trials=6)):
            clock = Clock()
            made = whet.prune(resnet20(), Prune(sparsity, allocation=allocation), train=data, progress=False)
            seconds = clock.read()[1]
            cells.append(top1(right(made, test), len(test[1])))
        table.add(f"{sparsity:.0%}", *cells, seconds)
    table.note(
        f"Measured on 128 training images, top-1 on {len(test[1]):,} test images; the original: {original(resnet20(), test)}."
    )


SECTIONS = {"latency": latency, "sensitivity": sensitivity}


def main() -> None:
    """Run the sections that were asked for."""
    options = parser(__doc__ or "")
    options.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    given = options.parse_args()
    sections = chosen(given.only.split(","), SECTIONS, "section")
    train, test = images("train", 256), images("test", 256 if given.quick else 1000)
    for name in sections:
        SECTIONS[name](train, test, given.record)


if __name__ == "__main__":
    main()
