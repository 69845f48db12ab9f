"""Hidden units of recurrent layers leave with all their gates, in torch's layers and in cells in a user's loop."""

import numpy as np
import pytest
import torch
from torch import nn

import whet
import zoo_torch
from torch_parts import seeded
from whet.errors import ModelError
from whet.specs import Channel, Prune
from whet.torch import inspect, predict, remove

SPEC = Prune(1 / 3, granularity=Channel(), round_to=1)


class Sequence(nn.Module):
    """A linear layer, a recurrent one, and a head on the last step."""

    def __init__(self, kind: str, **how) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(5, 8), getattr(nn, kind)(8, 12, **how)
        width = (how.get("proj_size") or 12) * (2 if how.get("bidirectional") else 1)
        self.head, self.first = nn.Linear(width, 3), how.get("batch_first", False)

    def forward(self, x):
        x = torch.relu(self.inp(x))
        y, _ = self.rec(x if self.first else x.transpose(0, 1))
        return self.head(y[:, -1] if self.first else y[-1])


class Loop(nn.Module):
    """A cell in a Python loop; its first state is made by the cell."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell, self.head = getattr(nn, kind)(5, 12), nn.Linear(12, 3)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


CASES = {
    "lstm": (lambda: Sequence("LSTM", batch_first=True), 4),
    "stacked bidirectional lstm": (lambda: Sequence("LSTM", num_layers=2, bidirectional=True), 4),
    "gru": (lambda: Sequence("GRU", num_layers=2, dropout=0.5), 3),
    "gru without biases": (lambda: Sequence("GRU", bias=False, bidirectional=True, batch_first=True), 3),
    "rnn": (lambda: Sequence("RNN"), 1),
    "lstm cell": (lambda: Loop("LSTMCell"), 4),
    "gru cell": (lambda: Loop("GRUCell"), 3),
    "rnn cell": (lambda: Loop("RNNCell"), 1),
}


GRAPHS = [("stacked bidirectional lstm", "graph"), ("gru cell", "graph")]


@pytest.mark.parametrize(("name", "rebuild"), [*((name, None) for name in CASES), *GRAPHS])
def test_a_third_of_the_hidden_units_leave(name, rebuild, tmp_path) -> None:
    build, gates = CASES[name]
    model, x = seeded(build).eval(), zoo_torch.normal(4, 6, 5)
    found = whet.groups(model, x)
    layer = "rec" if hasattr(model, "rec") else "cell"
    family = next(f for f in found.families if f.layer == layer)
    assert (len(family), family.width) == (12, gates) and found.size().macs == inspect(model, x).macs
    spec = Prune(1 / 3, granularity=Channel(), round_to=1, rebuild=rebuild)
    made = whet.prune(model, spec, example=x)
    if rebuild is None:
        assert getattr(made.model, layer).hidden_size == 8 and getattr(model, layer).hidden_size == 12
    wide = {p.shape[0] for n, p in made.model.named_parameters() if n.startswith(layer)}
    assert wide == {8 * gates}
    assert inspect(made.model, x).macs < 0.6 * inspect(model, x).macs
    made.save(tmp_path / "saved")
    np.testing.assert_array_equal(predict(whet.load(tmp_path / "saved", build).model, x), predict(made.model, x))
    if name not in ("lstm", "stacked bidirectional lstm"):
        return
    trained = whet.fit(made, whet.Train(epochs=2, learning_rate=1e-2), train=[(x, np.arange(4) % 3)], progress=False)
    history = trained.steps[-1].train["history"]
    assert history[1]["loss"] < history[0]["loss"]


def test_by_hand_an_lstm_without_the_columns_that_read_what_left() -> None:
    """Everything that reads the last four units is zero: recurrent columns of all gates, and the head's columns."""
    model, x = seeded(CASES["lstm"][0]).eval(), zoo_torch.normal(4, 6, 5)
    with torch.no_grad():
        for row in range(4):  # make units 8 to 11 the weakest
            model.rec.weight_ih_l0[12 * row + 8 : 12 * row + 12] *= 1e-3
            model.rec.weight_hh_l0[12 * row + 8 : 12 * row + 12] *= 1e-3
        model.rec.weight_hh_l0[:, 8:] *= 1e-3
        model.head.weight[:, 8:] *= 1e-3
        silent = seeded(CASES["lstm"][0]).eval()
        silent.load_state_dict(model.state_dict())
        silent.rec.weight_hh_l0[:, 8:] = 0
        silent.head.weight[:, 8:] = 0
        remove(model, Prune(1 / 3, granularity=Channel(), round_to=1, include=("rec",)), example=x)
        np.testing.assert_allclose(predict(model, x), predict(silent, x), atol=1e-6)
        kept = torch.cat([torch.arange(12 * row, 12 * row + 8) for row in range(4)])
        assert torch.equal(model.rec.weight_ih_l0, silent.rec.weight_ih_l0[kept])
    assert model.rec._flat_weights[0] is model.rec.weight_ih_l0


def test_a_projected_state_stays_and_is_named() -> None:
    model, x = seeded(lambda: Sequence("LSTM", proj_size=6)).eval(), zoo_torch.normal(4, 6, 5)
    found = whet.groups(model, x)
    assert not [f for f in found.families if f.layer == "rec"]
    reasons = {row.reason for row in found.fixed if row.tensor.startswith("rec.")}
    assert reasons == {"lstm in rec cannot be followed"}
    with pytest.raises(ModelError, match="lstm in rec cannot be followed"):
        whet.prune(model, Prune(0.3, granularity=Channel(), include=("rec",), round_to=1), example=x)
