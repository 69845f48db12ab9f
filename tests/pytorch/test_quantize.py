"""Quantization of PyTorch models: what is rounded, what stays float and why, and what the simulation computes."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from whet.data import Batches
from whet.errors import DataError, ModelError
from whet.specs import TARGETS, Float, Int, PerTensor, Quantize
from whet.torch import convert, predict, quantize, simulate
from zoo_torch import CASES, Branching, normal

ORT = TARGETS["onnxruntime"]


def solve(model, inputs, spec=None, **options):
    given = {"calibration": Batches(inputs), "example": inputs, "progress": False} | options
    return quantize(model, spec or Quantize(), ORT, **given)


def leaves(value):
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, tuple) else [value]


def sqnr(reference, got):
    return 10 * np.log10(np.sum(reference**2) / max(np.sum((reference - got) ** 2), 1e-30))


def on_lattice(array, params):
    """How far an array is from the lattice of a quantizer, in steps."""
    steps = np.asarray(array, np.float64) / np.float64(params.scale)
    return np.abs(steps - np.round(steps)).max()


@pytest.mark.parametrize("name", CASES)
def test_simulation_is_near_the_model_and_conversion_equals_it(name):
    model, inputs = CASES[name]()
    before = copy.deepcopy(model.state_dict())
    plan, step = solve(model, inputs)
    simulated, converted = simulate(model, plan), convert(model, plan)
    reference, rounded, stored = (leaves(predict(each, inputs)) for each in (model, simulated, converted))
    for a, b, c in zip(reference, rounded, stored, strict=True):
        assert not np.array_equal(a, b)
        assert sqnr(a, b) > 28
        assert np.array_equal(b, c)
    assert {row["name"] for row in step.changed} == set(plan.weights)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), f"{key} of the model handed in was changed"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", CASES)
def test_conversion_stores_integers(name):
    model, inputs = CASES[name]()
    plan, _ = solve(model, inputs)
    stored = convert(model, plan).state_dict()
    for weight in plan.weights:
        assert stored[weight].dtype == torch.int8
        assert stored[weight].abs().max() <= 127
    for bias in plan.biases:
        assert stored[bias].dtype == torch.int32


def test_the_demo_rounds_every_value_between_layers():
    model, inputs = CASES["demo"]()
    plan, step = solve(model, inputs)
    assert set(plan.values) == {"input:0", "/relu:0", "/relu:1", "/flatten:0", "/relu:2", "fc2/linear:0"}
    assert plan.values["/flatten:0"].scale == plan.values["/relu:1"].scale
    assert plan.biases["fc1.bias"] == ("/flatten:0", "fc1.weight")
    assert step.skipped == () and step.unmatched == ()
    outputs = predict(simulate(model, plan), inputs)
    assert on_lattice(outputs, plan.values["fc2/linear:0"]) < 1e-3


def test_ranges_are_those_of_the_calibration_data():
    model, inputs = CASES["demo"]()
    plan, _ = solve(model, inputs, calibration=Batches([inputs[:8], 2 * inputs[8:]]))
    low, high = min(inputs[:8].min(), 2 * inputs[8:].min()), max(inputs[:8].max(), 2 * inputs[8:].max())
    assert plan.values["input:0"].scale == pytest.approx((high - low) / 255, rel=1e-6)


def test_biases_lie_on_the_product_of_scales():
    model, inputs = CASES["demo"]()
    plan, _ = solve(model, inputs)
    simulated = simulate(model, plan)
    scale = plan.values["input:0"].scale * plan.weights["conv1.weight"].scale
    bias = simulated.conv1.bias.detach().numpy()
    assert np.array_equal(bias, np.round(bias / scale).astype(np.float32) * scale)
    assert not np.array_equal(bias, model.conv1.bias.detach().numpy())


def test_batch_norms_are_folded_where_they_alone_read_the_convolution():
    model, inputs = CASES["residual"]()
    plan, _ = solve(model, inputs)
    assert dict(plan.folds) == {"bn1": "conv1", "bn2": "conv2", "bn3": "conv3"}
    folded = simulate(model, plan)
    assert folded.conv1.bias is not None and model.conv1.bias is None
    assert "bn1/batch_norm:0" not in plan.values


def test_folding_alone_changes_nothing():
    model, inputs = CASES["residual"]()
    plan, _ = solve(model, inputs, Quantize(Int(16), None))
    assert sqnr(predict(model, inputs), predict(simulate(model, plan), inputs)) > 70


class TwoReaders(nn.Module):
    """A batch norm that is not the only reader of its convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        y = self.conv(x)
        return self.out(self.bn(y) + y)


