"""Removal by rebuild="graph": the graph trains, quantizes, exports, is copied and saved like any model."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import whet
import whet.runtimes.sessions
import zoo_torch
from torch_parts import same_state, seeded, state_of
from whet.data import leaves
from whet.specs import QAT, Channel, Head, Prune, Quantize
from whet.torch import finish, predict, prepare

HALF = Prune(0.5, granularity=Channel(), round_to=1, rebuild="graph")
REBUILT = {
    "residual": (Channel(), {"conv3.weight": 0.25}),
    "decoder": (Channel(), {"fc.weight": 0.5}),
    "fused_qkv": (Head(), {"qkv.weight": 0.5, "proj.weight": 0.5}),
    "grouped_query": (Head(), {"q.weight": 0.5, "k.weight": 0.5}),
    "attention": (Head(), {"attn.in_proj_weight": 0.5}),
    "tied": (Channel(), {"emb.weight": 0.5}),
    "siamese": (Channel(), {"branch.0.weight": 0.5}),
    "grouped": (Channel(), {"grouped.weight": 0.25}),
}


@pytest.mark.parametrize("name", REBUILT)
def test_a_rebuilt_graph_loses_what_the_models_code_fixes(name, tmp_path) -> None:
    granularity, left = REBUILT[name]
    model, inputs = zoo_torch.CASES[name]()
    before = state_of(model)
    made = whet.prune(model, Prune(0.5, granularity=granularity, round_to=1, rebuild="graph"), example=inputs)
    assert isinstance(made.model, torch.fx.GraphModule) and same_state(before, state_of(model))
    for tensor, share in left.items():
        assert made.model.get_parameter(tensor).numel() == share * model.get_parameter(tensor).numel()
    some = {key: value[:3] for key, value in inputs.items()} if isinstance(inputs, dict) else inputs[:3]
    all_of_it = leaves(predict(made.model, inputs))
    for few, every in zip(leaves(predict(made.model, some)), all_of_it, strict=True):
        np.testing.assert_allclose(few, every[:3], atol=1e-5)  # any batch size
    made.save(tmp_path / "saved")
    again = whet.load(tmp_path / "saved", lambda: zoo_torch.CASES[name]()[0])
    for one, two in zip(leaves(predict(again.model, inputs)), all_of_it, strict=True):
        np.testing.assert_array_equal(one, two)
    if name == "tied":
        assert again.model.get_parameter("head.weight") is again.model.get_parameter("emb.weight")
    made.export(tmp_path / "model.onnx")
    session = whet.runtimes.sessions.open_session(tmp_path / "model.onnx")
    assert leaves(session.run(inputs))[0].shape == all_of_it[0].shape


def test_a_rebuilt_graph_can_be_pruned_and_trained_further(tmp_path) -> None:
    model, inputs = zoo_torch.CASES["residual"]()
    spec = Prune(0.5, granularity=Channel(), round_to=1, rebuild="graph")
    smaller = whet.prune(whet.prune(model, Prune(0.25, granularity=Channel(), round_to=1), example=inputs), spec)
    twice = whet.prune(smaller, spec)
    data = [(inputs, np.arange(len(inputs)) % 5)]
    trained = whet.fit(twice, whet.Train(epochs=2, learning_rate=1e-2), train=data, progress=False)
    assert trained.steps[-1].train["history"][1]["loss"] < trained.steps[-1].train["history"][0]["loss"]
    assert trained.model.get_parameter("conv2.weight").shape[0] == 3
    trained.save(tmp_path / "saved")
    again = whet.load(tmp_path / "saved", zoo_torch.Residual)
    np.testing.assert_array_equal(predict(again.model, inputs), predict(trained.model, inputs))


def test_a_rebuilt_graph_consists_of_the_models_layers_and_public_functions() -> None:
    model, inputs = zoo_torch.CASES["residual"]()
    graph = whet.prune(model, HALF, example=inputs).model
    assert type(graph.conv1) is nn.Conv2d and graph.conv1.out_channels == 4 == graph.bn1.num_features
    assert graph.conv1 is not model.conv1 and model.conv1.out_channels == 8
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert called == ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "fc"]
    assert not any(isinstance(node.target, torch._ops.OpOverload) for node in graph.graph.nodes)


class Trained(nn.Module):
    """Batch norm and dropout, as layers and as functions with the model's own flag; a frozen batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.frozen = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x):
        x = self.frozen(F.relu(self.bn(self.conv(x))))
        x = F.batch_norm(x, self.mean, self.var, training=self.training)
        return self.head(F.dropout(self.drop(x.mean((2, 3))), 0.5, self.training))


