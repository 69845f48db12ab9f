"""CIFAR-10 and its ResNets, for measuring: found at $WHET_DATA or ../shared/data, never part of the project."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def folder() -> Path:
    """The folder with the images and the weights; the program ends with a sentence where it is missing."""
    root = Path(os.environ.get("WHET_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (root / "cifar10" / "resnet20.safetensors").is_file():
        sys.exit(
            f"This benchmark needs cifar10/resnet20.safetensors and its images, which are not in {root}. Set WHET_DATA to the "
            "folder that has them."
        )
    return root / "cifar10"


def images(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` images of "train" or "test" as (n, 3, 32, 32) float32, normalized, and their labels.

    In a random order, the same every time: the files are sorted by class, and their first thousands are all of one.
    """
    stored = np.load(folder() / f"{split}_jpeg_bytes.npz")
    blob, offset, decode = stored["blob"], stored["offset"], _decoder()
    chosen = np.random.default_rng(0).permutation(len(stored["y"]))[:count]
    pixels = np.stack([decode(blob[offset[i] : offset[i + 1]].tobytes()) for i in chosen])
    scaled = (pixels / np.float32(255) - MEAN) / STD
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32), stored["y"][chosen].astype(np.int64)


def _decoder() -> Callable[[bytes], np.ndarray]:
    try:
        import io

        from PIL import Image

        return lambda data: np.asarray(Image.open(io.BytesIO(data)))
    except ImportError:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import tensorflow as tf

        return lambda data: tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE").numpy()


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters (option A of He et al. 2015)."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.stride, self.added = stride, (channels - before) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """The ResNet for CIFAR-10 with 269,722 parameters; with 9 blocks in each of its three layers ResNet-56 of 853,018."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32, 1) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64, 1) for _ in range(blocks - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(x, 8).flatten(1))


def resnet20() -> ResNet20:
    """The trained model of 20 layers: 88.07 % of the 10,000 test images."""
    return _trained("resnet20", 3)


def resnet56() -> ResNet20:
    """The trained model of 56 layers: 89.91 % of the 10,000 test images."""
    return _trained("resnet56", 9)


def _trained(name: str, blocks: int) -> ResNet20:
    from safetensors.torch import load_file

    model = ResNet20(blocks)
    missing, unexpected = model.load_state_dict(load_file(folder() / f"{name}.safetensors"), strict=False)
    if unexpected or any("num_batches_tracked" not in key for key in missing):
        sys.exit(f"{name}.safetensors does not fit the model: missing {missing}, unexpected {unexpected}.")
    return model.eval()
