"""A CUDA device against the CPU: the same codes, training in bfloat16, compiled and in one distributed process; losses to 1e-5.

    python benchmarks/cuda_device.py

Prints one line for each check; 1 when one fails, 2 when there is no CUDA device.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import whet
from whet.specs import GPTQ, MSE, QAT, AdaRound, BiasCorrection, Distill, Int, PerGroup, Prune, Quantize, Train

SPECS = {
    "W8A8": Quantize(),
    "W4, groups of 8": Quantize(Int(4, granularity=PerGroup(8)), None),
    "W4A8, GPTQ": Quantize(Int(4), rounding=GPTQ(), weight_observer=MSE(), correct_bias=BiasCorrection()),
    "W4A8, AdaRound": Quantize(Int(4), rounding=AdaRound(steps=100)),
}


def net() -> nn.Module:
    """A small convolutional network from one seed."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(16 * 36, 10)).eval()


def data(count: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Images and classes from one seed."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 3, 16, 16)).astype(np.float32), rng.integers(0, 10, count)


def codes(device: str) -> str:
    """How many weights have other codes than on the CPU, with every algorithm."""
    x, _ = data()
    said = []
    for name, spec in SPECS.items():
        made = [whet.quantize(net().to(place), spec, calibration=x, progress=False) for place in ("cpu", device)]
        found = [{key: _codes(one, key) for key in one.plan.weights} for one in made]
        other = sum(int(np.sum(found[0][key] != found[1][key])) for key in found[0])
        total = sum(array.size for array in found[0].values())
        said.append(f"{name}: {other} of {total}")
        if other > (0 if "GPTQ" not in name and "AdaRound" not in name else total // 100):
            raise RuntimeError(f"{name}: {other} of {total} codes differ from those of the CPU")
    return "other codes than on the CPU: " + "; ".join(said)


def _codes(made: Any, name: str) -> np.ndarray:
    if name in made.plan.codes:
        return np.asarray(made.plan.codes[name])
    tensor = dict(made.convert().named_buffers()).get(name)
    if tensor is None:
        weight = dict(made.float_model.named_parameters())[name].detach().float().cpu().numpy()
        return np.asarray(made.plan.weights[name].encode(weight))
    return np.asarray(tensor.cpu().numpy())


def bfloat16(device: str) -> str:
    """QAT under autocast: the loss falls, and scales stay float32."""
    x, y = (torch.from_numpy(array).to(device) for array in data())
    model = whet.torch.prepare(net().to(device), Quantize(Int(4), qat=QAT()), calibration=data()[0], progress=False)
    losses = _steps(model, x, y, device)
    kinds = {p.dtype for name, p in model.named_parameters() if name.endswith("_factor")}
    if not losses[-1] < losses[0] or kinds != {torch.float32}:
        raise RuntimeError(f"losses {losses[0]:.3f} to {losses[-1]:.3f}, scales in {kinds}")
    whet.torch.finish(model)
    return f"QAT in bfloat16: loss {losses[0]:.3f} to {losses[-1]:.3f}"


def distributed(device: str) -> str:
    """QAT in DistributedDataParallel of one process."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    try:
        x, y = (torch.from_numpy(array).to(device) for array in data())
        model = whet.torch.prepare(net().to(device), Quantize(Int(4), qat=QAT()), calibration=data()[0], progress=False)
        losses = _steps(nn.parallel.DistributedDataParallel(model, device_ids=[0]), x, y, None)
        if not losses[-1] < losses[0]:
            raise RuntimeError(f"losses {losses[0]:.3f} to {losses[-1]:.3f}")
        whet.torch.finish(model)
        return f"QAT in one distributed process: loss {losses[0]:.3f} to {losses[-1]:.3f}"
    finally:
        torch.distributed.destroy_process_group()


def compiled(device: str, backend: str = "inductor") -> str:
    """`whet.fit` with a teacher and masks, plain and under torch.compile, in float32 and bfloat16: losses and masks."""
    x, y = data()
    said = []
    for precision in (None, "bfloat16"):
        ends = []
        for compile_by in (False, backend):
            spec = Train(epochs=3, apply=[Prune(0.5), Distill()], precision=precision, compile=compile_by)
            made = whet.fit(net(), spec, train=(x, y), teacher=net(), device=device, progress=False)
            ends.append((made.steps[-1].train["history"][-1]["loss"], made.masks))
        (plain, masks), (other, its) = ends
        apart = abs(plain - other) / abs(plain)
        if apart > (1e-3 if precision is None else 5e-2) or masks.keys() != its.keys():
            raise RuntimeError(f"{precision or 'float32'}: loss {plain:.5f} plain, {other:.5f} compiled")
        said.append(f"{precision or 'float32'} {plain:.5f} and {other:.5f}")
    return "loss after three epochs, plain and compiled: " + "; ".join(said)


def _steps(model: Any, x: Any, y: Any, autocast: str | None, count: int = 30) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    model.train()
    for _ in range(count):
        with torch.autocast(torch.device(autocast or "cpu").type, torch.bfloat16, enabled=autocast is not None):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def losses(device: str) -> str:
    """The soft targets' loss and its gradient, against the CPU."""
    torch.manual_seed(0)
    student, teacher = torch.randn(64, 10), torch.randn(64, 10)
    found = []
    for place in ("cpu", device):
        s = copy.deepcopy(student).to(place).requires_grad_(True)
        loss = whet.torch.soft_targets(s, teacher.to(place), 4.0)
        loss.backward()
        found.append((loss.item(), s.grad.cpu()))
    (one, grad), (other, its) = found
    error = max(abs(one - other) / abs(one), float((grad - its).abs().max() / grad.abs().max()))
    if error > 1e-5:
        raise RuntimeError(f"off by {error:.2g}")
    return f"distillation loss and gradient: off by {error:.2g}"


def main() -> int:
    """Every check on the first CUDA device."""
    if not torch.cuda.is_available():
        print("There is no CUDA device: nothing was checked.")
        return 2
    print(torch.cuda.get_device_name(0))
    checks: list[Callable[[str], str]] = [codes, bfloat16, compiled, distributed, losses]
    failed = 0
    for check in checks:
        try:
            print(check("cuda"))
        except Exception as cause:
            failed += 1
            print(f"FAILED {check.__name__}: {type(cause).__name__}: {cause}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
