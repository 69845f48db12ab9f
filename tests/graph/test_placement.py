"""Placement: which values are quantized on which target, and which share a scale. Graphs are written out by hand."""

from __future__ import annotations

import pytest

from whet.graph.nodes import Graph, Node
from whet.graph.placement import Placement, matches, place, unmatched
from whet.specs import TARGETS, Int, PerTensor, Quantize

ORT, LITERT = TARGETS["onnxruntime"], TARGETS["litert"]
WEIGHTED = {"conv", "conv_transpose", "linear", "batch_norm", "lstm"}


def node(name: str, op: str, *inputs: str, weight: str | None = None, bias: str | None = None, outputs: int = 1) -> Node:
    stored = weight or (f"{name}.weight" if op in WEIGHTED else None)
    return Node(name, op, inputs, layer=name.split("/")[0], weight=stored, bias=bias, outputs=outputs)


def graph(*nodes: Node, inputs: tuple[str, ...] = ("input:0",), outputs: tuple[str, ...] | None = None) -> Graph:
    return Graph(nodes, inputs, outputs or (nodes[-1].values[-1],))


def groups(placement: Placement) -> set[frozenset[str]]:
    owners = set(placement.values.values())
    return {frozenset(v for v, owner in placement.values.items() if owner == group) for group in owners}


def alone(*names: str) -> set[frozenset[str]]:
    return {frozenset({name}) for name in names}


def test_relu_is_fused_and_the_value_before_it_has_no_quantizer() -> None:
    placed = place(
        graph(node("conv", "conv", "input:0"), node("relu", "relu", "conv"), node("fc", "linear", "relu")), ORT, Quantize()
    )
    assert groups(placed) == alone("input:0", "relu", "fc")
    assert placed.weights.keys() == {"conv.weight", "fc.weight"}
    assert placed.nodes == {"conv", "fc"} and placed.skipped == () and placed.clipped == frozenset()


def test_relu_is_not_fused_where_something_else_reads_the_value_before_it() -> None:
    nodes = (node("conv", "conv", "input:0"), node("relu", "relu", "conv"), node("add", "add", "conv", "relu"))
    assert groups(place(graph(*nodes), ORT, Quantize())) == alone("input:0", "conv", "relu", "add")


def test_relu_is_not_fused_where_the_caller_sees_the_value_before_it() -> None:
    g = graph(node("conv", "conv", "input:0"), node("relu", "relu", "conv"), outputs=("conv", "relu"))
    assert groups(place(g, ORT, Quantize())) == alone("input:0", "conv")


def test_residual_block_quantizes_both_branches_and_the_sum_behind_its_relu() -> None:
    g = graph(
        node("stem", "conv", "input:0"),
        node("relu0", "relu", "stem"),
        node("conv1", "conv", "relu0"),
        node("relu1", "relu", "conv1"),
        node("conv2", "conv", "relu1"),
        node("add", "add", "conv2", "relu0"),
        node("relu2", "relu", "add"),
        node("pool", "global_avg_pool", "relu2"),
        node("flat", "flatten", "pool"),
        node("fc", "linear", "flat"),
    )
    placed = place(g, ORT, Quantize())
    assert groups(placed) == alone("input:0", "relu0", "relu1", "conv2", "relu2", "fc") | {frozenset({"pool", "flat"})}
    assert placed.nodes == {"stem", "conv1", "conv2", "add", "pool", "fc"}


def test_max_pool_and_flatten_share_the_scale_of_what_they_move() -> None:
    g = graph(
        node("conv", "conv", "input:0"),
        node("relu", "relu", "conv"),
        node("pool", "max_pool", "relu"),
        node("flat", "flatten", "pool"),
        node("fc", "linear", "flat"),
    )
    assert groups(place(g, ORT, Quantize())) == alone("input:0", "fc") | {frozenset({"relu", "pool", "flat"})}


def test_an_input_moved_before_its_first_layer_shares_the_scale() -> None:
    g = graph(node("flat", "flatten", "input:0"), node("fc", "linear", "flat"))
    assert groups(place(g, ORT, Quantize())) == alone("fc") | {frozenset({"input:0", "flat"})}


def test_relu_behind_max_pool_belongs_to_the_pools_group_and_gives_its_range() -> None:
    g = graph(
        node("conv", "conv", "input:0"),
        node("pool", "max_pool", "conv"),
        node("relu", "relu", "pool"),
        node("fc", "linear", "relu"),
    )
    placed = place(g, ORT, Quantize())
    assert groups(placed) == alone("input:0", "fc") | {frozenset({"conv", "pool", "relu"})}
    assert placed.clipped == {"conv", "pool"}


def test_relu_behind_max_pool_stays_apart_where_the_pool_has_another_reader() -> None:
    g = graph(
        node("conv", "conv", "input:0"),
        node("pool", "max_pool", "conv"),
        node("relu", "relu", "pool"),
        node("add", "add", "relu", "pool"),
    )
    placed = place(g, ORT, Quantize())
    assert groups(placed) == alone("input:0", "relu", "add") | {frozenset({"conv", "pool"})}
    assert placed.clipped == frozenset()


