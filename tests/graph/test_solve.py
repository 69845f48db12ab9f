"""From ranges to a plan, with numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from whet.errors import DataError, ModelError
from whet.graph.nodes import Graph, Node
from whet.graph.solve import Calibration, solve
from whet.graph.views import WeightView
from whet.graph.weights import solve_weight
from whet.numerics.affine import SCALE_FLOOR, quantize_bias
from whet.numerics.observers import Range
from whet.specs import TARGETS, Float, Int, PerTensor, Quantize

ORT, LITERT = TARGETS["onnxruntime"], TARGETS["litert"]


def layer(name: str, source: str, op: str = "linear", **kwargs: str) -> Node:
    return Node(name, op, (source,), layer=name.split("/")[0], **{"weight": f"{name}.weight", "bias": f"{name}.bias"} | kwargs)


def view(name: str, array: object, out_axis: int = 0) -> WeightView:
    return WeightView(name, name.split(".")[0], np.asarray(array, np.float32), out_axis, None)


ONE = Graph((layer("fc", "input:0"),), ("input:0",), ("fc",))
RANGES = {"input:0": Range(-1.0, 3.0, 10), "fc": Range(0.0, 2.55, 10)}
WEIGHT = [[1.27, -0.5], [0.0, 2.54]]


def test_scales_zero_points_and_codes_of_one_layer() -> None:
    solved = solve(
        Calibration(ONE, RANGES),
        {"fc.weight": view("fc.weight", WEIGHT)},
        {"fc.bias": np.zeros(2, np.float32)},
        Quantize(),
        ORT,
    )
    plan = solved.plan
    np.testing.assert_allclose(plan.weights["fc.weight"].scale, [0.01, 0.02], rtol=1e-6)
    np.testing.assert_array_equal(plan.weights["fc.weight"].encode(np.asarray(WEIGHT, np.float32)), [[127, -50], [0, 127]])
    np.testing.assert_allclose(plan.values["input:0"].scale, 4 / 255, rtol=1e-6)
    assert plan.values["input:0"].zero_point == 64  # round(1 / (4 / 255)) = round(63.75)
    np.testing.assert_allclose(plan.values["fc"].scale, 0.01, rtol=1e-6)
    assert plan.values["fc"].zero_point == 0
    assert plan.biases == {"fc.bias": ("input:0", "fc.weight")}
    assert all(
        p.scale.dtype == np.float32 and p.zero_point.dtype == np.int32 for p in (*plan.weights.values(), *plan.values.values())
    )
    (row,) = solved.changed
    assert (
        row["name"] == "fc.weight" and row["bits"] == 8 and row["scheme"] == "int8 per channel" and row["error_db"] is None
    )  # exact


def test_an_all_zero_channel_gets_room_for_its_bias() -> None:
    weights = {"fc.weight": view("fc.weight", [[0.0, 0.0], [1.0, 1.0]])}
    bias = np.asarray([5.0, 0.25], np.float32)
    plan = solve(Calibration(ONE, RANGES), weights, {"fc.bias": bias}, Quantize(), ORT).plan
    scale = plan.weights["fc.weight"].scale
    assert scale[0] > SCALE_FLOOR and scale[1] == np.float32(1 / 127)
    source = plan.values["input:0"].scale
    codes = quantize_bias(bias, source, scale)
    assert abs(codes[0]) < 2**30 + 100
    np.testing.assert_allclose(codes * (source * scale).astype(np.float64), bias, rtol=1e-3)


def test_channels_that_are_not_the_biases_have_one_scale() -> None:
    weights = {"fc.weight": view("fc.weight", np.ones((3, 3, 2, 2)), out_axis=2)}  # a depthwise multiplier of 2
    graph = Graph((layer("fc", "input:0", "conv"),), ("input:0",), ("fc",))
    plan = solve(Calibration(graph, RANGES), weights, {"fc.bias": np.zeros(4, np.float32)}, Quantize(), LITERT).plan
    assert plan.weights["fc.weight"].axis is None and plan.weights["fc.weight"].scale.shape == ()


def test_overrides_are_patterns_and_the_first_counts() -> None:
    spec = Quantize(overrides={"f*": Int(4), "fc": Int(6)})
    solved = solve(Calibration(ONE, RANGES), {"fc.weight": view("fc.weight", WEIGHT)}, {}, spec, ORT)
    assert solved.plan.weights["fc.weight"].spec.bits == 4 and solved.changed[0]["bits"] == 4


def test_patterns_that_match_nothing_are_reported() -> None:
    spec = Quantize(keep=("head",), overrides={"fc": Int(4), "stem.*": Int(4)})
    assert solve(Calibration(ONE, RANGES), {"fc.weight": view("fc.weight", WEIGHT)}, {}, spec, ORT).unmatched == (
        "head",
        "stem.*",
    )


def test_the_range_before_a_fused_activation_behind_a_pool_does_not_count() -> None:
    graph = Graph(
        (
            layer("conv", "input:0", "conv"),
            Node("pool", "max_pool", ("conv",), "pool"),
            Node("relu", "relu", ("pool",), "relu"),
        ),
        ("input:0",),
        ("relu",),
    )
    ranges = {"input:0": Range(0, 1, 1), "conv": Range(-100, 5, 1), "pool": Range(-90, 5, 1), "relu": Range(0, 5, 1)}
    values = solve(
        Calibration(graph, ranges), {"conv.weight": view("conv.weight", np.ones((1, 1, 1, 1)))}, {}, Quantize(), ORT
    ).plan.values
    for name in ("conv", "pool", "relu"):
        np.testing.assert_allclose(values[name].scale, 5 / 255, rtol=1e-6)
        assert values[name].zero_point == 0


def test_a_fixed_scale_is_in_eight_unsigned_bits_whatever_the_spec() -> None:
    graph = Graph((layer("fc", "input:0"), Node("softmax", "softmax", ("fc",), "softmax")), ("input:0",), ("softmax",))
    spec = Quantize(activations=Int(8, symmetric=True, granularity=PerTensor()))
    values = solve(
        Calibration(graph, RANGES | {"softmax": Range(0, 1, 10)}), {"fc.weight": view("fc.weight", WEIGHT)}, {}, spec, LITERT
    ).plan.values
    assert float(values["softmax"].scale) == 1 / 256 and values["softmax"].zero_point == 0
    assert (values["softmax"].spec.qmin, values["softmax"].spec.qmax) == (0, 255)
    assert values["fc"].spec.qmin == -128  # activations fill their storage type


def test_a_cast_names_the_weights_and_their_dtype() -> None:
    solved = solve(Calibration(ONE, {}), {"fc.weight": view("fc.weight", WEIGHT)}, {}, Quantize(Float("float16"), None), ORT)
    assert solved.plan.casts == {"fc.weight": "float16"} and solved.plan.weights == {}
    assert solved.changed == ({"name": "fc.weight", "parameters": 4, "scheme": "float16", "bits": 16},)


def test_a_value_that_calibration_never_reached_is_named() -> None:
    with pytest.raises(DataError, match=r"No calibration data reached 'fc'"):
        solve(Calibration(ONE, {"input:0": Range(0, 1, 4)}), {"fc.weight": view("fc.weight", WEIGHT)}, {}, Quantize(), ORT)


def test_the_value_with_infinities_is_named_not_its_neighbour() -> None:
    graph = Graph((Node("flat", "flatten", ("input:0",), "flat"), layer("fc", "flat")), ("input:0",), ("fc",))
    ranges = {"input:0": Range(0, 0, 0), "flat": Range(float("nan"), float("nan"), 4), "fc": Range(0, 1, 4)}
    with pytest.raises(DataError, match="nan to nan at 'flat'"):
        solve(Calibration(graph, ranges), {"fc.weight": view("fc.weight", WEIGHT)}, {}, Quantize(), ORT)


def test_nothing_to_quantize_is_an_error_with_the_reasons() -> None:
    with pytest.raises(ModelError, match=r"change nothing.*fc: in keep"):
        solve(Calibration(ONE, RANGES), {}, {}, Quantize(keep=("fc",)), ORT)
    with pytest.raises(ModelError, match="no convolution or linear layer"):
        solve(
            Calibration(Graph((Node("relu", "relu", ("input:0",), "relu"),), ("input:0",), ("relu",)), {}),
            {},
            {},
            Quantize(),
            ORT,
        )


def test_keras_and_torch_layouts_of_one_weight_have_the_same_scales() -> None:
    array = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32)  # (h, w, in, out)
    keras = solve_weight(view("k", array, out_axis=-1), Int(8))
    torch = solve_weight(view("t", array.transpose(3, 2, 0, 1), out_axis=0), Int(8))
    np.testing.assert_array_equal(keras.scale, torch.scale)
    np.testing.assert_array_equal(
        keras.encode(array).transpose(3, 2, 0, 1), torch.encode(np.ascontiguousarray(array.transpose(3, 2, 0, 1)))
    )


def test_a_bias_read_beside_two_weights_stays_float() -> None:
    nodes = (layer("a", "input:0", bias="b"), layer("c", "input:0", bias="b"))
    graph = Graph(nodes, ("input:0",), ("a", "c"))
    weights = {name: view(name, WEIGHT) for name in ("a.weight", "c.weight")}
    ranges = {name: Range(0, 1, 1) for name in ("input:0", "a", "c")}
    assert solve(Calibration(graph, ranges), weights, {"b": np.ones(2, np.float32)}, Quantize(), ORT).plan.biases == {}
