"""Measured latency, sensitivity and reconstruction: what is chosen, and what it costs before anything is trained.

    OMP_NUM_THREADS=1 python benchmarks/structures.py [--only latency,sensitivity,reconstruction] [--quick] [--record …]

Accuracies are of CIFAR-10 test images, by the framework; times of ONNX Runtime, one row and one thread, beside the original in
the same run. Data: see benchmarks/cifar.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from cifar import folder, images, resnet20
from tables import Clock, Table, chosen, parser, top1

import whet
from whet import BySensitivity, Channel, Global, Prune, Reconstruct

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


def reconstruction(train: Any, test: Any, record: Any) -> None:
    """ResNet-20 without channels inside its blocks, and without training, in both frameworks."""
    table = Table(
        "reconstruction",
        "Channels inside the blocks of ResNet-20 removed, no training, top-1 of the model, %",
        (
            "of the channels",
            "MACs",
            "PyTorch",
            "with Reconstruct()",
            "Keras",
            "with Reconstruct()",
            "seconds PyTorch, Keras (CPU)",
        ),
        f"{COMMAND} --only reconstruction",
        record=record,
    )
    import keras_litert
    from safetensors.numpy import load_file

    models = {"torch": resnet20(), "keras": keras_litert.resnet20(load_file(folder() / "resnet20.safetensors"))}
    before = whet.inspect(models["torch"], test[0][:1]).macs
    for sparsity in (0.125, 0.25, 0.375, 0.5):
        cells, seconds, macs = [], [], 0
        for side, model in models.items():
            turn = (lambda x: x) if side == "torch" else (lambda x: x.transpose(0, 2, 3, 1))
            data = [(turn(train[0][i : i + 64]), train[1][i : i + 64]) for i in range(0, len(train[0]), 64)]
            layers = "layer*.conv1" if side == "torch" else "layer*conv1"
            for solved in (None, Reconstruct(batches=len(data))):
                clock = Clock()
                spec = Prune(sparsity, granularity=Channel(), round_to=4, include=(layers,), reconstruct=solved)
                made = whet.prune(model, spec, train=data, progress=False)
                if solved is not None:
                    seconds.append(f"{clock.seconds()[1]:.0f}")
                cells.append(top1(right(made, (turn(test[0]), test[1])), len(test[1])))
                macs = whet.inspect(made.model, turn(test[0])[:1]).macs if side == "torch" else macs
        table.add(f"{sparsity:.1%}", f"{before / macs:.2f} times fewer", *cells, ", ".join(seconds))
    table.note(
        f"Solved on {len(train[0])} training images without their labels, top-1 on {len(test[1]):,} test images; the original: "
        f"{original(resnet20(), test)}."
    )


SECTIONS = {"latency": latency, "sensitivity": sensitivity, "reconstruction": reconstruction}


def main() -> None:
    """Run the sections that were asked for."""
    options = parser(__doc__ or "")
    options.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    given = options.parse_args()
    sections = chosen(given.only.split(","), SECTIONS, "section")
    train, test = images("train", 1024), images("test", 256 if given.quick else 1000)
    for name in sections:
        SECTIONS[name](train, test, given.record)


if __name__ == "__main__":
    main()
