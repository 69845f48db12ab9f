"""Factors between layers, and what has no place for them; biases from batch norms; blocks."""

import numpy as np
import pytest

from whet.errors import ModelError
from whet.graph.blocks import blocks
from whet.graph.channels import input_absmax, input_owner
from whet.graph.correct import correct_analytically, normals
from whet.graph.equalize import check_same_function, cross_layer, equalize
from whet.graph.nodes import Graph, Node
from whet.graph.solve import Calibration, solve
from whet.graph.views import WeightView
from whet.numerics.regression import regression
from whet.specs import AWQ, TARGETS, BiasCorrection, Int, Quantize, SmoothQuant

ORT = TARGETS["onnxruntime"]
RNG = np.random.default_rng(0)


def node(name, op, *sources, bias=True, weight=True):
    return Node(name, op, sources, name, f"{name}.weight" if weight else None, f"{name}.bias" if bias and weight else None)


def plain(name, op, *sources):
    return node(name, op, *sources, weight=False)


def views(arrays):
    return {n: WeightView(n, n.split(".")[0], a, 0, 1) for n, a in arrays.items() if a.ndim > 1}


def vectors(arrays):
    return {n: a for n, a in arrays.items() if a.ndim == 1}


def spread(size):
    """Rows of very different size."""
    return np.exp(RNG.uniform(-2, 2, size=(size[0], *[1] * (len(size) - 1)))) * RNG.normal(size=size)


def layers(**sizes):
    found = {}
    for name, size in sizes.items():
        found[f"{name}.weight"] = spread(size).astype(np.float32)
        found[f"{name}.bias"] = RNG.normal(size=size[0]).astype(np.float32)
    return found


@pytest.mark.parametrize(
    ("shape", "out", "inside", "channels"),
    [((6, 4), 0, 1, 4), ((3, 3, 4, 6), 3, 2, 4), ((6, 2, 3), 0, 1, 4), ((8, 1, 3, 3), 0, 1, 4), ((3, 3, 1, 8), 3, None, 4)],
)
def test_the_greatest_weight_that_reads_a_channel(shape, out, inside, channels):
    array = RNG.normal(size=shape)
    owner = input_owner(WeightView("w", "l", array, out, inside), channels)
    wanted = np.zeros(channels)
    full = np.broadcast_to(owner, shape)
    for place in np.ndindex(*shape):
        wanted[full[place]] = max(wanted[full[place]], abs(array[place]))
    np.testing.assert_array_equal(input_absmax(array, owner, channels), wanted)


def test_channels_that_do_not_fit_have_no_owner():
    assert input_owner(WeightView("w", "l", np.ones((6, 8)), 0, 1), 4) is None  # a flattened 4 x 2
    assert input_owner(WeightView("w", "l", np.ones((5, 2, 3)), 0, 1), 4) is None  # 5 outputs in 2 groups


def test_cross_layer_makes_ranges_equal_and_keeps_the_function():
    arrays = layers(a=(6, 5), b=(4, 6), c=(3, 4))
    graph = Graph(
        (
            node("a", "linear", "input:0"),
            plain("r", "relu", "a"),
            node("b", "linear", "r"),
            plain("i", "identity", "b"),
            node("c", "linear", "i"),
        ),
        ("input:0",),
        ("c",),
    )
    found = cross_layer(graph, views(arrays), vectors(arrays), ["a.weight", "b.weight", "c.weight"])

    def run(p, x):
        hidden = np.maximum(x @ p["a.weight"].T + p["a.bias"], 0)
        return (hidden @ p["b.weight"].T + p["b.bias"]) @ p["c.weight"].T + p["c.bias"]

    x = RNG.normal(size=(20, 5))
    np.testing.assert_allclose(run(arrays | found.tensors, x), run(arrays, x), rtol=2e-3, atol=1e-3)
    for first, second in (("a", "b"), ("b", "c")):
        rows = np.abs(found.tensors[f"{first}.weight"]).max(axis=1)
        np.testing.assert_allclose(rows, np.abs(found.tensors[f"{second}.weight"]).max(axis=0), rtol=0.01)
    assert [name for name, _ in found.skipped] == ["a"]


