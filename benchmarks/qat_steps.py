"""What a step of quantization-aware training of ResNet-20 costs in PyTorch, beside a float step and torchao's PT2E.

    python benchmarks/qat_steps.py [--rounds 20] [--batch 128] [--record out/quantization.json]

In every round each kind takes one step on the same batch: forward, cross-entropy, backward, SGD. Printed are medians of the
paired ratios, of processor time (which other work disturbs least) and against two float models: as people train it, with batch
norms in training mode, and with them folded into the convolutions, which is what a model of Whet's trains as. torchao's fake
quantizers observe in every step, and keep batch norms in training mode.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import tables
import torch
from cifar import resnet20
from torch import nn
from torch.nn import functional as F

import whet
from whet.specs import QAT, TARGETS, Int, PerTensor, Quantize, Target
from whet.torch.program import quietly

FLOAT, FOLDED = "float, batch norms in training", "float, batch norms folded"
Pairs = dict[str, list[tuple[float, float]]]  # a model -> (processor seconds, seconds) of each of its steps
BARS = {"frozen ranges, convolutions and linear": 1.4, "and additions, running observers": 1.7, "and learned scales": 2.2}


def folded(model: nn.Module) -> nn.Module:
    """The model with its batch norms in the convolutions before them, which then train alone."""
    for module in model.modules():
        pairs = [("conv1", "bn1"), ("conv2", "bn2")]
        for conv, norm in ((c, n) for c, n in pairs if hasattr(module, n)):
            made = nn.utils.fuse_conv_bn_eval(getattr(module, conv).eval(), getattr(module, norm).eval())
            setattr(module, conv, made)
            setattr(module, norm, nn.Identity())
    return model.requires_grad_(True)


def prepared(qat: QAT, target: Target, x: torch.Tensor) -> nn.Module:
    """Whet's model in training, W8A8."""
    spec = Quantize(Int(8), Int(8, symmetric=False, granularity=PerTensor()), qat=qat)
    made: nn.Module = whet.torch.prepare(resnet20(), spec, calibration=[x.numpy()], target=target, steps=10**6, progress=False)
    return made


def pt2e(x: torch.Tensor, *, additions: bool) -> nn.Module:
    """torchao's model in training: weights per channel, moving averages of ranges; additions too or not."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    quantizer = XNNPACKQuantizer()
    if additions:
        quantizer.set_global(config)
    else:
        for kind in (nn.Conv2d, nn.Linear):
            quantizer.set_module_type(kind, config)
    with quietly():
        traced = torch.export.export(resnet20().train(), (x,)).module()
        made = prepare_qat_pt2e(traced, quantizer)
    allow_exported_model_train_eval(made)
    return made


def seconds(models: dict[str, nn.Module], x: torch.Tensor, y: torch.Tensor, rounds: int) -> Pairs:
    """(processor seconds, seconds) of every step of every model; two rounds before are not counted."""
    taken: Pairs = {name: [] for name in models}
    optimizers = {name: torch.optim.SGD(model.parameters(), 1e-4) for name, model in models.items()}
    for model in models.values():
        model.train()  # of an exported model it returns nothing
    for index in range(rounds + 2):
        for name, model in models.items():
            wall, cpu = time.perf_counter(), time.process_time()
            optimizers[name].zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizers[name].step()
            if index > 1:
                taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return taken


def steps(given: argparse.Namespace) -> None:
    """Print the table."""
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    x, y = torch.randn(given.batch, 3, 32, 32), torch.randint(0, 10, (given.batch,))
    ort = TARGETS["onnxruntime"]
    bare = replace(ort, quantized=frozenset(), joined=frozenset())
    made: dict[str, Callable[[], nn.Module]] = {
        FLOAT: resnet20,
        FOLDED: lambda: folded(resnet20()),
        "frozen ranges, convolutions and linear": lambda: prepared(QAT(learn_scale=False), bare, x),
        "and additions, running observers": lambda: prepared(QAT(learn_scale=False, observe=1.0), ort, x),
        "and learned scales": lambda: prepared(QAT(), ort, x),
        "torchao PT2E, convolutions and linear": lambda: pt2e(x, additions=False),
        "torchao PT2E, with additions": lambda: pt2e(x, additions=True),
    }
    models = {name: build() for name, build in made.items()}
    taken = seconds(models, x, y, 3 if given.quick else given.rounds)
    table = tables.Table(
        "steps",
        f"A training step of ResNet-20, batch {given.batch}, {given.threads} thread(s), PyTorch {torch.__version__}, eager; "
        f"medians of {len(taken[FLOAT])} paired ratios of processor time",
        ("", "CPU ms", "× float, batch norms in training", "× float, batch norms folded", "to reach"),
        "python benchmarks/qat_steps.py",
        record=given.record,
    )
    for name, pairs in taken.items():
        own = [cpu for cpu, _ in pairs]
        ratios = [statistics.median(a / b for a, (b, _) in zip(own, taken[base], strict=True)) for base in (FLOAT, FOLDED)]
        bar = tables.against(ratios[0], BARS[name], most=True) if name in BARS else ""
        table.add(name, f"{1e3 * statistics.median(own):.0f}", f"{ratios[0]:.2f}", f"{ratios[1]:.2f}", bar)
    table.note(
        "torchao keeps batch norms in training, so that its fair base is the first; Whet folds them, and its fair base is both."
    )


def main() -> int:
    """Print the table."""
    options = tables.parser(__doc__)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args()
    steps(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
