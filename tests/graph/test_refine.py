"""Rounding and correction on a plan, with a runner of NumPy layers written out."""

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from whet.graph.channels import WEIGHTED
from whet.graph.nodes import Graph, Node
from whet.graph.refine import Request, refine, waves_of
from whet.graph.rounding import rounded
from whet.graph.solve import Calibration, solve
from whet.graph.views import WeightView
from whet.numerics import threads
from whet.numerics.observers import Range
from whet.numerics.regression import regression
from whet.specs import GPTQ, MSE, TARGETS, AdaRound, BiasCorrection, Int, KMeans, PerTensor, Quantize

ORT = TARGETS["onnxruntime"]


def linear(name, source, bias=True):
    return Node(name, "linear", (source,), name, f"{name}.weight", f"{name}.bias" if bias else None)


GRAPH = Graph((linear("a", "input:0"), Node("r", "relu", ("a",), "r"), linear("b", "r")), ("input:0",), ("b",))


class Chain:
    """Two linear layers and a ReLU; float activations."""

    def __init__(self, seed=0, zeros=False):
        rng = np.random.default_rng(seed)
        mixed = rng.normal(size=(8, 8)) * np.linspace(0.2, 3, 8)
        self.x = (rng.normal(size=(512, 8)) @ mixed + 0.7).astype(np.float32)
        self.arrays = {
            "a.weight": rng.normal(size=(6, 8)).astype(np.float32),
            "a.bias": rng.normal(size=6).astype(np.float32),
            "b.weight": rng.normal(size=(5, 6)).astype(np.float32),
            "b.bias": rng.normal(size=5).astype(np.float32),
        }
        if zeros:
            self.arrays["a.weight"][rng.random((6, 8)) < 0.5] = 0
        self.plans = []

    def outputs(self, plan=None):
        """Outputs of a and b."""
        found, x = [], self.x.astype(np.float64)
        for name in ("a", "b"):
            weight, bias = self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"]
            if plan is not None:
                weight, bias = plan.rounded(f"{name}.weight", weight), plan.tensors.get(f"{name}.bias", bias)
            found.append(x @ weight.T + bias)
            x = np.maximum(found[-1], 0)
        return found

    def regressions(self, plan, requests):
        """See Runner."""
        self.plans.append((plan, tuple(requests)))
        exact, own = self.outputs(), self.outputs(plan)
        inputs = {"a.weight": self.x, "b.weight": np.maximum(own[0], 0)}
        wanted = dict(zip(("a.weight", "b.weight"), exact, strict=True))
        return {r.weight: (regression(inputs[r.weight], wanted[r.weight]),) for r in requests}

    def refined(self, spec):
        weights = {n: WeightView(n, n[0], a, 0, 1) for n, a in self.arrays.items() if a.ndim == 2}
        biases = {n: a for n, a in self.arrays.items() if a.ndim == 1}
        solved = solve(Calibration(GRAPH, {}), weights, biases, spec, ORT)
        return solved, refine(solved, GRAPH, weights, biases, self, progress=False)

    def error(self, plan):
        return float(np.mean((self.outputs(plan)[1] - self.outputs()[1]) ** 2))


