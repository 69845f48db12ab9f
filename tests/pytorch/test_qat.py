"""Quantization-aware training in PyTorch: begins at and ends in what is simulated and exported, in any training loop."""

import copy
import io
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.distributed import fsdp
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import whet
import zoo_torch
from torch_parts import batches, examples, small, state_of
from whet import torch as side
from whet.data import Batches
from whet.errors import DataError, ModelError, SpecError
from whet.graph.learning import into_bins
from whet.numerics.affine import QParams
from whet.specs import (
    GPTQ,
    NF4,
    QAT,
    TARGETS,
    BiasCorrection,
    CrossLayer,
    Distill,
    Dynamic,
    EarlyStopping,
    Int,
    PerGroup,
    PerTensor,
    Prune,
    Quantize,
    Train,
)
from whet.torch.fold import folded_weights
from whet.torch.interception import interceptor_of
from whet.torch.learned import LEAST_FACTOR, Lattice, RoundThrough, rate_of
from whet.torch.model import call, primary, to_tensors

ACTIVATIONS = Int(4, symmetric=False, granularity=PerTensor())
LOW = Quantize(Int(3), ACTIVATIONS, qat=QAT())


def prepared_zoo(name, spec=LOW, **options):
    model, inputs = zoo_torch.CASES[name]()
    spec = Quantize(spec.weights, None, qat=spec.qat) if name == "tied" else spec
    prepared = side.prepare(model, spec, calibration=[inputs], example=inputs, progress=False, **options)
    return model, prepared, to_tensors(inputs, "cpu")


def train_a_little(model, inputs, steps=2, rate=1e-2, kind=torch.optim.Adam, loss=None):
    optimizer = kind([p for p in model.parameters() if p.requires_grad], rate)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = primary(call(model, inputs))
        (outputs.float().square().mean() if loss is None else loss(outputs)).backward()
        optimizer.step()
    return optimizer


def outputs_of(model, inputs):
    with torch.no_grad():
        return primary(call(model.eval(), inputs))


def plan_of(model, inputs, spec):
    plan, _ = side.quantize(
        model,
        spec,
        TARGETS["onnxruntime"],
        calibration=Batches([inputs], "calibration"),
        example=Batches([inputs], "example").first()[0],
        progress=False,
    )
    return plan


@pytest.mark.parametrize("bounds", [(-8.0, 7.0), (0.0, 15.0), (-3.0, 12.0)])
def test_gradients_are_those_of_lsq(bounds):
    rng, (low, high) = np.random.default_rng(0), bounds
    x, g, s, f = rng.normal(size=999) * 6, rng.normal(size=999), 0.7, 1.3
    v = x / (s * f)
    inside = (v >= low) & (v <= high)
    by_scale = np.sum(g * np.where(inside, np.round(v) - v, np.clip(np.round(v), low, high)))
    xs, factor = torch.tensor(x, dtype=torch.float32, requires_grad=True), torch.tensor(f, requires_grad=True)
    rate = rate_of(333, high)
    y = RoundThrough.apply(xs, torch.tensor(s), factor, None, None, Lattice(low, high, rate))
    y.backward(torch.tensor(g, dtype=torch.float32))
    np.testing.assert_allclose(y.detach(), s * f * np.clip(np.round(v), low, high), rtol=1e-5)
    np.testing.assert_allclose(xs.grad, np.where(inside, g, 0), rtol=1e-6)
    assert rate == 1 / math.sqrt(333 * high) and not inside.all()
    np.testing.assert_allclose(factor.grad, rate * by_scale / s, rtol=1e-4)