@pytest.mark.parametrize(("target", "joined"), [(ORT, False), (LITERT, True)])
def test_concat_joins_its_inputs_and_output_only_on_litert(target, joined) -> None:
    g = graph(
        node("a", "conv", "input:0"),
        node("b", "conv", "input:0"),
        node("cat", "concat", "a", "b"),
        node("fc", "linear", "cat"),
    )
    expected = alone("input:0", "fc") | ({frozenset({"a", "b", "cat"})} if joined else alone("a", "b", "cat"))
    assert groups(place(g, target, Quantize())) == expected


def test_concat_of_a_value_with_itself() -> None:
    g = graph(node("a", "conv", "input:0"), node("cat", "concat", "a", "a"), node("fc", "linear", "cat"))
    assert groups(place(g, LITERT, Quantize())) == alone("input:0", "fc") | {frozenset({"a", "cat"})}


def test_average_pooling_keeps_its_inputs_scale_on_litert() -> None:
    g = graph(node("a", "conv", "input:0"), node("pool", "avg_pool", "a"), node("fc", "linear", "pool"))
    assert frozenset({"a", "pool"}) in groups(place(g, LITERT, Quantize()))
    assert groups(place(g, ORT, Quantize())) == alone("input:0", "a", "pool", "fc")


def test_keep_in_the_middle_leaves_a_float_island_between_quantized_layers() -> None:
    g = graph(
        node("a", "conv", "input:0"),
        node("relu", "relu", "a"),
        node("b", "conv", "relu"),
        node("c", "conv", "b"),
    )
    placed = place(g, ORT, Quantize(keep=("b",)))
    assert placed.weights.keys() == {"a.weight", "c.weight"}
    assert groups(placed) == alone("input:0", "relu", "b", "c")  # b's output is c's input
    assert placed.skipped == (("b", "in keep"),)


@pytest.mark.parametrize("kept", ["conv1", "conv2"])
def test_a_sum_that_a_kept_layer_gives_to_or_reads_beside_stays_float_too(kept) -> None:
    """Else what the layer reads, or gives, would be rounded for the sum: keeping it would win little."""
    nodes = [node("stem", "conv", "input:0"), node("relu0", "relu", "stem")]
    before, first = "relu0", "conv1"
    for index in (1, 2):  # two residual blocks; the first one's layers are "conv1" and "conv2"
        first, second = (("conv1", "conv2"), ("conv3", "conv4"))[index - 1]
        nodes += [node(first, "conv", before), node(f"relu{index}", "relu", first), node(second, "conv", f"relu{index}")]
        nodes += [node(f"add{index}", "add", second, before), node(f"end{index}", "relu", f"add{index}")]
        before = f"end{index}"
    placed = place(graph(*nodes), ORT, Quantize(keep=(kept,)))
    assert "add1" not in placed.nodes and "add2" in placed.nodes
    assert {"stem", "conv3", "conv4"} <= placed.nodes
    later = place(graph(*nodes), ORT, Quantize(keep=("conv3",)))  # reads the sum of the block before it, too
    assert not {"add1", "add2"} & later.nodes and "end1" not in later.values


def test_include_names_what_is_quantized_and_the_rest_is_listed() -> None:
    g = graph(node("a", "conv", "input:0"), node("b", "conv", "a"))
    placed = place(g, ORT, Quantize(include=("b",)))
    assert placed.weights.keys() == {"b.weight"} and placed.skipped == (("a", "not in include"),)


def test_float_operator_between_two_layers_has_quantizers_on_both_sides() -> None:
    g = graph(node("a", "conv", "input:0"), node("gelu", "gelu", "a"), node("b", "conv", "gelu"))
    placed = place(g, ORT, Quantize())
    assert groups(placed) == alone("input:0", "a", "gelu", "b") and placed.nodes == {"a", "b"}


def test_an_operation_that_no_integer_operation_feeds_stays_float() -> None:
    g = graph(
        node("sum", "add", "input:0", "input:1"),
        node("fc", "linear", "sum"),
        node("gelu", "gelu", "fc"),
        node("twice", "add", "gelu", "gelu"),
        inputs=("input:0", "input:1"),
    )
    placed = place(g, ORT, Quantize())
    assert placed.nodes == {"fc"} and groups(placed) == alone("sum", "fc")


def test_an_operation_with_a_constant_operand_stays_float() -> None:
    g = graph(node("fc", "linear", "input:0"), node("shift", "add", "fc"), node("fc2", "linear", "shift"))
    placed = place(g, ORT, Quantize())
    assert placed.nodes == {"fc", "fc2"} and groups(placed) == alone("input:0", "fc", "shift", "fc2")


def test_layers_that_the_target_does_not_take_are_listed() -> None:
    g = graph(node("rnn", "lstm", "input:0"), node("norm", "batch_norm", "rnn"), node("fc", "linear", "norm"))
    placed = place(g, ORT, Quantize())
    assert placed.skipped == (
        ("rnn", "operation 'lstm' is not quantized on onnxruntime"),
        ("norm", "operation 'batch_norm' is not quantized on onnxruntime"),
    )


