"""Images of digits for the examples: scikit-learn's 1,797 of 8x8, split once and for all, or MNIST from a file."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Split = tuple[np.ndarray, np.ndarray]


def load() -> tuple[Split, Split, Split]:
    """(images, labels) for train, val and test: images (n, 8, 8) float32 in [0, 1], labels (n,) int64.

    The training images are there five times: as they are, and shifted by one pixel in the four directions.
    """
    digits = load_digits()
    x, y = (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)
    x_rest, x_test, y_rest, y_test = train_test_split(x, y, test_size=400, random_state=0, stratify=y)
    x_train, x_val, y_train, y_val = train_test_split(x_rest, y_rest, test_size=400, random_state=0, stratify=y_rest)
    padded = np.pad(x_train, ((0, 0), (1, 1), (1, 1)))
    shifted = [padded[:, 1 + down : 9 + down, 1 + right : 9 + right] for down, right in SHIFTS]
    return (np.concatenate(shifted), np.tile(y_train, len(SHIFTS))), (x_val, y_val), (x_test, y_test)


def large(path: str | None = None) -> tuple[Split, Split, Split]:
    """Train, val and test for networks of MNIST's size: images (n, 28, 28) float32 in [0, 1], labels (n,) int64.

    The digits of `load`, enlarged, or those of the .npz file at `path`, whose last 2 x 5,000 decide and report.
    """
    if path is None:
        (x, y), val, test = load()
        count = len(x) // len(SHIFTS)  # those that are not shifted
        return _enlarged((x[:count], y[:count])), _enlarged(val), _enlarged(test)
    with np.load(path) as file:
        x, y = (file["x"] / 255).astype(np.float32), file["y"].astype(np.int64)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    return (x[:-10000], y[:-10000]), (x[-10000:-5000], y[-10000:-5000]), (x[-5000:], y[-5000:])


def _enlarged(split: Split) -> Split:
    x, y = split
    return np.pad(np.kron(x, np.ones((1, 3, 3), np.float32)), ((0, 0), (2, 2), (2, 2))), y


def options(text: str | None, epochs: int = 20) -> argparse.Namespace:
    """What an example was called with; `text` is its docstring."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="an .npz file of images; without it scikit-learn's digits")
    parser.add_argument("--epochs", type=int, default=epochs, help="of each training (%(default)s)")
    return parser.parse_args()


def score(model: Any, test: Split) -> str:
    """The accuracy of `model` on `test` with its 95 % interval, as a line."""
    import whet

    found = whet.measure(model, test, progress=False).metric
    low, high = found["ci95"]
    return f"{100 * found['value']:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {found['n']:,} test images"


SHIFTS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
