"""The modules of `zoo_torch`: each awkward in one way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Demo(nn.Module):
    """The CNN of the classic guides, for 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 10, 3), nn.Conv2d(10, 20, 3)
        self.fc1, self.fc2 = nn.Linear(320, 50), nn.Linear(50, 10)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class Residual(nn.Module):
    """Batch norm, an in-place add and an option-A shortcut (slicing and padding)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)))))
        y += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.fc(F.avg_pool2d(F.relu(y), 4).flatten(1))


class Concat(nn.Module):
    """The same tensor twice, and branches of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 10, 1), nn.Conv2d(22, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        a, b = F.relu(self.a(x)), self.b(x)
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.c(torch.cat([a, a, b], 1))), 1).flatten(1))


class Depthwise(nn.Module):
    """Depthwise convolutions with multipliers 1 and 2, ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dw = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn, self.wide = nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.point, self.fc = nn.Conv2d(16, 12, 1), nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu6(self.bn(self.dw(F.relu6(self.stem(x)))))
        x = F.max_pool2d(F.relu6(self.point(F.relu6(self.wide(x)))), 2)
        return self.fc(F.avg_pool2d(x, 4).flatten(1))


class Grouped(nn.Module):
    """A grouped convolution and a group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.norm, self.fc = nn.GroupNorm(8, 24), nn.Linear(24, 4)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.grouped(F.relu(self.stem(x))))).mean((2, 3)))


class Shuffle(nn.Module):
    """A channel shuffle between two grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.b(x)), 1).flatten(1))


class Permute(nn.Module):
    """NHWC order before flattening into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6 * 36, 5)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).permute(0, 2, 3, 1).flatten(1))


class PixelShuffle(nn.Module):
    """Sub-pixel upsampling and a gate that splits the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x):
        x = F.relu(F.pixel_shuffle(self.a(x), 2))
        value, gate = self.b(x).chunk(2, 1)
        return value * torch.sigmoid(gate)


class Decoder(nn.Module):
    """A linear layer viewed as an image, then a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.up, self.out = nn.Linear(6, 8 * 9), nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, z):
        return self.out(F.relu(self.up(F.relu(self.fc(z)).view(-1, 8, 3, 3))))


class FusedQkv(nn.Module):
    """Attention with one projection for query, key and value, taken apart by `unbind`."""

    def __init__(self, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.qkv, self.proj, self.head = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, 5)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c)
        return self.head((x + self.proj(y)).mean(1))


class GroupedQuery(nn.Module):
    """Grouped-query attention: fewer heads for keys and values."""

    def __init__(self, dim: int = 16, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, dim // heads
        self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, kv_heads * self.size)
        self.v, self.o = nn.Linear(dim, kv_heads * self.size), nn.Linear(dim, 5)

    def forward(self, x):
        n, t, c = x.shape
        q = self.q(x).view(n, t, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(n, t, self.kv_heads, self.size).transpose(1, 2).repeat_interleave(self.heads // self.kv_heads, 1)
        v = self.v(x).view(n, t, self.kv_heads, self.size).transpose(1, 2).repeat_interleave(self.heads // self.kv_heads, 1)
        weights = torch.softmax(q @ k.transpose(-1, -2) / self.size**0.5, -1)
        return self.o((weights @ v).transpose(1, 2).reshape(n, t, c))


class Attention(nn.Module):
    """PyTorch's own multi-head attention between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.attn, self.out = nn.Linear(6, 16), nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.inp(x))
        return self.out(x + self.attn(x, x, x, need_weights=False)[0])


class Twice(nn.Module):
    """One convolution run twice, on values of different ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.shared(x))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.shared(3 * x)), 1).flatten(1))


class Siamese(nn.Module):
    """Two inputs through one branch; the outputs are a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.head = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8)), nn.Linear(8, 2)

    def forward(self, *, left, right):
        a, b = self.branch(left), self.branch(right)
        return {"logits": self.head(a + b), "embeddings": (a, b)}


class Functional(nn.Module):
    """Functions called with the model's own parameters: convolution, linear, addmm, matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.randn(6, 3, 3, 3) * 0.2), nn.Parameter(torch.randn(6) * 0.1)
        self.w1, self.b1 = nn.Parameter(torch.randn(6, 8) * 0.3), nn.Parameter(torch.randn(8) * 0.1)
        self.w2 = nn.Parameter(torch.randn(8, 4) * 0.3)

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.kernel, self.bias, padding=1))
        x = F.relu(torch.addmm(self.b1, F.avg_pool2d(x, 8).flatten(1), self.w1))
        return x @ self.w2


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 20, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(F.relu(self.mid(self.emb(ids))))


class Branching(nn.Module):
    """Data-dependent control flow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.high, self.low = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        y = F.relu(self.stem(x))
        return self.high(y) if x.mean() > 0 else self.low(y)


class Recurrent(nn.Module):
    """A stacked bidirectional LSTM and a GRU between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.gru, self.fc = nn.GRU(16, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.gru(self.lstm(x)[0])[0][:, -1])
