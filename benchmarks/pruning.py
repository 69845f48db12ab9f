"""Masks: how sparse LeNets on MNIST become without loss, and how long 100 million weights take; torch.nn.utils.prune beside.

    python benchmarks/pruning.py [mnist] [speed] [--quick] [--keras] [--record out/pruning.json]
    python benchmarks/pruning.py mnist --shift 1 --models LeNet-300-100 --rows longer taught

mnist: both LeNets are trained on 55,000 images that move by up to `--shift` pixels, the other 5,000 choose the epoch; then they
are trained again as long, while global magnitude pruning ramps to the sparsity. Error on the 10,000 test images; the loss is of
the same images before and after (paired, Tango's 95 % interval). Rows: the dense model trained once more as long; pruned with
the dense model as its teacher; pruned alone; peer: `global_unstructured` at once, then the same training.
speed: seconds of the processor to make the masks, against one partial sort of as many numbers.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tables
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import whet
from whet import Cubic, Distill, Global, Prune, Train
from whet.numerics.masks import mask_lowest
from whet.numerics.namespace import numpy_namespace
from whet.numerics.statistics import paired_drop
from whet.torch.namespace import xp as torch_namespace

DATA = Path(os.environ.get("WHET_DATA", Path(__file__).parents[2] / "shared" / "data")) / "mnist"
BATCH = 128
ROWS = ("longer", "taught", "alone", "peer")
CASES = {"LeNet-300-100": (0.95, 1.6, 30), "LeNet-5": (0.96, 0.8, 8)}  # sparsity, error to reach in per cent, epochs
WEIGHTS, SIDE = 100_000_000, 4096


class Moving:
    """Batches in a new order on every pass, every image moved by up to `shift` pixels."""

    def __init__(self, x: np.ndarray, y: np.ndarray, last: bool, shift: int) -> None:
        self.x, self.y, self.last, self.shift = np.pad(x, ((0, 0), (shift, shift), (shift, shift))), y, last, shift
        self.rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.y) // BATCH

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = self.rng.permutation(len(self.y))
        for start in range(0, len(self) * BATCH, BATCH):
            at = order[start : start + BATCH]
            down, right = self.rng.integers(0, 2 * self.shift + 1, (2, BATCH))
            rows, columns = down[:, None] + np.arange(28), right[:, None] + np.arange(28)
            yield channels(self.x[at[:, None, None], rows[:, :, None], columns[:, None, :]], self.last), self.y[at]


def asked(arguments: list[str]) -> list[str]:
    """The arguments without the record's file."""
    at = arguments.index("--record") if "--record" in arguments else len(arguments)
    return [*arguments[:at], *arguments[at + 2 :]]


def channels(x: np.ndarray, last: bool) -> np.ndarray:
    """With an axis of one channel, last for Keras."""
    return x[..., None] if last else x[:, None]


