"""Small residual networks in each framework, of equal structure and of equal weights where asked."""

from __future__ import annotations

from typing import Any

import numpy as np

CLASSES = 4


def images(n: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`n` images, channels last, and their classes."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 8, 8, 3)).astype(np.float32), rng.integers(0, CLASSES, n)


def torch_resnet(width: int = 8) -> Any:
    """A stem, two blocks of `width`, a strided one with a convolution in its shortcut, one of twice the width, a head."""
    import torch
    from torch import nn

    class Residual(nn.Module):
        def __init__(self, given: int, made: int, stride: int = 1) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(given, made, 3, stride, 1, bias=False)
            self.norm1 = nn.BatchNorm2d(made)
            self.conv2 = nn.Conv2d(made, made, 3, 1, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(made)
            self.down = nn.Identity() if stride == 1 else nn.Conv2d(given, made, 1, stride)

        def forward(self, x: Any) -> Any:
            y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
            y += self.down(x)
            return torch.relu(y)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, width, 3, 1, 1)
            self.first = nn.Sequential(Residual(width, width), Residual(width, width))
            self.second = nn.Sequential(Residual(width, 2 * width, 2), Residual(2 * width, 2 * width))
            self.head = nn.Linear(2 * width, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.head(self.second(self.first(torch.relu(self.stem(x)))).mean((2, 3)))

    torch.manual_seed(0)
    return Net().eval()


TORCH_BLOCKS = ("first.0", "first.1", "second.1")
KERAS_BLOCKS = ("add_a", "add_b", "add_d")  # add_c's shortcut computes


def keras_resnet(width: int = 8) -> Any:
    """The same in Keras, channels last."""
    import keras
    from keras import layers

    def residual(x: Any, made: int, name: str, stride: int = 1) -> Any:
        y = layers.Conv2D(made, 3, stride, padding="valid", use_bias=False)(layers.ZeroPadding2D(1)(x))  # as PyTorch pads
        y = layers.ReLU()(layers.BatchNormalization(epsilon=1e-5)(y))
        y = layers.BatchNormalization(epsilon=1e-5)(layers.Conv2D(made, 3, padding="same", use_bias=False)(y))
        x = x if stride == 1 else layers.Conv2D(made, 1, stride)(x)
        return layers.ReLU()(layers.Add(name=f"add_{name}")([y, x]))

    keras.utils.set_random_seed(0)
    given = keras.Input((8, 8, 3))
    x = layers.ReLU()(layers.Conv2D(width, 3, padding="same")(given))
    x = residual(residual(x, width, "a"), width, "b")
    x = residual(residual(x, 2 * width, "c", stride=2), 2 * width, "d")
    return keras.Model(given, layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x)))


def build(framework: str, width: int = 8) -> Any:
    """The network of a framework."""
    return torch_resnet(width) if framework == "torch" else keras_resnet(width)


def data_of(framework: str, n: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images in the framework's layout."""
    x, y = images(n, seed)
    return (np.ascontiguousarray(x.transpose(0, 3, 1, 2)), y) if framework == "torch" else (x, y)
