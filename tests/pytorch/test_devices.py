"""A model on another device is quantized there, to the codes that the CPU gives it."""

import numpy as np
import pytest
import torch
from torch import nn

import whet
from whet import GPTQ, QAT, BiasCorrection, Int, Quantize

X = np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype(np.float32)
SPECS = [Quantize(), Quantize(Int(4), rounding=GPTQ(), correct_bias=BiasCorrection())]
NO_DEVICE = "there is no CUDA device"
DEVICES = ["cpu:0", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_DEVICE))]


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)]
        return nn.Sequential(*parts).eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=["nearest", "GPTQ"])
def test_the_codes_are_those_of_the_cpu(device, spec):
    here, there = (whet.quantize(net().to(place), spec, calibration=X, progress=False) for place in ("cpu", device))
    kind = torch.device(device).type
    assert all(p.device.type == kind for p in (*there.model.parameters(), *there.model.buffers()))
    outputs = [made.side.predict(made.model, X) for made in (here, there)]
    assert np.abs(outputs[0] - outputs[1]).max() <= 1e-3 * np.abs(outputs[0]).max()
    for name, params in here.plan.weights.items():
        other = there.plan.weights[name]
        assert np.allclose(params.scale, other.scale, rtol=1e-5) and params.scale.shape == other.scale.shape
        if name in here.plan.codes:
            assert np.mean(here.plan.codes[name] != there.plan.codes[name]) <= 0.01


@pytest.mark.parametrize("device", DEVICES)
def test_it_trains_there(device):
    prepared = whet.torch.prepare(net().to(device), Quantize(Int(4), qat=QAT()), calibration=X, progress=False).train()
    kind = torch.device(device).type
    assert {p.device.type for p in (*prepared.parameters(), *prepared.buffers())} == {kind}
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-2)
    x = torch.from_numpy(X).to(device)
    losses = []
    for _ in range(5):
        loss = prepared(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model, plan = whet.torch.finish(prepared)
    assert {p.device.type for p in model.parameters()} == {kind} and plan.weights