def test_a_weight_computed_while_running_is_listed_not_lost() -> None:
    hyper = Node("hyper", "conv", ("input:0",), layer="hyper")
    placed = place(graph(hyper, node("fc", "linear", "hyper")), ORT, Quantize())
    assert placed.skipped == (("hyper", "its weight is computed, not stored"),)


def test_softmax_has_its_fixed_scale_on_litert_and_is_float_on_onnxruntime() -> None:
    g = graph(node("fc", "linear", "input:0"), node("softmax", "softmax", "fc"))
    on_litert = place(g, LITERT, Quantize())
    assert on_litert.fixed == {on_litert.values["softmax"]: (1 / 256, 0)}
    on_ort = place(g, ORT, Quantize())
    assert on_ort.fixed == {} and "softmax" not in on_ort.values


def test_a_fixed_scale_follows_moves_but_no_fused_activation() -> None:
    g = graph(
        node("fc", "linear", "input:0"),
        node("tanh", "tanh", "fc"),
        node("reshape", "reshape", "tanh"),
        node("relu", "relu", "reshape"),
        node("out", "linear", "relu"),
    )
    placed = place(g, LITERT, Quantize())
    assert placed.fixed == {placed.values["tanh"]: (1 / 128, 128)}
    assert placed.values["tanh"] == placed.values["reshape"] != placed.values["relu"] and placed.clipped == frozenset()


def test_a_fixed_scale_is_not_forced_on_what_it_is_joined_with() -> None:
    g = graph(
        node("fc", "linear", "input:0"),
        node("softmax", "softmax", "fc"),
        node("cat", "concat", "softmax", "fc"),
        node("out", "linear", "cat"),
    )
    placed = place(g, LITERT, Quantize())
    assert "cat" not in placed.nodes
    assert placed.skipped == (("cat", "on litert it would force a fixed scale on other values"),)
    assert groups(placed) == alone("input:0", "fc", "softmax", "cat", "out")
    assert set(placed.fixed) == {placed.values["softmax"]}


def test_equal_fixed_scales_may_be_joined() -> None:
    g = graph(
        node("fc", "linear", "input:0"),
        node("s1", "softmax", "fc"),
        node("s2", "sigmoid", "fc"),
        node("cat", "concat", "s1", "s2"),
    )
    placed = place(g, LITERT, Quantize())
    assert "cat" in placed.nodes and groups(placed) == alone("input:0", "fc") | {frozenset({"s1", "s2", "cat"})}
    assert placed.fixed == {placed.values["cat"]: (1 / 256, 0)}


def test_a_layer_called_twice_stores_one_weight_and_shares_the_range_of_its_inputs() -> None:
    shared = {"weight": "fc.weight", "bias": "fc.bias"}
    g = graph(
        node("fc/linear:0", "linear", "input:0", **shared),
        node("fc/linear:1", "linear", "input:1", **shared),
        node("sub", "add", "fc/linear:0", "fc/linear:1"),
        inputs=("input:0", "input:1"),
    )
    placed = place(g, ORT, Quantize())
    assert placed.weights.keys() == {"fc.weight"} and placed.weights["fc.weight"].name == "fc/linear:0"
    assert groups(placed) == alone("fc/linear:0", "fc/linear:1", "sub") | {frozenset({"input:0", "input:1"})}


def test_a_kept_layer_called_twice_is_listed_once() -> None:
    g = graph(node("fc/linear:0", "linear", "input:0", weight="w"), node("fc/linear:1", "linear", "fc/linear:0", weight="w"))
    assert place(g, ORT, Quantize(keep=("fc",))).skipped == (("fc", "in keep"),)


def test_weights_only_places_no_activation_quantizer() -> None:
    g = graph(node("a", "conv", "input:0"), node("sum", "add", "a", "a"))
    placed = place(g, ORT, Quantize(Int(8), None))
    assert placed.values == {} and placed.nodes == frozenset() and placed.weights.keys() == {"a.weight"}


def test_an_operation_with_several_outputs_is_moved_through_by_none() -> None:
    split = Node("split", "chunk", ("conv",), layer="split", outputs=2)
    g = graph(
        node("conv", "conv", "input:0"), split, node("a", "conv", "split#0"), node("b", "conv", "split#1"), outputs=("a", "b")
    )
    assert groups(place(g, ORT, Quantize(Int(8), Int(8, symmetric=False, granularity=PerTensor())))) == alone(
        "input:0", "conv", "split#0", "split#1", "a", "b"
    )


@pytest.mark.parametrize(
    ("layer", "pattern", "expected"),
    [
        ("conv1", "conv1", True),
        ("conv10", "conv1", False),
        ("block.conv", "block", True),
        ("block/conv", "block", True),
        ("blocked", "block", False),
        ("layer.3.fc", "layer.*.fc", True),
        ("a[0]", "a?0?", True),
    ],
)
def test_patterns_name_layers_and_what_they_hold(layer, pattern, expected) -> None:
    assert matches(layer, pattern) is expected


def test_patterns_that_name_nothing_are_reported() -> None:
    assert unmatched({"conv1": (), "block.fc": ()}, ("conv1", "block", "convolution", "*.fc")) == ["convolution"]
