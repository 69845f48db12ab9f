"""The data of `distillation.py`, found where the other benchmarks find theirs: nothing of it is part of the project."""

from __future__ import annotations

import csv
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = 32  # words of a question; the rest is left out


def folder(name: str) -> Path:
    """The folder of a data set; the program ends with a sentence where it is missing."""
    root = Path(os.environ.get("WHET_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (root / name).is_dir():
        sys.exit(f"This benchmark needs the folder {name}, which is not in {root}. Set WHET_DATA to the folder that has it.")
    return root / name


def mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 784) in [0, 1] and labels."""
    stored = np.load(folder("mnist") / f"mnist_{split}.npz")
    return (stored["x"].reshape(-1, 784) / 255).astype(np.float32), stored["y"].astype(np.int64)


def banking() -> tuple[Any, Any, int]:
    """Train and test as ({"ids", "attention_mask"}, labels), and the number of words; 0 is padding, 1 an unknown word."""
    texts: dict[str, list[list[str]]] = {}
    labels: dict[str, list[str]] = {}
    for split in ("train", "test"):
        with (folder("banking77") / f"{split}.csv").open(encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        texts[split] = [re.findall(r"[a-z0-9']+", row["text"].lower())[:LENGTH] for row in rows]
        labels[split] = [row["category"] for row in rows]
    counts = Counter(word for text in texts["train"] for word in text)
    ids = {word: i + 2 for i, word in enumerate(word for word, count in counts.most_common() if count > 1)}
    classes = {name: i for i, name in enumerate(sorted(set(labels["train"])))}
    found = []
    for split in ("train", "test"):
        array = np.zeros((len(texts[split]), LENGTH), np.int64)
        for row, text in zip(array, texts[split], strict=True):
            row[: len(text)] = [ids.get(word, 1) for word in text]
        inputs = {"ids": array, "attention_mask": (array > 0).astype(np.int64)}
        found.append((inputs, np.asarray([classes[name] for name in labels[split]], np.int64)))
    return found[0], found[1], len(ids) + 2


class Shifts:
    """Batches of MNIST's images, shifted by up to a pixel, anew in every epoch; without labels where `y` is None."""

    def __init__(self, x: np.ndarray, y: np.ndarray | None, batch: int, seed: int) -> None:
        self.x, self.y, self.batch, self.rng = x.reshape(-1, 28, 28), y, batch, np.random.default_rng(seed)

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch)

    def __iter__(self) -> Iterator[Any]:
        order = self.rng.permutation(len(self.x))
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            padded = np.pad(self.x[rows], ((0, 0), (1, 1), (1, 1)))
            down, right = self.rng.integers(0, 3, (2, len(rows), 1)) + np.arange(28)
            made = padded[np.arange(len(rows))[:, None, None], down[:, :, None], right[:, None, :]].reshape(-1, 784)
            yield made if self.y is None else (made, self.y[rows])


class Views:
    """Batches of (images, labels) of CIFAR-10, shifted and flipped as the image's index and the number of the view say.

    An epoch shows one view of every image, the next one the next, shuffled; with `at` None all views, in order, for a teacher.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, batch: int, views: int, at: int | None) -> None:
        self.x, self.y, self.batch, self.views, self.epoch = x, y, batch, views, 0
        self.changes = np.random.default_rng(0).integers(0, (9, 9, 2), (views, len(x), 3))
        self.rng = None if at is None else np.random.default_rng(at)

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch) * (self.views if self.rng is None else 1)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        shown = range(self.views) if self.rng is None else [self.epoch % self.views]
        self.epoch += 1
        for view in shown:
            order = np.arange(len(self.x)) if self.rng is None else self.rng.permutation(len(self.x))
            for start in range(0, len(order), self.batch):
                rows = order[start : start + self.batch]
                yield self.image(rows, view), self.y[rows]

    def image(self, rows: np.ndarray, view: int) -> np.ndarray:
        """One view of some images."""
        padded, made = np.pad(self.x[rows], ((0, 0), (0, 0), (4, 4), (4, 4))), np.empty_like(self.x[rows])
        for i, (down, right, flip) in enumerate(self.changes[view, rows]):
            cut = padded[i, :, down : down + 32, right : right + 32]
            made[i] = cut[:, :, ::-1] if flip else cut
        return made