SPECS = {
    "gptq": Quantize(Int(3), None, rounding=GPTQ()),
    "gptq, scales searched": Quantize(Int(3), None, rounding=GPTQ(), weight_observer=MSE()),
    "adaround": Quantize(Int(3), None, rounding=AdaRound(steps=200)),
    "adaround, scales searched": Quantize(Int(3), None, rounding=AdaRound(steps=200), weight_observer=MSE()),
    "gptq to levels": Quantize(KMeans(2, granularity=PerTensor()), None, rounding=GPTQ()),
    "gptq, asymmetric": Quantize(Int(3, symmetric=False), None, rounding=GPTQ()),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_the_trade_weights_farther_outputs_nearer(spec):
    chain = Chain()
    solved, better = chain.refined(spec)
    assert chain.error(better.plan) < 0.75 * chain.error(solved.plan)
    for name in ("a.weight", "b.weight"):
        array = chain.arrays[name]
        near = np.sum((solved.plan.rounded(name, array) - array) ** 2)
        far = np.sum((better.plan.rounded(name, array) - array) ** 2)
        assert far > near or isinstance(spec.weight_observer, MSE)
    for row in better.changed:
        assert row["output_db"] >= row["nearest_db"] and row["algorithm"] == type(spec.rounding).__name__
        assert ("damping" in row) == isinstance(spec.rounding, GPTQ)


def test_layers_are_rounded_one_after_another_for_the_inputs_they_then_get():
    chain = Chain()
    _, better = chain.refined(SPECS["gptq"])
    (first, one), (second, two) = chain.plans
    assert [r.weight for r in one] == ["a.weight"] and [r.weight for r in two] == ["b.weight"]
    assert not first.codes and list(second.codes) == ["a.weight"]
    np.testing.assert_array_equal(second.codes["a.weight"], better.plan.codes["a.weight"])


def test_bias_correction_makes_the_means_of_outputs_right():
    chain = Chain()
    solved, better = chain.refined(Quantize(Int(3), None, correct_bias=BiasCorrection()))
    assert not better.plan.codes and set(better.plan.tensors) == {"a.bias", "b.bias"}
    exact, nearest, corrected = (chain.outputs(plan)[1].mean(axis=0) for plan in (None, solved.plan, better.plan))
    assert np.abs(nearest - exact).max() > 0.01
    np.testing.assert_allclose(corrected, exact, atol=1e-4)


def test_rounding_with_a_free_bias_is_better_still():
    chain = Chain()
    _, alone = chain.refined(SPECS["gptq, scales searched"])
    _, both = chain.refined(Quantize(Int(3), None, rounding=GPTQ(), weight_observer=MSE(), correct_bias=BiasCorrection()))
    assert chain.error(both.plan) < chain.error(alone.plan)


@pytest.mark.parametrize("rounding", [GPTQ(), AdaRound(steps=50)], ids=["gptq", "adaround"])
@pytest.mark.parametrize("observer", [MSE(), None], ids=["searched", "given"])
def test_pruned_weights_stay_zero(rounding, observer):
    chain = Chain(zeros=True)
    options = {} if observer is None else {"weight_observer": observer}
    _, better = chain.refined(Quantize(Int(4), None, rounding=rounding, **options))
    array = chain.arrays["a.weight"]
    rounded = better.plan.rounded("a.weight", array)
    assert np.all(rounded[array == 0] == 0) and np.any(rounded != 0)


def test_what_an_algorithm_cannot_take_is_listed():
    _, better = Chain().refined(Quantize(KMeans(2), None, rounding=AdaRound(steps=10)))
    assert {row["name"] for row in better.skipped} == {"a", "b"}
    assert all("AdaRound rounds integers" in row["reason"] for row in better.skipped) and not better.plan.codes


def test_integer_biases_fit_after_correction():
    chain = Chain()
    chain.arrays["b.weight"][2] *= 1e-6
    chain.arrays["b.bias"][2] = 1e5
    ranges = {n: Range(-30.0, 30.0, 9) for n in ("input:0", "a", "r", "b")}
    weights = {n: WeightView(n, n[0], a, 0, 1) for n, a in chain.arrays.items() if a.ndim == 2}
    biases = {n: a for n, a in chain.arrays.items() if a.ndim == 1}
    spec = Quantize(Int(4), rounding=GPTQ(), weight_observer=MSE(), correct_bias=BiasCorrection())
    solved = solve(Calibration(GRAPH, ranges), weights, biases, spec, ORT)
    plan = refine(solved, GRAPH, weights, biases, chain, progress=False).plan
    value, name = plan.biases["b.bias"]
    codes = plan.tensors["b.bias"] / (plan.values[value].scale * plan.weights[name].scale)
    assert np.all(np.abs(codes) < 2**31) and np.all(np.abs(plan.rounded(name, weights[name].array)[2]) < 1e-4)


def conv(name, source):
    return Node(name, "conv", (source,), name, f"{name}.weight", f"{name}.bias")


def requests(*nodes, outputs):
    graph = Graph(nodes, ("input:0",), outputs)
    weights = {n.weight: WeightView(n.weight, n.layer, np.ones((2, 2, 1, 1), np.float32), 0, 1) for n in nodes if n.weight}
    plan = solve(Calibration(graph, {}), weights, {}, Quantize(Int(4), None), ORT).plan
    return [[(r.weight, r.beside) for r in wave] for wave in waves_of(graph, plan.weights)]


def test_parallel_layers_share_a_pass_and_the_last_branch_of_a_sum_mends_the_other():
    block = (conv("a", "input:0"), conv("b", "a"), conv("c", "input:0"), Node("s", "add", ("b", "c"), "s"))
    assert requests(*block, outputs=("s",)) == [[("a.weight", None)], [("b.weight", None)], [("c.weight", "b")]]
    heads = tuple(linear(name, "input:0") for name in "qkv")
    assert requests(*heads, outputs=("q", "k", "v")) == [[(f"{n}.weight", None) for n in "qkv"]]
    plain = (conv("a", "input:0"), conv("b", "a"), Node("s", "add", ("b", "input:0"), "s"))
    assert requests(*plain, outputs=("s",))[1] == [("b.weight", "input:0")]
    seen = (conv("a", "input:0"), conv("b", "a"), Node("s", "add", ("b", "a"), "s"))
    assert requests(*seen, outputs=("s", "b"))[1] == [("b.weight", None)]


def test_a_shared_weight_is_rounded_once():
    twice = (conv("a", "input:0"), Node("a2", "conv", ("a",), "a", "a.weight", "a.bias"))
    assert requests(*twice, outputs=("a2",)) == [[("a.weight", None)]]
    assert Request("w") == Request("w", None) and "linear" in WEIGHTED


@pytest.mark.parametrize("name", ["gptq, scales searched", "adaround"])
def test_small_layers_are_solved_on_one_thread(name, monkeypatch):
    seen = []

    def spied(*arguments):
        seen.append({item["num_threads"] for item in threadpool_info() if item["user_api"] == "blas"})
        return rounded(*arguments)

    monkeypatch.setattr("whet.graph.refine.rounded", spied)
    threads._controller.cache_clear()  # another test may have loaded a second BLAS since
    with threadpool_limits(2, user_api="blas"):
        Chain().refined(SPECS[name])
    assert seen == [{1}, {1}]
