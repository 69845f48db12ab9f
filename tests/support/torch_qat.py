"""What tests of quantization-aware training in PyTorch share: prepared models of the zoo, a few steps, the outcome."""

import torch
from torch.nn import functional as F

import zoo_torch
from whet import torch as side
from whet.data import Batches
from whet.specs import (
    QAT,
    TARGETS,
    Int,
    PerTensor,
    Quantize,
)
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


def loss_of(outputs):
    return F.cross_entropy(outputs.float(), torch.arange(len(outputs)) % outputs.shape[-1])


def same_after(one, two, inputs):
    for model in (one, two):
        train_a_little(model, inputs, 2, loss=loss_of)
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
