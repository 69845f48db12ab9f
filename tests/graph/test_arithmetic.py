"""Which operations a target's integer arithmetic makes, and with which numbers."""

import numpy as np

from whet.graph.arithmetic import Accumulator, Sum, arithmetic
from whet.graph.nodes import Graph, Node
from whet.graph.placement import Plan
from whet.numerics.affine import QParams
from whet.specs import Int, PerTensor, Quantize

UINT8 = Int(8, symmetric=False, granularity=PerTensor())


def value(scale: float, bits: int = 8) -> QParams:
    return QParams(np.float32(scale), np.int32(0), Int(bits, symmetric=False, granularity=PerTensor()))


def weight(*scales: float) -> QParams:
    return QParams(np.asarray(scales, np.float32), np.zeros(len(scales), np.int32), Int(8), 0)


NODES = (
    Node("conv", "conv", ("input:0",), "conv", "conv.weight", "conv.bias"),
    Node("relu", "relu", ("conv",), "relu"),
    Node("add", "add", ("input:0", "relu"), ""),
    Node("relu2", "relu", ("add",), "relu2"),
    Node("mul", "mul", ("relu2", "relu"), ""),
)
GRAPH = Graph(NODES, ("input:0",), ("mul",))


def plan(target: str = "litert", **changes) -> Plan:
    values = {"input:0": value(0.5), "relu": value(0.25), "relu2": value(0.5), "mul": value(0.125)} | changes
    return Plan(Quantize(), target, {"conv.weight": weight(0.5, 0.25)}, values, {"conv.bias": ("input:0", "conv.weight")})


def test_the_rules_stand_at_the_operations_behind_whose_activations_the_quantizers_are():
    found = arithmetic(GRAPH, plan())
    assert set(found) == {"conv", "add", "mul"}
    conv, add, mul = found["conv"], found["add"], found["mul"]
    assert isinstance(conv, Accumulator) and isinstance(mul, Accumulator) and isinstance(add, Sum)
    np.testing.assert_array_equal(conv.step, np.asarray([0.25, 0.125], np.float32))
    np.testing.assert_array_equal(conv.factor, np.asarray([1, 0.5], np.float32))
    assert conv.scale == 0.25 and float(mul.step) == 0.125 and float(mul.factor) == 1
    assert (add.left, add.right, add.scale) == (0.5, 0.25, 0.5)
    assert (add.multipliers.left, add.multipliers.right, add.multipliers.shift) == (1 << 20, 1 << 19, 20)


def test_targets_differ_in_their_rules():
    assert set(arithmetic(GRAPH, plan("onnxruntime"))) == {"conv", "mul"}  # its sums are computed in float
    assert not arithmetic(GRAPH, plan("torch")) and not arithmetic(GRAPH, plan("a target of the user's own"))


def test_what_kernels_do_not_compute_so_has_no_rule():
    assert "add" not in arithmetic(GRAPH, plan(relu=value(0.25, bits=16)))  # float32 would not be exact
    assert "add" not in arithmetic(GRAPH, plan(relu2=value(1e4)))  # beyond the kernels' range of ratios
    without_bias_codes = plan()
    without_bias_codes.biases.clear()  # a bias in float is no whole number of steps
    assert "conv" not in arithmetic(GRAPH, without_bias_codes)
    three = Graph((*NODES[:2], Node("add", "add", ("input:0", "relu", "relu"), "")), ("input:0",), ("add",))
    assert "add" not in arithmetic(three, plan(add=value(0.5)))
    between = arithmetic(GRAPH, plan(add=value(1.0)))  # a quantizer before the activation decides
    assert between["add"].scale == 1.0