@pytest.mark.parametrize("kind", ["channels", "groups", "zero points", "masked"])
def test_gradients_of_many_scales_are_those_of_each(kind):
    rng = np.random.default_rng(1)
    x, g = rng.normal(size=(4, 10)), rng.normal(size=(4, 10))
    size, count = (4, 3) if kind == "groups" else (10, 1)
    base = rng.uniform(0.1, 0.4, (4, count))
    zero = rng.integers(-2, 3, (4, count)) if kind == "zero points" else np.zeros((4, count))
    mask = rng.random((4, 10)) > 0.5 if kind == "masked" else np.ones((4, 10), bool)
    xs = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    factor = torch.ones(4, count, requires_grad=True)
    y = RoundThrough.apply(
        xs,
        torch.tensor(base, dtype=torch.float32),
        factor,
        torch.tensor(zero, dtype=torch.float32) if kind == "zero points" else None,
        torch.tensor(mask) if kind == "masked" else None,
        Lattice(-4, 3, 0.25, (1, size) if kind == "groups" else None),
    )
    y.backward(torch.tensor(g, dtype=torch.float32))
    wanted, into_x, into_factor = np.zeros((4, 10)), np.zeros((4, 10)), np.zeros((4, count))
    for i in range(4):
        for j in range(10):
            k = j // size
            s, low, high = base[i, k], -4 - zero[i, k], 3 - zero[i, k]
            v = x[i, j] / s if mask[i, j] else 0.0
            inside = low <= v <= high
            wanted[i, j] = s * np.clip(np.round(v), low, high)
            into_x[i, j] = g[i, j] if inside and mask[i, j] else 0.0
            into_factor[i, k] += 0.25 / s * g[i, j] * ((np.round(v) - v) if inside else np.clip(np.round(v), low, high))
    np.testing.assert_allclose(y.detach(), wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(xs.grad, into_x, rtol=1e-6)
    np.testing.assert_allclose(factor.grad, into_factor, rtol=1e-4, atol=1e-5)


def test_scales_of_zero_channels_do_not_train_and_factors_have_a_floor():
    x = torch.zeros(2, 3, requires_grad=True)
    base, factor = torch.tensor([[2.0**-60], [1.0]]), torch.tensor([[1.0], [LEAST_FACTOR / 2]], requires_grad=True)
    y = RoundThrough.apply(x + 3, base, factor, None, None, Lattice(-4, 3))
    assert y[1, 0].item() == 3 * LEAST_FACTOR
    y.sum().backward()
    assert factor.grad.tolist() == [[0.0], [0.0]]  # it would shrink further
    factor.grad = None
    (-RoundThrough.apply(x + 3, base, factor, None, None, Lattice(-4, 3))).sum().backward()
    assert float(factor.grad[1, 0]) == -9.0


def test_a_step_of_sgd_moves_the_scale_as_if_it_were_trained_itself():
    x, base = torch.linspace(-1, 1, 64), torch.tensor(0.07)
    factor = torch.ones((), requires_grad=True)
    lattice = Lattice(-8, 7, 0.1)
    RoundThrough.apply(x, base, factor, None, None, lattice).square().sum().backward()
    with_one = torch.ones((), requires_grad=True)
    RoundThrough.apply(x, torch.tensor(1.0), with_one, None, None, Lattice(-8, 7, 0.1))
    v = x / base
    inside = (v >= -8) & (v <= 7)
    own = torch.where(inside, v.round() - v, v.clamp(-8, 7)) * 2 * (v.round().clamp(-8, 7) * base)
    moved = base * (1 - 0.01 * factor.grad)
    torch.testing.assert_close(moved, base - 0.01 * 0.1 * own.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(zoo_torch.CASES))
def test_it_begins_at_the_simulation_learns_everything_and_ends_in_the_simulation(name):
    model, prepared, inputs = prepared_zoo(name)
    before = state_of(model)
    plan = interceptor_of(prepared).plan
    assert type(prepared) is type(model)
    assert torch.equal(outputs_of(prepared, inputs), outputs_of(side.simulate(model, plan), inputs))
    train_a_little(prepared, inputs)
    silent = [n for n, p in prepared.named_parameters() if p.requires_grad and p.grad is None and "branch" not in n]
    assert silent == [] or name in ("branching", "attention", "siamese")
    float_model, trained = side.finish(prepared)
    assert torch.equal(outputs_of(prepared, inputs), outputs_of(side.simulate(float_model, trained), inputs))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert float_model.state_dict().keys() == model.state_dict().keys() and interceptor_of(float_model) is None
    assert any(not np.array_equal(trained.weights[n].scale, plan.weights[n].scale) for n in plan.weights)
    assert {n: p.requires_grad for n, p in float_model.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("affine", [True, False])
def test_folding_the_result_again_gives_the_trained_weights_to_the_last_bit(affine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=affine), nn.BatchNorm2d(8, affine=affine), nn.ReLU()).eval()
    x = zoo_torch.normal(16, 3, 8, 8)
    prepared = side.prepare(model, LOW, calibration=[x], progress=False)
    train_a_little(prepared, torch.from_numpy(x))
    float_model, plan = side.finish(prepared)
    folded = folded_weights(float_model, dict(plan.folds))
    assert torch.equal(folded["0.weight"], prepared[0].weight) and torch.equal(folded["0.bias"], prepared[0].bias)
    stored = side.convert(prepared).state_dict()  # prepare, train, convert: without the plan in between
    codes = torch.from_numpy(plan.encode("0.weight", folded["0.weight"].detach().numpy()))
    assert stored["0.weight"].dtype == torch.int8 and torch.equal(stored["0.weight"].int(), codes)
    assert (float_model[0].bias is None) == (not affine) and prepared[0].bias.abs().min() > 0


def test_post_training_choices_are_where_it_begins():
    model, inputs = zoo_torch.CASES["residual"]()
    spec = Quantize(Int(4), ACTIVATIONS, rounding=GPTQ(), correct_bias=BiasCorrection(), equalize=CrossLayer(), qat=QAT())
    plan = plan_of(model, inputs, spec)
    assert plan.codes and plan.tensors
    prepared = side.prepare(model, spec, calibration=[inputs], progress=False)
    tensors = to_tensors(inputs, "cpu")
    assert torch.equal(outputs_of(prepared, tensors), outputs_of(side.simulate(model, plan), tensors))


def test_weights_are_moved_no_further_than_their_codes_need():
    array = np.float32([[0.04, 0.26, -3.0, 3.0]])
    params = QParams(np.float32([0.1]), np.zeros(1, np.int32), Int(4), 0)
    moved = into_bins(array, params, np.int32([[1, 3, -8, 7]]))
    np.testing.assert_allclose(moved, [[0.0501, 0.26, -3.0, 3.0]], rtol=1e-5)
    assert params.encode(moved).tolist() == [[1, 3, -8, 7]]


def test_the_exported_file_computes_what_the_prepared_model_does(tmp_path):
    _, prepared, inputs = prepared_zoo("residual")
    train_a_little(prepared, inputs, 3)
    made = whet.finish(prepared, example=inputs.numpy())
    assert made.is_simulated and made.target == "onnxruntime"
    file = made.export(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    np.testing.assert_allclose(found, outputs_of(prepared, inputs), atol=1e-5)
    made.save(tmp_path / "saved")
    again = whet.load(tmp_path / "saved", model=lambda: zoo_torch.CASES["residual"]()[0])
    assert torch.equal(outputs_of(again.model, inputs), outputs_of(made.model, inputs))


@pytest.mark.parametrize("scheme", [Int(4, granularity=PerGroup(4)), Int(4, symmetric=False), Int(8, granularity=PerTensor())])
def test_weights_alone_in_every_uniform_scheme(scheme):
    _, prepared, inputs = prepared_zoo("residual", Quantize(scheme, None, qat=QAT()))
    plan = interceptor_of(prepared).plan
    train_a_little(prepared, inputs)
    float_model, trained = side.finish(prepared)
    assert torch.equal(outputs_of(prepared, inputs), outputs_of(side.simulate(float_model, trained), inputs))
    assert all(trained.weights[n].scale.shape == plan.weights[n].scale.shape for n in plan.weights)


def test_sixteen_bit_models_train_in_float32():
    model, inputs = zoo_torch.CASES["residual"]()
    prepared = side.prepare(model.to(torch.bfloat16), LOW, calibration=[inputs], progress=False)
    assert all(p.dtype == torch.float32 for p in prepared.parameters())


# ---------------------------------------------------------------------------------------- in the user's own loop


def loss_of(outputs):
    return F.cross_entropy(outputs.float(), torch.arange(len(outputs)) % outputs.shape[-1])


def same_after(one, two, inputs):
    for model in (one, two):
        train_a_little(model, inputs, 2, loss=loss_of)
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_copies_and_pickles_train_alike():
    _, prepared, inputs = prepared_zoo("residual")
    train_a_little(prepared, inputs, 1, loss=loss_of)
    twin = copy.deepcopy(prepared)
    other = pickle.loads(pickle.dumps(prepared))
    reference = copy.deepcopy(prepared)
    assert interceptor_of(twin).model is twin and interceptor_of(other).model is other
    assert same_after(reference, twin, inputs) and same_after(copy.deepcopy(prepared), other, inputs)
    assert not torch.equal(twin.state_dict()["conv1.weight"], prepared.state_dict()["conv1.weight"])


@pytest.mark.parametrize("observe", [0.0, 0.5])
def test_a_state_dict_resumes_to_the_same_result(observe):
    spec = Quantize(Int(3), ACTIVATIONS, qat=QAT(observe=observe))
    _, prepared, inputs = prepared_zoo("residual", spec, steps=8)
    optimizer = torch.optim.Adam([p for p in prepared.parameters() if p.requires_grad], 1e-2)

    def step(model, optimizer):
        model.train()
        optimizer.zero_grad()
        loss_of(model(inputs)).backward()
        optimizer.step()

    for _ in range(3):
        step(prepared, optimizer)
    stored = io.BytesIO()
    torch.save({"model": prepared.state_dict(), "optimizer": optimizer.state_dict()}, stored)
    stored.seek(0)
    saved = torch.load(stored, weights_only=True)
    _, resumed, _ = prepared_zoo("residual", spec, steps=8)
    resumed.load_state_dict(saved["model"])
    other = torch.optim.Adam([p for p in resumed.parameters() if p.requires_grad], 1e-2)
    other.load_state_dict(saved["optimizer"])
    for _ in range(4):
        step(prepared, optimizer)
        step(resumed, other)
    a, b = side.finish(prepared), side.finish(resumed)
    assert torch.equal(outputs_of(side.simulate(*a), inputs), outputs_of(side.simulate(*b), inputs))


def test_distributed_data_parallel(tmp_path):
    _, prepared, inputs = prepared_zoo("residual")
    alone = copy.deepcopy(prepared)
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(prepared)
        train_a_little(wrapped, inputs, 3, loss=loss_of)
        with pytest.raises(ModelError, match=r"model\.module"):
            side.finish(wrapped)
        found = outputs_of(side.simulate(*side.finish(wrapped.module)), inputs)
    finally:
        torch.distributed.destroy_process_group()
    train_a_little(alone, inputs, 3, loss=loss_of)
    torch.testing.assert_close(found, outputs_of(side.simulate(*side.finish(alone)), inputs))


class Block(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(before, after, 3, bias=False), nn.BatchNorm2d(after)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


def test_fully_sharded_blocks_learn_the_same(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Block(3, 4), Block(4, 4), nn.Flatten(), nn.Linear(64, 5)).eval()
    x = zoo_torch.normal(8, 3, 8, 8)
    prepared = side.prepare(model, LOW, calibration=[x], progress=False)
    sharded = copy.deepcopy(prepared)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for part in (sharded[0], sharded[1], sharded[3], sharded):
            fsdp.fully_shard(part, mesh=mesh)
        for made in (prepared, sharded):
            train_a_little(made, torch.from_numpy(x), 3, 0.1, torch.optim.SGD)
        for (name, one), (_, two) in zip(prepared.named_parameters(), sharded.named_parameters(), strict=True):
            torch.testing.assert_close(two.full_tensor(), one.data, msg=name)
    finally:
        torch.distributed.destroy_process_group()
    assert float(prepared[0].conv.weight_factor.sum()) != 4.0


RANK_1 = """
import pickle, sys
import torch
folder, support = sys.argv[1:]
sys.path.insert(0, support)
torch.set_num_threads(1)
prepared, inputs = pickle.load(open(folder + "/prepared", "rb"))
torch.distributed.init_process_group("gloo", init_method="file://" + folder + "/store", rank=1, world_size=2)
wrapped = torch.nn.parallel.DistributedDataParallel(prepared)
optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
for _ in range(2):
    optimizer.zero_grad()
    wrapped.train()(inputs[1::2]).square().mean().backward()
    optimizer.step()
torch.save(prepared.state_dict(), folder + "/1.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_learn_one_set_of_scales(tmp_path):
    _, prepared, inputs = prepared_zoo("residual")
    before = state_of(prepared)
    (tmp_path / "prepared").write_bytes(pickle.dumps((prepared, inputs)))
    support = os.path.dirname(zoo_torch.__file__)
    other = subprocess.Popen([sys.executable, "-c", RANK_1, str(tmp_path), support])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=2)
    try:
        train_a_little(nn.parallel.DistributedDataParallel(prepared), inputs[::2], 2, 0.1, torch.optim.SGD)
        assert other.wait(60) == 0
    finally:
        torch.distributed.destroy_process_group()
        other.kill()
    one, two = prepared.state_dict(), torch.load(tmp_path / "1.pt", weights_only=True)
    assert all(torch.equal(one[name], two[name]) for name in one if "num_batches" not in name)
    moved = [name for name in one if name.endswith("_factor") and not torch.equal(one[name], before[name])]
    assert len(moved) > 3


def test_autocast_keeps_ranges_in_float32():
    _, prepared, inputs = prepared_zoo(
        "residual", Quantize(Int(8), Int(8, symmetric=False, granularity=PerTensor()), qat=QAT())
    )
    exact = copy.deepcopy(prepared).train()(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = prepared.train()(inputs)
    loss_of(outputs).backward()
    assert outputs.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in prepared.parameters() if p.requires_grad)
    assert (outputs.float() - exact).abs().max() < 0.1 * exact.abs().max()


class Blocks(nn.Module):
    """Two blocks that may be recomputed in the backward pass; behind them a layer that is called twice."""

    def __init__(self, reentrant=None, shared=False):
        super().__init__()
        self.one = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8)
        self.reentrant, self.shared = reentrant, shared

    def run(self, block, x):
        return block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)

    def forward(self, x):
        y = self.run(self.three, torch.relu(self.run(self.one, x)))
        y = torch.relu(self.two(y))
        return self.run(self.two, y) if self.shared else self.two(y)


@pytest.mark.parametrize("observe", [0.0, 1.0])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_blocks_have_the_same_gradients(reentrant, observe):
    torch.manual_seed(0)
    model, x = Blocks(reentrant).eval(), torch.randn(32, 6)
    spec = Quantize(Int(4), ACTIVATIONS, qat=QAT(observe=observe))
    prepared = side.prepare(model, spec, calibration=[x.numpy()], steps=3, progress=False)
    plain = copy.deepcopy(prepared)
    plain.reentrant = None
    for _ in range(2):
        for made in (prepared, plain):
            made.train().zero_grad()
            made(x.clone().requires_grad_()).square().sum().backward()
        for (name, p), (_, q) in zip(prepared.named_parameters(), plain.named_parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, p), (_, q) in zip(prepared.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_shared_layer_that_is_recomputed_is_refused(reentrant):
    x = zoo_torch.normal(32, 6)
    prepared = side.prepare(Blocks(reentrant, shared=True).eval(), LOW, calibration=[x], progress=False)
    with pytest.raises(ModelError, match="'two' runs 2 times"):
        prepared.train()(torch.from_numpy(x).requires_grad_()).sum().backward()


def test_compiled_models_train_alike():
    inputs = torch.from_numpy(zoo_torch.normal(32, 6))
    prepared = side.prepare(Blocks().eval(), LOW, calibration=[inputs.numpy()], progress=False)
    plain = copy.deepcopy(prepared)
    train_a_little(torch.compile(prepared, backend="eager"), inputs, 2, loss=loss_of)
    train_a_little(plain, inputs, 2, loss=loss_of)
    torch.testing.assert_close(outputs_of(prepared, inputs), outputs_of(plain, inputs))


def test_batches_of_any_size_and_layout():
    _, prepared, inputs = prepared_zoo("residual")
    prepared.train()
    whole = prepared(inputs)
    torch.testing.assert_close(torch.cat([prepared(inputs[i : i + 1]) for i in range(len(inputs))]), whole)
    loss_of(prepared(inputs[:1])).backward()
    grads = {n: p.grad.clone() for n, p in prepared.named_parameters() if p.requires_grad}
    prepared.zero_grad()
    loss_of(prepared.to(memory_format=torch.channels_last)(inputs[:1].to(memory_format=torch.channels_last))).backward()
    for name, p in prepared.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-5)


def test_batch_norms_that_cannot_be_folded_keep_their_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = zoo_torch.normal(16, 3, 8, 8)
    prepared = side.prepare(model, LOW, calibration=[x], progress=False)
    train_a_little(prepared, torch.from_numpy(x))
    assert torch.equal(prepared[0].running_mean, model[0].running_mean)
    assert prepared[0].weight.grad is not None and len(list(prepared.children())) == 5


# ---------------------------------------------------------------------------------------- ranges that are observed


def test_ranges_are_moving_averages_until_they_are_frozen():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    x = zoo_torch.normal(64, 4)
    spec = Quantize(Int(8), ACTIVATIONS, qat=QAT(observe=0.5))
    prepared = side.prepare(model, spec, calibration=[x], steps=4, progress=False).train()
    begin = float(prepared.quantize_input_0_low), float(prepared.quantize_input_0_high)
    plan = interceptor_of(prepared).plan
    assert begin[1] - begin[0] == pytest.approx(15 * float(plan.values["input:0"].scale))
    factor = prepared.quantize_input_0_factor
    for step, wide in enumerate((2.0, 3.0, 5.0, 7.0)):
        prepared.zero_grad()
        prepared(torch.from_numpy(x * wide)).square().sum().backward()
        assert (float(factor.grad) == 0) == (step < 2)
    low = 0.9 * (0.9 * begin[0] + 0.1 * 2 * x.min()) + 0.1 * 3 * x.min()
    assert float(prepared.quantize_input_0_low) == pytest.approx(low, rel=1e-5)
    assert float(prepared.quantize_input_0_seen) == 2
    prepared.eval()(torch.from_numpy(x * 9))
    assert float(prepared.quantize_input_0_low) == pytest.approx(low, rel=1e-5)
    _, trained = side.finish(prepared)
    ends = low, float(prepared.quantize_input_0_high)
    assert float(trained.values["input:0"].scale) == pytest.approx((ends[1] - ends[0]) / 15, rel=1e-5)


def test_without_learned_scales_the_plan_keeps_its_own():
    spec = Quantize(Int(3), ACTIVATIONS, qat=QAT(learn_scale=False))
    _, prepared, inputs = prepared_zoo("residual", spec)
    plan = interceptor_of(prepared).plan
    train_a_little(prepared, inputs)
    _, trained = side.finish(prepared)
    assert not any("factor" in name for name, _ in prepared.named_parameters())
    assert all(trained.values[v].scale == plan.values[v].scale for v in plan.values)


# ---------------------------------------------------------------------------------------- the verbs


def test_the_verb_trains_what_is_exported_and_keeps_masks(tmp_path):
    x, y = examples(96)
    pruned = whet.prune(small(), Prune(0.5))
    spec = Quantize(Int(3), ACTIVATIONS, qat=QAT(epochs=6, learning_rate=0.01))
    before = whet.quantize(pruned, Quantize(Int(3), ACTIVATIONS), calibration=[x], progress=False)
    options = {"calibration": [x], "train": batches(), "val": batches(48, seed=1), "progress": False}
    made = whet.quantize(pruned, spec, fit=Train(weight_decay=0.01), **options)
    loss = {m: float(F.cross_entropy(outputs_of(m.model, torch.from_numpy(x)), torch.from_numpy(y))) for m in (before, made)}
    assert loss[made] < 0.8 * loss[before]
    assert len(made.steps) == 2 and len(made.steps[-1].train["history"]) == 6
    assert {row["algorithm"] for row in made.steps[-1].changed} == {"QAT"}
    assert made.steps[-1].train["history"][0]["sparsity"] == pytest.approx(0.5, abs=0.01)
    for name, mask in made.masks.items():
        weight = dict(made.float_model.named_parameters())[name].detach().numpy()
        assert not weight[mask == 0].any() and not made.plan.encode(name, weight)[mask == 0].any()
    session = onnxruntime.InferenceSession(str(made.export(tmp_path / "model.onnx")))
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(found, outputs_of(made.model, torch.from_numpy(x)), atol=1e-4)


def test_a_recipe_trains_with_the_original_as_teacher_and_waits_for_frozen_ranges():
    spec = Quantize(Int(4), qat=QAT(epochs=4, learning_rate=1e-3, teacher=True, observe=0.6))
    made = whet.compress(
        small(), train=batches(), val=batches(48, seed=1), recipe=[spec], budget=whet.Budget(max_drop=1.0), progress=False
    )
    (step,) = made.steps
    assert [row["eligible"] for row in step.train["history"]] == [False, False, True, True]
    assert step.train["stop"]["best_epoch"] > 2
    assert made.report.data["compressed"]["placement"]["quantized_weights"] == 2
    stopped = Train(early_stopping=EarlyStopping(patience=1), apply=[Distill()])
    again = whet.quantize(small(), spec, fit=stopped, calibration=[examples()[0]], train=batches(), progress=False)
    assert again.steps[-1].train["stop"]["epochs"] >= 3


def test_what_cannot_be_trained_is_said():
    x = examples()[0]
    with pytest.raises(DataError, match="needs train="):
        whet.quantize(small(), LOW, calibration=[x], progress=False)
    with pytest.raises(SpecError, match="qat=QAT"):
        whet.quantize(small(), Quantize(), fit=Train(), calibration=[x], progress=False)
    with pytest.raises(SpecError, match="Prune before"):
        whet.quantize(small(), LOW, fit=Train(apply=[Prune(0.5)]), calibration=[x], train=batches(), progress=False)
    with pytest.raises(SpecError, match=r"NF4.*Int"):
        side.prepare(small(), Quantize(NF4(), None, qat=QAT()), calibration=[x], progress=False)
    with pytest.raises(SpecError, match="Dynamic"):
        side.prepare(small(), Quantize(Int(8), Dynamic(), qat=QAT()), calibration=[x], progress=False)
    with pytest.raises(SpecError, match="steps="):
        side.prepare(small(), Quantize(qat=QAT(observe=0.5)), calibration=[x], progress=False)
    with pytest.raises(DataError, match="calibration= or example="):
        side.prepare(small(), LOW, progress=False)
    with pytest.raises(ModelError, match=r"whet\.torch\.prepare"):
        side.finish(small())
    with pytest.raises(ModelError, match="A mask is for"):
        side.prepare(small(), LOW, calibration=[x], masks={"nothing": np.ones(3)}, progress=False)


def test_a_model_that_diverged_is_refused():
    prepared = side.prepare(small(), LOW, calibration=[examples()[0]], progress=False)
    with torch.no_grad():
        prepared.head.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match=r"head\.weight.*Lower the learning rate"):
        side.finish(prepared)


def test_layers_with_more_bits_read_finer_values():
    spec = Quantize(Int(4), ACTIVATIONS, overrides={"conv": Int(8), "head": Int(6)})
    plan = plan_of(small(), examples()[0], spec)
    bits = {name: params.bits for name, params in plan.values.items()}
    read = {plan.biases[f"{layer}.bias"][0]: bits[plan.biases[f"{layer}.bias"][0]] for layer in ("conv", "head")}
    assert sorted(read.values()) == [6, 8] and bits["input:0"] == 8
    assert {params.bits for params in plan_of(small(), examples()[0], Quantize(Int(4), ACTIVATIONS)).values.values()} == {4}