@pytest.mark.parametrize(
    ("between", "outputs", "reason"),
    [
        ((plain("r", "relu6", "a"),), ("b",), "relu6 lies before it"),
        ((plain("r", "reshape", "a"),), ("b",), "may mix channels and positions"),
        ((plain("r", "relu", "a"), plain("z", "add", "r", "input:0")), ("b", "z"), "is read by others too"),
        ((plain("r", "relu", "a"),), ("b", "r"), "is read by others too"),
    ],
)
def test_pairs_that_cannot_be_equalized_say_why(between, outputs, reason):
    arrays = layers(a=(5, 5), b=(4, 5))
    graph = Graph((node("a", "linear", "input:0"), *between, node("b", "linear", "r")), ("input:0",), outputs)
    found = cross_layer(graph, views(arrays), vectors(arrays), ["b.weight"])
    assert not found.tensors and reason in found.skipped[0][1]


class Normed:
    """A norm that scales and shifts, and two linear layers behind it; one input is an outlier."""

    def __init__(self):
        self.x = RNG.normal(size=(400, 8)).astype(np.float32)
        self.arrays = layers(q=(6, 8), k=(4, 8))
        for name in ("q", "k"):
            self.arrays[f"{name}.weight"] = RNG.normal(size=self.arrays[f"{name}.weight"].shape).astype(np.float32)
        self.arrays |= {"n.weight": np.ones(8, np.float32), "n.bias": RNG.normal(size=8).astype(np.float32)}
        self.arrays["n.weight"][3] = 60
        nodes = (plain("n", "layer_norm", "input:0"), node("q", "linear", "n"), node("k", "linear", "n"))
        self.graph = Graph(nodes, ("input:0",), ("q", "k"))

    def hidden(self, p):
        return self.x * p["n.weight"] + p["n.bias"]

    def run(self, p):
        return np.concatenate([self.hidden(p) @ p[f"{n}.weight"].T + p[f"{n}.bias"] for n in ("q", "k")], axis=1)

    def regressions(self, plan, requests):
        x = self.hidden(self.arrays)
        return {r.weight: (regression(x, x @ self.arrays[r.weight].T),) for r in requests}

    def tensor(self, name):
        return self.arrays[name]

    def affine(self, node):
        return ("n.weight", "n.bias") if node.op == "layer_norm" else None


@pytest.mark.parametrize("spec", [SmoothQuant(), AWQ(points=8)], ids=repr)
def test_layers_behind_one_norm_share_factors_that_it_takes_up(spec):
    case = Normed()
    weights = {n: v for n, v in views(case.arrays).items()}
    found = equalize(case.graph, weights, {}, Quantize(Int(4), None, equalize=spec), ORT, case)
    assert set(found.tensors) == {"q.weight", "k.weight", "n.weight", "n.bias"} and not found.skipped
    factors = found.tensors["q.weight"] / case.arrays["q.weight"]
    np.testing.assert_allclose(factors[0], factors[-1], rtol=1e-5)
    np.testing.assert_allclose(found.tensors["k.weight"] / case.arrays["k.weight"], factors[:4], rtol=1e-5)
    assert np.argmax(factors[0]) == 3
    np.testing.assert_allclose(case.run(case.arrays | found.tensors), case.run(case.arrays), rtol=1e-3, atol=1e-3)
    spread_before, spread_after = (np.abs(case.hidden(p)).max(axis=0) for p in (case.arrays, case.arrays | found.tensors))
    assert spread_after.max() / spread_after.min() < 0.6 * spread_before.max() / spread_before.min()


def test_awq_lowers_the_error_of_the_outputs():
    case = Normed()
    spec = Quantize(Int(4), None, equalize=AWQ(points=8))
    found = equalize(case.graph, views(case.arrays), {}, spec, ORT, case)

    def error(arrays):
        plan = solve(Calibration(case.graph, {}), views(arrays), {}, spec, ORT).plan
        rounded = {name: plan.rounded(name, arrays[name]) for name in ("q.weight", "k.weight")}
        return np.mean((case.run(arrays | rounded) - case.run(case.arrays)) ** 2)

    assert error(case.arrays | found.tensors) < 0.5 * error(case.arrays)


def test_an_input_that_others_read_too_takes_no_factor():
    case = Normed()
    graph = Graph((*case.graph.nodes, plain("s", "add", "n", "input:0")), ("input:0",), ("q", "k", "s"))
    found = equalize(graph, views(case.arrays), {}, Quantize(equalize=SmoothQuant()), ORT, case)
    assert not found.tensors and all("add reads its input too" in why for _, why in found.skipped)


