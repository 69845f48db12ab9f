"""The models of `distillation.py`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from distillation_data import LENGTH
from torch import nn


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    """torch's transformer layers over words; the mean of the real positions is classified."""

    def __init__(self, words: int, width: int, heads: int, layers: int, classes: int = 77) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.2, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.drop, self.head = nn.LayerNorm(width), nn.Dropout(0.2), nn.Linear(width, classes)

    def forward(self, ids: Any, attention_mask: Any) -> Any:
        """Logits (n, classes)."""
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        real = attention_mask[..., None].to(x.dtype)
        return self.head(self.drop(self.norm((x * real).sum(1) / real.sum(1))))