def test_a_rebuilt_graph_follows_train_and_eval() -> None:
    model, x = seeded(Trained), zoo_torch.normal(6, 3, 4, 4)
    model.train()
    model.frozen.eval()
    graph = whet.prune(model, HALF, example=x).model
    assert graph.training and graph.bn.training and not graph.frozen.training
    batch = torch.from_numpy(x)
    one, two = graph(batch), graph(batch)
    assert not torch.equal(one, two)  # dropout
    moved = {name for name, value in graph.named_buffers() if value.is_floating_point() and value.abs().sum() not in (0, 4)}
    assert moved == {"bn.running_mean", "bn.running_var", "mean", "var"} and int(graph.bn.num_batches_tracked) == 2
    graph.eval()
    before = {name: value.clone() for name, value in graph.named_buffers()}
    assert torch.equal(graph(batch), graph(batch))
    assert all(torch.equal(value, before[name]) for name, value in graph.named_buffers())


def test_a_rebuilt_graph_in_training_mode_is_the_silenced_original() -> None:
    """The batch statistics of what is left do not depend on what left: gradients and outputs agree in training mode too."""
    model, x = seeded(zoo_torch.Residual), torch.from_numpy(zoo_torch.CASES["residual"]()[1])
    spec = Prune(0.25, granularity=Channel(), round_to=1, include=("conv2",), rebuild="graph")
    graph = whet.prune(model, spec, example=x.numpy()).model
    kept = [i for i in range(16) if any(torch.equal(model.conv2.weight[i], w) for w in graph.conv2.weight)]
    assert len(kept) == 12
    with torch.no_grad():
        model.conv3.weight[:, [i for i in range(16) if i not in kept]] = 0
    one, two = model.train()(x), graph.train()(x)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    one.square().sum().backward()
    two.square().sum().backward()
    torch.testing.assert_close(model.conv2.weight.grad[kept], graph.conv2.weight.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["residual", "attention", "siamese", "functional"])
def test_a_rebuilt_graph_quantizes_and_its_file_computes_in_integers(name, tmp_path) -> None:
    model, inputs = zoo_torch.CASES[name]()
    spec = Prune(0.5, granularity=Head() if name == "attention" else Channel(), round_to=1, rebuild="graph")
    smaller = whet.prune(model, spec, example=inputs)
    made = whet.quantize(smaller, calibration=[inputs], progress=False)
    assert len(made.steps[-1].changed) >= 2
    made.export(tmp_path / "model.onnx")
    counted = whet.runtimes.sessions.open_session(tmp_path / "model.onnx").run(inputs)
    for found, simulated, real in zip(
        leaves(counted), leaves(predict(made.model, inputs)), leaves(predict(smaller.model, inputs)), strict=True
    ):
        assert 0 < np.abs(simulated - real).max() < 0.1 * np.abs(real).max()  # rounded, a little
        np.testing.assert_allclose(found, simulated, atol=0.03 * np.abs(real).max())


def test_a_rebuilt_graph_trains_with_rounding_and_is_copied_meanwhile() -> None:
    model, inputs = zoo_torch.CASES["residual"]()
    graph = whet.prune(model, HALF, example=inputs).model
    prepared = prepare(graph, Quantize(qat=QAT(epochs=1)), calibration=[inputs], progress=False)
    prepared.train()
    prepared(torch.from_numpy(inputs)).square().mean().backward()
    assert prepared.conv1.weight.grad is not None and bool(prepared.conv1.weight.grad.abs().sum() > 0)
    prepared.eval()
    twin, x = copy.deepcopy(prepared), torch.from_numpy(inputs)
    before = prepared(x)
    assert torch.equal(twin(x), before)  # rounded like the original
    with torch.no_grad():
        twin.conv1.weight.mul_(0.5)
    assert not torch.equal(twin(x), before) and torch.equal(prepared(x), before)
    plain, plan = finish(twin)
    assert len(plan.weights) == 4 and isinstance(plain, torch.fx.GraphModule)