def test_a_changed_function_is_refused():
    check_same_function({"a": np.ones(3), "b": (np.zeros(2),)}, {"a": np.ones(3) + 1e-4, "b": (np.zeros(2),)}, "CrossLayer")
    with pytest.raises(ModelError, match="CrossLayer would change what this model computes"):
        check_same_function((np.ones(3),), (np.asarray([1, 1, 2.0]),), "CrossLayer")
    with pytest.raises(ModelError):
        check_same_function(np.ones(3), np.asarray([1, np.nan, 1]), "CrossLayer")


class Told:
    """Batch norms in front of two convolutions."""

    def __init__(self, **normal):
        self.told = normal

    def normal(self, weight):
        return self.told.get(weight.split(".")[0])


def test_means_pass_through_relu_and_sums():
    graph = Graph(
        (node("a", "conv", "input:0"), plain("r", "relu", "a"), node("b", "conv", "r"), plain("s", "add", "b", "r")),
        ("input:0",),
        ("s",),
    )
    beta, gamma = np.asarray([0.3, -1.0]), np.asarray([1.0, 2.0])
    known = normals(graph, Told(a=(beta, gamma), b=(beta * 2, gamma)))
    drawn = np.maximum(RNG.normal(beta, gamma, size=(400_000, 2)), 0)
    np.testing.assert_allclose(known["r"][0], drawn.mean(axis=0), atol=0.02)
    np.testing.assert_allclose(known["s"][0], drawn.mean(axis=0) + 2 * beta, atol=0.02)
    np.testing.assert_allclose(known["s"][1], drawn.var(axis=0) + gamma**2, rtol=0.02)


def test_analytic_correction_takes_back_the_expected_shift():
    arrays = layers(a=(3, 2, 1, 1), b=(4, 3, 1, 1))
    graph = Graph((node("a", "conv", "input:0"), plain("r", "relu", "a"), node("b", "conv", "r")), ("input:0",), ("b",))
    spec = Quantize(Int(3), None, correct_bias=BiasCorrection(analytic=True))
    solved = solve(Calibration(graph, {}), views(arrays), vectors(arrays), spec, ORT)
    beta, gamma = np.asarray([2.0, 0.5, -0.5]), np.asarray([1.0, 0.5, 1.0])
    done = correct_analytically(solved, graph, views(arrays), vectors(arrays), Told(a=(beta, gamma)))
    x = np.maximum(RNG.normal(beta, gamma, size=(200_000, 3)), 0)
    weight = arrays["b.weight"][:, :, 0, 0]
    rounded = done.plan.rounded("b.weight", arrays["b.weight"])[:, :, 0, 0]
    wanted = (x @ weight.T).mean(axis=0) + arrays["b.bias"]
    np.testing.assert_allclose((x @ rounded.T).mean(axis=0) + done.plan.tensors["b.bias"], wanted, atol=0.01)
    assert list(done.plan.tensors) == ["b.bias"]
    assert [row["name"] for row in done.skipped] == ["a"] and "no batch norm" in done.skipped[0]["reason"]


def test_blocks_lie_between_values_that_alone_carry_everything():
    graph = Graph(
        (
            node("stem", "conv", "input:0"),
            plain("r", "relu", "stem"),
            node("a", "conv", "r"),
            plain("ra", "relu", "a"),
            node("b", "conv", "ra"),
            plain("s", "add", "b", "r"),
            plain("rs", "relu", "s"),
            plain("p", "avg_pool", "rs"),
            node("fc", "linear", "p"),
        ),
        ("input:0",),
        ("fc",),
    )
    found = [(b.start, b.end, b.weights) for b in blocks(graph)]
    assert found == [
        ("input:0", "r", ("stem.weight",)),
        ("r", "p", ("a.weight", "b.weight")),
        ("p", "fc", ("fc.weight",)),
    ]
    assert blocks(graph)[1].nodes == {"a", "ra", "b", "s", "rs", "p"}


def test_a_model_of_two_inputs_has_blocks_from_where_one_value_is_left():
    graph = Graph(
        (plain("s", "add", "input:0", "input:1"), node("a", "linear", "s"), node("b", "linear", "a")),
        ("input:0", "input:1"),
        ("b",),
    )
    assert [(b.start, b.end) for b in blocks(graph)] == [("s", "a"), ("a", "b")]