class SometimesNormed(nn.Module):
    """A batch norm that control flow passes over for some batches."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        y = self.conv(x)
        return self.out(self.bn(y) if x.mean() > 0 else y)


def test_a_shared_convolution_output_is_not_folded():
    torch.manual_seed(0)
    model, inputs = TwoReaders().eval(), normal(8, 3, 8, 8)
    plan, step = solve(model, inputs)
    assert plan.folds == ()
    assert {"name": "bn", "reason": "operation 'batch_norm' is not quantized on onnxruntime"} in step.skipped
    assert sqnr(predict(model, inputs), predict(simulate(model, plan), inputs)) > 28


def test_a_batch_norm_passed_over_by_some_batches_is_not_folded():
    torch.manual_seed(0)
    model, up = SometimesNormed().eval(), np.abs(normal(8, 3, 8, 8))
    plan, _ = solve(model, up, calibration=Batches([up, -up]))
    assert plan.folds == ()
    for inputs in (up, -up):
        assert sqnr(predict(model, inputs), predict(simulate(model, plan), inputs)) > 28


def test_a_branch_that_breaks_a_fold_is_an_error_not_a_wrong_number():
    torch.manual_seed(0)
    model, up = SometimesNormed().eval(), np.abs(normal(8, 3, 8, 8))
    plan, _ = solve(model, up)
    assert dict(plan.folds) == {"bn": "conv"}
    with pytest.raises(ModelError, match="took a branch that calibration never saw"):
        predict(simulate(model, plan), -up)


def test_a_shared_layer_is_rounded_once_and_each_call_has_its_value():
    model, inputs = CASES["twice"]()
    plan, step = solve(model, inputs)
    assert [row["name"] for row in step.changed].count("shared.weight") == 1
    value, weight = plan.biases["shared.bias"]
    assert weight == "shared.weight"
    both = [name for name in plan.values if name in (value, "/mul:0", "/relu:0")]
    assert len(both) >= 2 and len({float(plan.values[name].scale) for name in both}) == 1


def test_functions_with_the_models_own_parameters():
    model, inputs = CASES["functional"]()
    plan, step = solve(model, inputs, Quantize(overrides={"w1": Int(6)}))
    assert set(plan.weights) == {"kernel", "w1", "w2"} and set(plan.biases) == {"bias", "b1"}
    assert plan.weights["kernel"].axis == 0 and plan.weights["w1"].axis == 1  # addmm takes (in, out)
    assert plan.weights["w1"].spec.bits == 6
    assert next(row for row in step.changed if row["name"] == "w1")["stored"] == "int8"


def test_a_tied_weight_stays_tied():
    model, inputs = CASES["tied"]()
    plan, _ = solve(model, inputs)
    simulated, converted = simulate(model, plan), convert(model, plan)
    assert simulated.emb.weight is simulated.head.weight
    assert converted.emb.weight is converted.head.weight and converted.emb.weight.dtype == torch.int8


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("recurrent", "lstm", "operation 'lstm' is not quantized"),
        ("recurrent", "gru", "operation 'gru' is not quantized"),
        ("attention", "attn", "operation 'attention' is not quantized"),
        ("fused_qkv", "norm", "layer_norm"),
        ("weight_norm", "0", "computed"),
        ("branching", "unused", "never run"),
        ("decoder", "up", "conv_transpose"),
    ],
)
def test_what_stays_float_is_listed_with_its_reason(name, layer, reason):
    model, inputs = CASES[name]()
    plan, step = solve(model, inputs)
    assert any(row["name"] == layer and reason in row["reason"] for row in step.skipped), step.skipped
    assert not any(weight.startswith(f"{layer}.") for weight in plan.weights)


def test_keep_include_and_unmatched_patterns():
    model, inputs = CASES["demo"]()
    plan, step = solve(model, inputs, Quantize(keep=("fc*", "nothing"), include=("conv2", "fc1")))
    assert set(plan.weights) == {"conv2.weight"}
    assert {row["name"]: row["reason"] for row in step.skipped} == {
        "conv1": "not in include",
        "fc1": "in keep",
        "fc2": "not in include",
    }
    assert step.unmatched == ("nothing",)


def test_zero_change_is_an_error():
    model, inputs = CASES["demo"]()
    with pytest.raises(ModelError, match="would change nothing"):
        solve(model, inputs, Quantize(keep=("*",)))
    with pytest.raises(ModelError, match="operation 'layer_norm' is not quantized"):
        solve(nn.Sequential(nn.LayerNorm(4)).eval(), normal(4, 4), Quantize(keep=()))


def test_activations_need_calibration_data():
    model, inputs = CASES["demo"]()
    with pytest.raises(DataError, match="needs calibration data"):
        solve(model, inputs, calibration=None)
    plan, _ = solve(model, inputs, Quantize(activations=None), calibration=None)
    assert plan.values == {} and plan.biases == {} and len(plan.weights) == 4


def test_calibration_that_never_reaches_a_layer():
    torch.manual_seed(1)
    model = Branching().eval()
    up = np.abs(normal(8, 6))
    with pytest.raises(DataError, match="No calibration data reached"):
        solve(model, -up, example=up)
    plan, _ = solve(model, up, calibration=Batches([up, -up]))
    assert {"high.weight", "low.weight"} <= set(plan.weights)


def test_activations_that_are_not_finite():
    class Divides(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(self.a(x) / (x[:, :1] * 0))

    with pytest.raises(DataError, match="not finite"):
        solve(Divides().eval(), normal(4, 4))


def test_inputs_are_rounded_by_position_and_keyword():
    model, inputs = CASES["siamese"]()
    plan, _ = solve(model, inputs)
    assert {"input:0", "input:1"} <= set(plan.values)
    # one branch serves both inputs, and its bias is stored once: they share one range
    assert plan.values["input:0"].scale == plan.values["input:1"].scale
    outputs = predict(simulate(model, plan), inputs)
    assert list(outputs) == ["logits", "embeddings"] and len(outputs["embeddings"]) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_dtype(dtype):
    model, inputs = CASES["residual"]()
    half = copy.deepcopy(model).to(dtype)
    plan, _ = solve(half, inputs)
    full, _ = solve(model, inputs)
    assert plan.values["input:0"].scale.dtype == np.float32
    assert plan.values["/relu:0"].scale == pytest.approx(full.values["/relu:0"].scale, rel=0.05)
    simulated = simulate(half, plan)
    assert {p.dtype for p in simulated.parameters()} == {dtype}
    assert sqnr(predict(half, inputs), predict(simulated, inputs)) > 20
    assert sqnr(predict(simulated, inputs), predict(convert(half, plan), inputs)) > 20


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_casting_weights(dtype):
    model, inputs = CASES["demo"]()
    plan, step = solve(model, inputs, Quantize(Float(dtype), None), calibration=None)
    assert plan.casts == dict.fromkeys(("conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"), dtype)
    assert step.changed[0].items() >= {"name": "conv1.weight", "scheme": dtype, "bits": 16}.items()
    simulated, converted = simulate(model, plan), convert(model, plan)
    kind = getattr(torch, dtype)
    assert torch.equal(simulated.fc1.weight, model.fc1.weight.to(kind).float())
    assert converted.fc1.weight.dtype == kind
    assert np.array_equal(predict(simulated, inputs), predict(converted, inputs))


def test_symmetric_activations_have_zero_point_zero():
    model, inputs = CASES["demo"]()
    plan, _ = solve(model, inputs, Quantize(activations=Int(8, symmetric=True, granularity=PerTensor())))
    assert all(int(params.zero_point) == 0 for params in plan.values.values())
    assert sqnr(predict(model, inputs), predict(simulate(model, plan), inputs)) > 28


def test_a_plan_of_another_model_is_refused():
    model, inputs = CASES["demo"]()
    plan, _ = solve(model, inputs)
    other, _ = CASES["siamese"]()
    with pytest.raises(ModelError, match="another model"):
        simulate(other, plan)
    with pytest.raises(ModelError, match="another model"):
        convert(other, plan)


def test_gradients_go_straight_through_where_nothing_was_clipped():
    model, inputs = CASES["demo"]()
    plan, _ = solve(model, inputs)
    simulated = simulate(model, plan)
    x = torch.from_numpy(inputs.copy()).requires_grad_()
    simulated(x).sum().backward()
    y = torch.from_numpy(inputs.copy()).requires_grad_()
    model(y).sum().backward()
    assert torch.nn.functional.cosine_similarity(x.grad.flatten(), y.grad.flatten(), dim=0) > 0.97