def mnist(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28), about standardised, and digits (n,)."""
    found = np.load(DATA / f"mnist_{part}.npz")
    return (found["x"].astype(np.float32) / 255 - 0.13) / 0.31, found["y"].astype(np.int64)


def torch_model(name: str) -> Any:
    """266,200 or 430,500 weights."""
    torch.manual_seed(0)
    if name == "LeNet-300-100":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    convolutions = [nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


def keras_model(name: str) -> Any:
    """The same in Keras."""
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)
    made: list[Any] = [keras.Input((28, 28, 1))]
    if name == "LeNet-300-100":
        made += [layers.Flatten(), layers.Dense(300, "relu"), layers.Dense(100, "relu")]
    else:
        made += [layers.Conv2D(20, 5), layers.MaxPooling2D(), layers.Conv2D(50, 5), layers.MaxPooling2D(), layers.Flatten()]
        made += [layers.Dense(500, "relu")]
    return keras.Sequential([*made, layers.Dense(10)])


def peer(model: Any, sparsity: float, epochs: int, train: Moving) -> Any:
    """`global_unstructured` at once, then as many steps of the same optimizer as ours; *in place*."""
    pruned = [(layer, "weight") for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    torch_prune.global_unstructured(pruned, pruning_method=torch_prune.L1Unstructured, amount=sparsity)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(train))
    for _ in range(epochs):
        for x, y in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
            optimizer.step()
            schedule.step()
    for layer, weight in pruned:
        torch_prune.remove(layer, weight)
    return model


class Mnist:
    """The table of section mnist."""

    def __init__(self, given: Any) -> None:
        self.keras, self.shift, self.rows = given.keras, given.shift, given.rows
        self.epochs = 1 if given.quick else given.epochs
        self.x, self.y = mnist("train")
        self.test, self.digits = mnist("test")
        self.table = tables.Table(
            f"pruning-mnist-{'keras' if self.keras else 'torch'}-{self.shift}",
            f"Unstructured sparsity on MNIST, 10,000 test images, {'Keras' if self.keras else 'PyTorch'}; images for training "
            + (f"move by up to {self.shift} pixels" if self.shift else "do not move"),
            ("", "weights removed, %", "error, %", "to reach", "loss of accuracy, points [95 %]", "CPU s"),
            " ".join(["python benchmarks/pruning.py", *asked(sys.argv[1:])]),
            record=given.record,
        )

    def case(self, name: str) -> None:
        """The rows of one model."""
        sparsity, bar, epochs = CASES[name]
        epochs = self.epochs or epochs
        train = Moving(self.x[:55_000], self.y[:55_000], self.keras, self.shift)
        options = {"train": train, "val": (channels(self.x[55_000:], self.keras), self.y[55_000:]), "progress": False}
        clock = tables.Clock()
        dense = whet.fit((keras_model if self.keras else torch_model)(name), Train(epochs=epochs), **options)
        before = self.row(f"{name}, dense, {epochs} epochs", dense, 0.0, clock)
        if "longer" in self.rows:
            clock = tables.Clock()
            self.row(f"{name}, dense, as many again", whet.fit(dense, Train(epochs=epochs), **options), 0.0, clock, before)
        spec = Prune(sparsity, allocation=Global(), schedule=Cubic(end=0.75, frequency=50))
        taught = Train(epochs=epochs, apply=(spec, Distill(student_weight=0.1)))
        alone = Train(epochs=epochs, apply=(spec,))
        for key, label, recipe in (("alone", "alone", alone), ("taught", "the dense model teaches", taught)):
            if key not in self.rows:
                continue
            clock = tables.Clock()
            made = whet.fit(dense, recipe, teacher=dense.model if recipe.distill else None, **options)
            removed = sum(int((m == 0).sum()) for m in made.masks.values()) / sum(m.size for m in made.masks.values())
            self.row(f"{name}, Whet, Cubic, Global, {label}", made, removed, clock, before, bar)
        if not self.keras and "peer" in self.rows:
            clock = tables.Clock()
            other = peer(whet.torch.copy(dense.model).train(), sparsity, epochs, train)
            self.row(f"{name}, global_unstructured", other, sparsity, clock, before, bar)

    def row(
        self, label: str, made: Any, removed: float, clock: tables.Clock, before: np.ndarray | None = None, bar: float = 0.0
    ) -> np.ndarray:
        """Score a model, add its row; whether it was right, image by image."""
        side = whet.keras if self.keras else whet.torch
        outputs = side.predict(getattr(made, "model", made), channels(self.test, self.keras))
        right = (np.asarray(outputs).argmax(-1) == self.digits).astype(np.float64)
        error, loss, wanted = 100 * (1 - right.mean()), "", ""
        if before is not None:
            low, high = paired_drop(before, right)
            loss = f"{100 * (before.mean() - right.mean()):.2f} [{100 * low:.2f}, {100 * high:.2f}]"
            wanted = tables.against(error, bar, most=True) if bar else ""
        self.table.add(label, f"{100 * removed:.2f}", f"{error:.2f}", wanted, loss, f"{clock.seconds()[1]:.0f}")
        return right


def timed(work: Callable[[], Any]) -> float:
    """The least processor seconds of three runs."""
    found = []
    for _ in range(3):
        clock = tables.Clock()
        work()
        found.append(clock.seconds()[1])
    return min(found)


def speed(quick: bool, record: Path | None) -> None:
    """The table of section speed."""
    count = WEIGHTS // 100 if quick else WEIGHTS
    table = tables.Table(
        "pruning-speed",
        f"Masks of {count:,} float32 weights, 90 % removed, one thread",
        ("", "CPU s", "x np.partition", "to reach"),
        "python benchmarks/pruning.py speed",
        record=record,
    )
    scores = np.abs(np.random.default_rng(0).standard_normal(count, np.float32))
    tensor, k = torch.from_numpy(scores), int(0.9 * count)
    unit = timed(lambda: np.partition(scores, k))
    table.add("np.partition", f"{unit:.2f}", "1.0", "")
    kth = timed(lambda: torch.kthvalue(tensor, k))
    table.add("torch.kthvalue", f"{kth:.2f}", f"{kth / unit:.1f}", "")
    for name, values, xp in (("NumPy", scores, numpy_namespace), ("torch", tensor, torch_namespace)):
        found = timed(lambda values=values, xp=xp: mask_lowest(values, k, xp=xp))
        table.add(
            f"the mask from scores, {name}", f"{found:.2f}", f"{found / unit:.1f}", tables.against(found / unit, 3, most=True)
        )
    torch.manual_seed(0)
    layers = [nn.Linear(SIDE, SIDE, bias=False) for _ in range(max(count // SIDE**2, 1))]
    model = nn.Sequential(*layers)
    spec = Prune(0.9, allocation=Global())
    clock = tables.Clock()
    whet.torch.prune(model, spec, masks={})
    table.add("whet.torch.prune of a model, with its report", f"{clock.seconds()[1]:.2f}", "", "")
    clock = tables.Clock()
    torch_prune.global_unstructured([(layer, "weight") for layer in layers], torch_prune.L1Unstructured, amount=0.9)
    table.add("torch.nn.utils.prune.global_unstructured", f"{clock.seconds()[1]:.2f}", "", "")


def main() -> int:
    """Print the tables."""
    options = tables.parser(__doc__)
    options.add_argument("sections", nargs="*", choices=["mnist", "speed"], default=["mnist", "speed"])
    options.add_argument("--keras", action="store_true", help="the LeNets in Keras")
    options.add_argument("--shift", type=int, default=2, help="pixels that images for training move by at most")
    options.add_argument("--epochs", type=int, default=0, help="of each training; default: 30 and 8")
    options.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="beside the dense model")
    options.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    given = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if "mnist" in given.sections:
        bench = Mnist(given)
        for name in given.models:
            bench.case(name)
    if "speed" in given.sections:
        speed(given.quick, given.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
