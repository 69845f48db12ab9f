"""scikit-learn's 1,797 handwritten 8x8 digits, split once and for all: 997 to train, 400 to decide, 400 to report."""

from __future__ import annotations

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


SHIFTS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
