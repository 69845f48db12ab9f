"""PyTorch weights on disk."""

import json

import pytest
import torch
from torch import nn

from torch_parts import Small, Tied, run_training, same_state, seeded, small, state_of
from whet import torch as side
from whet.errors import ModelError, RuntimeFileError
from whet.specs import Prune, Train


def rebuilt():
    """What `module:function` names in a test."""
    return Small()


def saved(model, folder):
    return json.loads(json.dumps(side.save_model(model, folder)))


@pytest.mark.parametrize("how", ["instance", "function", "class", "text"])
def test_the_round_trip_is_exact(tmp_path, how, monkeypatch):
    model = small()
    run_training(model, Train(epochs=2, apply=[Prune(0.5)]))
    kept = saved(model, tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "my_models", type("M", (), {"rebuilt": staticmethod(rebuilt)}))
    instance = Small()
    before = state_of(instance)
    given = {"instance": instance, "function": rebuilt, "class": Small, "text": "my_models:rebuilt"}[how]
    loaded = side.load_model(tmp_path, kept, given)
    assert same_state(state_of(model), state_of(loaded)) and type(loaded) is Small and not loaded.training
    assert same_state(before, state_of(instance)) and loaded is not instance
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    model = Tied().train()
    kept = saved(model, tmp_path)
    assert kept["aliases"] == {"again.weight": "hidden.weight", "again.bias": "hidden.bias", "out.weight": "embed.weight"}
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * (88 + 64 + 8) + 500
    loaded = side.load_model(tmp_path, kept, Tied)
    assert same_state(state_of(model), state_of(loaded))
    assert loaded.out.weight is loaded.embed.weight and loaded.training


def test_views_strided_and_sixteen_bit_tensors(tmp_path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.arange(12.0).reshape(3, 4)
            self.a, self.b = nn.Parameter(whole[0]), nn.Parameter(whole[1:])
            self.t = nn.Parameter(torch.randn(4, 3).t().to(torch.bfloat16))
            self.register_buffer("steps", torch.tensor(7))
            self.register_buffer("empty", torch.zeros(0))
            self.register_buffer("nothing", torch.zeros(0))

    model = Views()
    loaded = side.load_model(tmp_path, saved(model, tmp_path), Views)
    assert same_state(state_of(model), state_of(loaded))
    assert loaded.t.dtype == torch.bfloat16


def test_the_dtype_that_was_saved_comes_back(tmp_path):
    model = small().bfloat16()
    loaded = side.load_model(tmp_path, saved(model, tmp_path), Small)
    assert loaded.conv.weight.dtype == torch.bfloat16 and loaded.bn.num_batches_tracked.dtype == torch.int64
    assert same_state(state_of(model), state_of(loaded))


def test_parametrized_modules_round_trip(tmp_path):
    def build():
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))

    model = seeded(build)
    loaded = side.load_model(tmp_path, saved(model, tmp_path), build)
    assert torch.equal(model(torch.ones(1, 4)), loaded(torch.ones(1, 4)))


@pytest.mark.parametrize(
    "given, said",
    [
        (None, r"Pass model=: an instance of torch_parts:Small"),
        (3, "must be a torch.nn.Module or a function.*got a int"),
        (lambda: "model", "returned a str"),
        (lambda x: x, "called without arguments"),
        (lambda: Small(classes=4), r"head\.weight has shape \(4, 64\), saved was \(3, 64\); head\.bias"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), r"no bn\.bias; no bn\.num_batches_tracked.*and \d+ more"),
        (lambda: Small().to("meta"), "meta device"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path, given, said):
    kept = saved(small(), tmp_path)
    with pytest.raises(ModelError, match=said):
        side.load_model(tmp_path, kept, given)


def test_missing_and_damaged_files(tmp_path):
    kept = saved(small(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RuntimeFileError, match="Cannot read the weights"):
        side.load_model(tmp_path, kept, Small)
    path.unlink()
    with pytest.raises(RuntimeFileError, match="Cannot read the weights"):
        side.load_model(tmp_path, kept, Small)


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(ModelError, match=r"_extra_state.*is a dict"):
        side.save_model(Extra(2, 2), tmp_path)
