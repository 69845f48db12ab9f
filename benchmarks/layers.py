"""Whole layers removed by each criterion and by chance: the accuracy at once, and after a short training.

    OMP_NUM_THREADS=1 python benchmarks/layers.py [resnet56] [transformer] [--criteria LossChange …] [--quick] [--record …]

ResNet-56 loses blocks on CIFAR-10 (data: see benchmarks/cifar.py); a transformer of 12 layers, trained here, on the rows of
MNIST's digits. Every row is one run of one seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar
import numpy as np
import torch
from structures import right
from tables import Clock, Table, chosen, parser, top1
from torch import nn
from torch.nn import functional as F

import whet
from whet import BlockInfluence, Layer, LossChange, OutputChange, Prune
from whet.pipeline.compressed import start

COMMAND = "OMP_NUM_THREADS=1 python benchmarks/layers.py"
CRITERIA = (BlockInfluence(), OutputChange(), LossChange(), OutputChange(greedy=True))
Split = tuple[Any, Any]


@dataclass(frozen=True)
class Case:
    """A trained model, its data, how many layers leave, and the training that follows."""

    title: str
    model: nn.Module
    train: Split
    test: Split
    counts: tuple[int, ...]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    steps: int


class Digits(nn.Module):
    """Rows of 28 pixels in, digits out: a transformer of 12 layers, norms first."""

    def __init__(self, width: int = 48, layers: int = 12) -> None:
        super().__init__()
        self.rows, self.places = nn.Linear(2 * 28, width), nn.Parameter(0.02 * torch.randn(14, width))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(layers)
            )
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(self.rows(x) + self.places)).mean(1))


def fit(model: Any, train: Split, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """*In place*: `steps` batches of 64, cosine decay, cross-entropy."""
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    model.train()
    for _, (x, y) in zip(range(steps), shuffled(train), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        decay.step()
    model.eval()


def shuffled(data: Split) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of 64 without an end, in the same order every time."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.from_numpy(array) for array in data)
    while True:
        for batch in torch.randperm(len(x), generator=generator).split(64):
            yield x[batch], y[batch]


def measure(case: Case, name: str, criteria: list[str], record: Path | None) -> None:
    """One table."""
    columns = (
        "layers removed",
        "criterion",
        "top-1 at once, %",
        f"after {case.steps} steps, %",
        "which",
        "seconds to choose (CPU)",
    )
    table = Table(f"layers-{name}", case.title, columns, f"{COMMAND} {name}", record=record)
    x, y = case.train
    data = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 128, 64)]
    whole = whet.prune(case.model, Prune(granularity=Layer(1)), train=data, progress=False)
    names = list(whole.steps[0].control["layers"]["importance"])
    table.add(0, "", *accuracies(case, start(deepcopy(case.model), example=x[:2])), "", "")
    for count in case.counts:
        for criterion in CRITERIA:
            label = type(criterion).__name__ + (" greedy" if getattr(criterion, "greedy", False) else "")
            if criteria and label not in criteria:
                continue
            clock = Clock()
            made = whet.prune(case.model, Prune(granularity=Layer(count), criterion=criterion), train=data, progress=False)
            seconds, gone = clock.read()[1], made.steps[0].control["layers"]["removed"]
            table.add(count, label, *accuracies(case, made), short(gone), seconds)
        rng = np.random.default_rng(0)
        for draw in () if criteria else (1, 2):
            chosen = tuple(rng.choice(names, count, replace=False).tolist())
            made = whet.prune(case.model, Prune(granularity=Layer(count), include=chosen), train=data[:1], progress=False)
            table.add(count, f"by chance, {draw}", *accuracies(case, made), short(chosen), "")
    table.note(f"Measured on 128 training examples; top-1 of {len(case.test[1]):,} test examples; training with batches of 64.")


def accuracies(case: Case, made: Any) -> tuple[str, str]:
    """Top-1 at once, and after training."""
    total, found = len(case.test[1]), []
    for steps in (0, case.steps):
        torch.manual_seed(0)
        fit(made.model, case.train, case.optimizer(made.model.parameters()), steps)
        found.append(top1(right(made, case.test), total))
    return found[0], found[1]


def short(names: Any) -> str:
    """Names in order, `layer1.3` as 1.3."""
    return " ".join(sorted((name.removeprefix("layers.").removeprefix("layer") for name in names), key=numbers))


def numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split("."))


def resnet56(quick: bool) -> Case:
    """Of 27 blocks two change the shape and stay."""
    return Case(
        "Blocks of ResNet-56 on CIFAR-10",
        cifar.resnet56(),
        cifar.images("train", 4000),
        cifar.images("test", 200 if quick else 500),
        (3,) if quick else (6,),
        lambda parameters: torch.optim.SGD(parameters, 0.02, momentum=0.9, nesterov=True, weight_decay=1e-4),
        5 if quick else 40,
    )


def transformer(quick: bool) -> Case:
    """Trained for 1,200 steps."""
    root = cifar.folder().parent / "mnist"
    splits = []
    for split, count in (("train", 30_000), ("test", 2000)):
        stored = np.load(root / f"mnist_{split}.npz")
        chosen = np.random.default_rng(0).permutation(len(stored["y"]))[:count]
        rows = (stored["x"][chosen].astype(np.float32) / 255).reshape(count, 14, 56)
        splits.append((rows, stored["y"][chosen].astype(np.int64)))
    torch.manual_seed(0)
    model = Digits()
    fit(model, splits[0], torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05), 60 if quick else 1200)
    counts = (3,) if quick else (2,)
    return Case(
        "Layers of a transformer of 12 on MNIST's rows",
        model,
        *splits,
        counts,
        lambda parameters: torch.optim.AdamW(parameters, 1e-3, weight_decay=0.05),
        5 if quick else 100,
    )


CASES = {"resnet56": resnet56, "transformer": transformer}


def main() -> None:
    """Run the models that are named, or both."""
    options = parser(__doc__ or "")
    options.add_argument("models", nargs="*")
    options.add_argument("--criteria", nargs="*", default=[], help="these alone, as OutputChange or 'OutputChange greedy'")
    given = options.parse_args()
    torch.set_num_threads(1)
    for name in chosen(given.models, CASES, "model"):
        measure(CASES[name](given.quick), name, given.criteria, given.record)


if __name__ == "__main__":
    main()
