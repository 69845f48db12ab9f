"""What `inspect` counts in PyTorch models."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from torch_parts import Tied, same_state, small, state_of
from whet import torch as side
from whet.errors import DataError, ModelError


def zeros(*shape):
    return np.zeros(shape, np.float32)


def rows_of(model, example):
    return {row.name: row for row in side.inspect(model, example).rows}


def test_layers_shapes_parameters_macs_and_bytes_by_hand():
    summary = side.inspect(small(), zeros(2, 1, 6, 6))
    found = [(r.name, r.kind, r.output_shape, r.parameters, r.macs, r.bytes) for r in summary.rows]
    assert found == [
        ("conv", "Conv2d", (None, 4, 4, 4), 40, 4 * 16 * 9, 160),
        ("bn", "BatchNorm2d", (None, 4, 4, 4), 8, 0, 32),
        ("drop", "Dropout", (None, 64), 0, 0, 0),
        ("head", "Linear", (None, 3), 195, 192, 780),
    ]
    assert summary.parameters == sum(p.numel() for p in small().parameters()) and summary.never_run == ()


LAYERS = {
    "grouped convolution": (lambda: nn.Conv2d(4, 8, 3, groups=2), zeros(3, 4, 6, 6), 16 * 8 * 2 * 9),
    "transposed convolution": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), zeros(2, 2, 4, 4), 16 * 2 * 3 * 4),
    "1-d convolution": (lambda: nn.Conv1d(2, 5, 3, padding=1), zeros(2, 2, 7), 7 * 5 * 2 * 3),
    "linear on a sequence": (lambda: nn.Linear(4, 6), zeros(2, 5, 4), 5 * 4 * 6),
    "lstm": (lambda: nn.LSTM(3, 4, batch_first=True), zeros(2, 5, 3), 5 * 4 * 4 * (3 + 4)),
    "bidirectional gru": (lambda: nn.GRU(3, 4, batch_first=True, bidirectional=True), zeros(2, 5, 3), 5 * 2 * 3 * 4 * (3 + 4)),
    "batch norm": (lambda: nn.BatchNorm1d(4), zeros(2, 4), 0),
}


@pytest.mark.parametrize("case", LAYERS)
def test_macs_of_one_example(case):
    build, example, macs = LAYERS[case]
    assert side.inspect(build(), example).macs == macs
    assert side.inspect(build().train(), np.concatenate([example, example])).macs == macs


@pytest.mark.parametrize("train", [True, False])
def test_attention_is_counted_however_it_is_computed(train):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train(train)
    attention = 3 * 5 * 8 * 8 + 2 * 5 * 5 * 8 + 5 * 8 * 8
    found = rows_of(layer, zeros(2, 5, 8))
    assert found["self_attn"].macs == attention and found["linear1"].macs == 5 * 8 * 16
    assert layer.training is train and torch.backends.mha.get_fastpath_enabled() and torch.backends.mkldnn.is_available()
    assert found["self_attn.out_proj"].parameters == 72


class Odd(nn.Module):
    """A bare parameter in F.linear, a layer called twice, one never reached, one only indexed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 4))
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 7)
        self.stages = nn.ModuleList([nn.Linear(5, 2), nn.Linear(5, 2)])

    def forward(self, x):
        return self.stages[0](functional.linear(self.twice(self.twice(x)), self.weight))


def test_bare_parameters_shared_and_unreached_layers():
    model = Odd()
    summary = side.inspect(model, zeros(3, 4))
    found = {row.name: row for row in summary.rows}
    assert found["Odd"].macs == 20 and found["Odd"].parameters == 20
    assert found["twice"].macs == 32 and found["twice"].parameters == 20
    assert summary.never_run == ("never", "stages.1")
    assert summary.parameters == sum(p.numel() for p in model.parameters())
    assert "never run by the example: never" in str(summary)


def test_tied_weights_count_once_and_integers_pass():
    model = Tied()
    summary = side.inspect(model, np.ones((2, 5), np.int64))
    assert summary.parameters == sum(p.numel() for p in model.parameters()) == 88 + 72
    assert summary.macs == 5 * (2 * 64 + 88)


def test_the_model_is_left_as_it_was():
    model = small().train()
    before = state_of(model)
    side.inspect(model, zeros(2, 1, 6, 6))
    assert same_state(before, state_of(model)) and all(m.training for m in model.modules())
    with pytest.raises(DataError, match="Small failed on inputs"):
        side.inspect(model, zeros(2, 3, 6, 6))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_bad_arguments():
    with pytest.raises(ModelError, match="needs example="):
        side.inspect(small(), None)
    with pytest.raises(ModelError, match=r"needs a torch\.nn\.Module"):
        side.inspect("model", zeros(1))


def test_bytes_follow_the_dtype():
    assert rows_of(small().bfloat16(), zeros(2, 1, 6, 6))["conv"].bytes == 80
