"""Prepared models in the user's own loops: copies, resuming, several processes, autocast, recomputed blocks, compiled."""

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributed import fsdp
from torch.utils.checkpoint import checkpoint

import zoo_torch
from torch_parts import state_of
from torch_qat import ACTIVATIONS, LOW, loss_of, outputs_of, prepared_zoo, same_after, train_a_little
from whet import torch as side
from whet.errors import ModelError
from whet.specs import (
    QAT,
    Int,
    PerTensor,
    Quantize,
)
from whet.torch.interception import interceptor_of


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
