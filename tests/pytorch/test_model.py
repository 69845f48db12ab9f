"""Checking, copying and running PyTorch models."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from torch_parts import Small, Tied, same_state, seeded, small, state_of
from whet import torch as side
from whet.errors import DataError, ModelError

X = np.linspace(-1, 1, 4 * 36, dtype=np.float32).reshape(4, 1, 6, 6)


def broken(name, index, value):
    model = small()
    with torch.no_grad():
        dict((*model.named_parameters(), *model.named_buffers()))[name][index] = value
    return model


class Masked(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("bias_mask", torch.tensor([0.0, value]))


class Stubbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant = torch.ao.quantization.QuantStub()
        self.layer = nn.Linear(2, 2)
        self.sum = nn.quantized.FloatFunctional() if hasattr(nn, "quantized") else torch.ao.nn.quantized.FloatFunctional()


class Prepared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.observer = torch.ao.quantization.MinMaxObserver()


REFUSED = {
    "nan weight": (
        lambda: broken("conv.weight", (3, 0, 1, 2), float("nan")),
        r"conv\.weight holds nan at index \(3, 0, 1, 2\) \(1 of 36",
    ),
    "inf bias": (lambda: broken("head.bias", (1,), -float("inf")), r"head\.bias holds -inf at index \(1,\)"),
    "inf variance": (lambda: broken("bn.running_var", (2,), float("inf")), r"bn\.running_var holds inf"),
    "nan buffer": (lambda: Masked(float("nan")), "bias_mask holds nan"),
    "no parameters": (lambda: nn.Sequential(nn.ReLU()), "no floating-point parameters"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "weight is on the meta device"),
    "lazy": (lambda: nn.LazyLinear(3), "lazy"),
    "data parallel": (lambda: nn.DataParallel(small()), r"model\.module"),
    "scripted": (lambda: torch.jit.script(nn.Linear(2, 2)), "TorchScript"),
    "compiled": (lambda: torch.compile(nn.Linear(2, 2)), "_orig_mod"),
    "quantized": (
        lambda: nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(2, 2), nn.Linear(2, 2)),
        "0 is a torch.ao.*quantized already",
    ),
    "prepared": (Prepared, "observer is a torch.ao.quantization"),
    "not a module": (lambda: "model", "must be a torch.nn.Module"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_validate_names_what_is_wrong(case):
    build, said = REFUSED[case]
    with pytest.raises(ModelError, match=said):
        side.validate(build())


@pytest.mark.parametrize("build", [small, Tied, lambda: Masked(-float("inf")), Stubbed, lambda: small().bfloat16()])
def test_validate_takes_ordinary_models(build):
    model = build()
    before = state_of(model)
    side.validate(model)
    assert same_state(before, state_of(model))


def test_a_copy_is_independent_and_keeps_ties_flags_and_modes():
    model = Tied()
    model.hidden.requires_grad_(False)
    model.out.eval()
    made = side.copy(model)
    assert made.out.weight is made.embed.weight and made.again is made.hidden
    assert made.out.weight is not model.out.weight
    assert not made.hidden.weight.requires_grad and not made.out.training and made.hidden.training
    before = state_of(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 1
    assert same_state(before, state_of(model))


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_old_weight_norm_can_be_copied_after_it_ran():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)))
    x = torch.ones(2, 4)
    model(x).sum().backward()
    made = side.copy(model)
    assert torch.equal(made(x), model(x))


def test_a_model_that_cannot_be_copied_is_named():
    model = small()
    model.source = (i for i in range(3))
    with pytest.raises(ModelError, match=r"Small cannot be copied \(TypeError.*generator"):
        side.copy(model)


def test_predict_is_in_inference_mode_and_restores_every_mode():
    model = small(dropout=0.9).train()
    model.bn.eval()
    before = state_of(model)
    first, second = side.predict(model, X), side.predict(model, X)
    assert first.shape == (4, 3) and first.dtype == np.float32
    np.testing.assert_array_equal(first, second)
    assert model.training and model.drop.training and not model.bn.training
    assert same_state(before, state_of(model))


def test_modes_come_back_after_an_error():
    model = small().train()
    with pytest.raises(DataError, match=r"Small failed on inputs \(4, 2, 6, 6\) float32: RuntimeError"):
        side.predict(model, X.repeat(2, axis=1))
    assert all(module.training for module in model.modules())


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple
    cache: object = None


class Structured(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layer = nn.Linear(36, 2)
        self.make = make

    def forward(self, x, scale=None, *, shift=0.0):
        y = self.layer(x.flatten(1))
        y = y if scale is None else y * scale
        return self.make(y + shift)


def test_outputs_keep_their_structure():
    y = side.predict(seeded(lambda: Structured(lambda y: y)), X)
    for make, expected in {
        "dict": (lambda y: {"a": y, "b": (y, None)}, {"a": y, "b": (y,)}),
        "tuple": (lambda y: (y, [y, y]), (y, (y, y))),
        "dataclass": (lambda y: Output(y, (y,), object()), {"logits": y, "hidden": (y,)}),
    }.values():
        found = side.predict(seeded(lambda make=make: Structured(make)), X)
        assert type(found) is type(expected)
        flat, wanted = torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected)
        assert len(flat) == len(wanted) and all(np.array_equal(a, b) for a, b in zip(flat, wanted, strict=True))


def test_inputs_go_by_position_or_by_name():
    model = seeded(lambda: Structured(lambda y: y))
    plain = side.predict(model, X)
    scale = np.full((4, 1), 2, np.float32)
    np.testing.assert_allclose(side.predict(model, (X, scale)), plain * 2, rtol=1e-6)
    named = side.predict(model, {"x": X, "shift": np.float32(1).reshape(1, 1)})
    np.testing.assert_allclose(named, plain + 1, rtol=1e-6)


def test_a_model_without_tensor_outputs_is_named():
    with pytest.raises(ModelError, match="returned no tensor"):
        side.predict(Structured(lambda y: [3.0]), X)


def test_floating_inputs_take_the_models_dtype_and_integers_stay():
    low = side.predict(small().bfloat16(), X)
    assert low.dtype == np.float32
    np.testing.assert_allclose(low, side.predict(small(), X), atol=0.05)
    ids = np.array([[1, 2], [3, 4]])
    assert side.predict(Tied(), ids).shape == (2, 2, 11)
    assert side.predict(Tied().double(), ids).dtype == np.float64


def test_a_forward_that_works_in_place_does_not_reach_the_users_data():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(36, 2)

        def forward(self, x):
            return self.layer(x.add_(1).flatten(1))

    x = X.copy()
    x.flags.writeable = False
    side.predict(InPlace(), x)
    np.testing.assert_array_equal(x, X)
    tensor = torch.from_numpy(X.copy())
    side.predict(InPlace(), tensor)
    np.testing.assert_array_equal(tensor.numpy(), X)
    assert side.predict(Small(), X[:, :, ::-1]).shape == (4, 3)
