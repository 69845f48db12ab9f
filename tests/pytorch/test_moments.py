"""The PyTorch runner against sums written out: what the quantized model's layers read, and what the float model has there."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import whet
import zoo_torch
from whet.data import Batches
from whet.errors import DataError
from whet.graph.refine import Request
from whet.graph.solve import solve
from whet.numerics.regression import regression
from whet.specs import TARGETS, AdaRound, Int, Quantize
from whet.torch import block_rounding, moments
from whet.torch.interception import interceptor_of
from whet.torch.moments import TorchRunner
from whet.torch.quantize import rounded_copy, simulate
from whet.torch.trace import trace


class Sum(nn.Module):
    """Two linear layers in a row beside a shortcut, a batch norm behind the first."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.calls = []

    def forward(self, x):
        x = self.norm(self.a(x))
        y = F.relu(x)
        self.calls.append((x, y))
        z = self.b(y)
        z += x  # in place: the layer's own output must have been read before
        return z


def case(bits=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Sum()
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
        model.eval()
    batches = [zoo_torch.normal(20, 6, seed=seed) for seed in (0, 1)]
    data = Batches(batches, "calibration")
    traced = trace(model, batches[0], data, progress=False)
    plan = solve(traced.calibration, traced.weights, traced.biases, Quantize(Int(bits)), TARGETS["onnxruntime"]).plan
    runner = TorchRunner(model, traced.calibration.graph, dict(traced.calibration.folds), data, {})
    return model, np.concatenate(batches), plan, runner


def close(found, wanted):
    for name in ("second", "mean", "absmax", "cross", "target_mean", "target_second"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-3, atol=1e-4)
    assert found.count == wanted.count


def test_inputs_are_the_quantized_model_s_and_wanted_outputs_mend_the_shortcut():
    model, x, plan, runner = case()
    shortcut = next(node.name for node in trace(model, x, None, progress=False).calibration.graph.nodes if node.op == "linear")
    found = runner.regressions(plan, [Request("b.weight", shortcut)])["b.weight"]
    with torch.no_grad():
        model.calls.clear()
        model(torch.from_numpy(x))
        exact_x, exact_y = model.calls[0]
        wanted = model.b(exact_y)
        simulated = simulate(model, plan)
        interceptor_of(simulated).kernels.active = False  # the runner leaves out the last bits of the kernels
        simulated.calls.clear()
        simulated(torch.from_numpy(x))
        own_x, own_y = simulated.calls[0]
    assert (own_y - exact_y).abs().max() > 0.05
    assert len(found) == 1
    close(found[0], regression(own_y.numpy().astype(float), (wanted + exact_x - own_x).numpy().astype(float)))
    alone = runner.regressions(plan, [Request("b.weight")])["b.weight"][0]
    close(alone, regression(own_y.numpy().astype(float), wanted.numpy().astype(float)))


def test_without_a_plan_both_are_the_float_model_s():
    model, x, _, runner = case()
    found = runner.regressions(None, [Request("b.weight"), Request("a.weight")])
    assert set(found) == {"a.weight", "b.weight"}
    with torch.no_grad():
        model.calls.clear()
        model(torch.from_numpy(x))
        folded, y = model.calls[0]
    close(found["b.weight"][0], regression(y.numpy().astype(float), model.b(y).detach().numpy().astype(float)))
    close(found["a.weight"][0], regression(x.astype(float), folded.numpy().astype(float)))


def test_only_what_is_needed_is_run():
    _, _, plan, runner = case()
    runner.reference.calls.clear()
    runner.regressions(plan, [Request("a.weight")])
    assert not runner.reference.calls  # the pass ended at the first layer


def test_parameters_and_norms_by_name():
    model, _, _, runner = case()
    beta, gamma = runner.normal("a.weight")
    np.testing.assert_allclose(beta, model.norm.bias.detach().numpy())
    np.testing.assert_allclose(gamma, model.norm.weight.detach().numpy())
    assert runner.normal("b.weight") is None
    assert not np.allclose(runner.tensor("a.weight"), model.a.weight.detach().numpy())  # folded


def test_a_folded_norm_that_was_equalized_tells_scaled_statistics():
    model, x, _, runner = case()
    halved = {"a.weight": runner.tensor("a.weight") / 2, "a.bias": runner.tensor("a.bias") / 2}
    traced = trace(model, x, None, progress=False)
    scaled = TorchRunner(model, traced.calibration.graph, dict(traced.calibration.folds), None, halved)
    np.testing.assert_allclose(scaled.normal("a.weight")[1], model.norm.weight.detach().numpy() / 2, rtol=1e-5)
    with pytest.raises(DataError, match="need calibration data"):
        scaled.regressions(None, [Request("a.weight")])


def test_a_seeded_sample_of_rows_where_there_are_many(monkeypatch):
    monkeypatch.setattr("whet.torch.moments.ROWS", 20)
    _, _, plan, runner = case()
    first, second = (runner.regressions(plan, [Request("b.weight")])["b.weight"][0] for _ in range(2))
    assert first.count == 20
    np.testing.assert_array_equal(first.second, second.second)


def test_shared_weights_take_the_rows_of_all_their_calls():
    model, inputs = zoo_torch.CASES["siamese"]()
    data = Batches([inputs], "calibration")
    traced = trace(model, inputs, data, progress=False)
    graph = traced.calibration.graph
    runner = TorchRunner(model, graph, dict(traced.calibration.folds), data, {})
    weights = {str(node.weight) for node in graph.nodes if node.op == "linear"}
    found = runner.regressions(None, [Request(name) for name in sorted(weights)])
    rows = {name: sum(node.weight == name for node in graph.nodes) for name in weights}
    twice = next(name for name, count in rows.items() if count == 2)
    once = next(name for name, count in rows.items() if count == 1)
    assert found[twice][0].count == 2 * found[once][0].count


@pytest.fixture
def copies(monkeypatch):
    """Weak references to the simulated copies that are made, with Python's search for cycles off."""
    made = []

    def noted(model, plan):
        work = rounded_copy(model, plan)
        made.append(weakref.ref(work))
        return work

    for module in (moments, block_rounding):
        monkeypatch.setattr(module, "rounded_copy", noted)
    gc.collect()
    gc.disable()
    yield made
    gc.enable()


def test_the_simulated_copy_is_freed_at_once(copies):
    _, _, plan, runner = case()
    runner.regressions(plan, [Request("b.weight")])
    assert len(copies) == 1 and copies[0]() is None


def test_copies_that_learn_blocks_are_freed_at_once(copies):
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # the first one of a process imports more of torch, and holds its callers
    model, inputs = zoo_torch.CASES["residual"]()
    spec = Quantize(Int(3), rounding=AdaRound(steps=8, blocks=True))
    whet.quantize(model, spec, calibration=[inputs], progress=False)
    assert len(copies) > 2 and {copy() for copy in copies} == {None}
