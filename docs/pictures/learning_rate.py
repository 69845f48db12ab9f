"""Draws learning-rate.svg of docs/training.md, a search on the model of that page: python docs/pictures/learning_rate.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

import whet


def main() -> None:
    """Search, and write the picture beside this file."""
    torch.manual_seed(16)
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    x = np.random.default_rng(0).normal(size=(192, 20)).astype(np.float32)
    train = [(x[i : i + 32], x[i : i + 32, :4].argmax(1)) for i in range(0, 192, 32)]
    found = whet.learning_rate(model, train, high=10.0, progress=False)
    found.plot(Path(__file__).parent / "learning-rate.svg", overwrite=True)
    print(found)


if __name__ == "__main__":
    main()
