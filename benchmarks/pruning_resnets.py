"""Channels removed from cifar10/resnet20 and resnet56, trained with the original as teacher, and run by ONNX Runtime.

    python benchmarks/pruning_resnets.py resnet20 resnet56     # as the recipes below say
    python benchmarks/pruning_resnets.py resnet20 --epochs 0   # removal and latency alone

The shortcuts are of option A (a pad by a literal number of channels), so that the channels between blocks stay, and what leaves
are whole blocks, and channels inside the others. ONNX Runtime computes output channels in blocks of 16 on AVX-512, so that 8
instead of 16 cost as much where they are made and half where they are read; a whole block takes its additions along, and
saves as much time as it saves MACs. Too many blocks cost accuracy: those named are the ones whose removal alone costs least.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cifar
import numpy as np
import torch
from qat import Crops

import whet
from whet.numerics.metrics import ACCURACY
from whet.numerics.statistics import paired_drop
from whet.runtimes.evidence import gather
from whet.specs import Channel, Layer, Metric, Prune, Taylor, find_target


@dataclass(frozen=True)
class Recipe:
    """blocks: removed whole; cuts: (fraction removed, blocks); then `epochs` of SGD at `rate`, taught by the original."""

    blocks: tuple[str, ...]
    cuts: tuple[tuple[float, tuple[str, ...]], ...]
    epochs: int
    rate: float


RECIPES = {
    "resnet20": Recipe(
        ("layer1.1",),
        ((0.5, ("layer1.0", "layer2.[12]", "layer3.[012]")),),
        epochs=5,
        rate=0.02,
    ),
    "resnet56": Recipe(
        ("layer1.5", "layer1.8", "layer2.4", "layer2.8"),
        (
            (0.6, ("layer2.[123567]",)),
            (0.5, ("layer1.[0234]", "layer3.[0-8]")),
        ),
        epochs=5,
        rate=0.02,
    ),
}


def pruned(original: Any, recipe: Recipe, data: list[Any]) -> Any:
    """The original without the blocks of `recipe`, and without the channels that Taylor's criterion chooses on `data`."""
    leaving = Prune(granularity=Layer(len(recipe.blocks)), include=recipe.blocks)
    made: Any = whet.prune(original, leaving, train=data, progress=False)
    for fraction, blocks in recipe.cuts:
        spec = Prune(
            fraction,
            granularity=Channel(),
            criterion=Taylor(batches=len(data)),
            include=tuple(f"{block}.conv1" for block in blocks),
            round_to=4,
        )
        made = whet.prune(made, spec, train=data, progress=False)
    return made


def train(made: Any, teacher: Any, batches: Crops, recipe: Recipe, weight: float, place: Path) -> None:
    """SGD as in ResNet's paper, on `weight` · soft targets and the rest cross-entropy; bfloat16 where torch.autocast allows."""
    student = made.model
    optimizer = torch.optim.SGD(student.parameters(), recipe.rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    total = max(recipe.epochs * len(batches), 1)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + np.cos(np.pi * step / total)))
    for model in (student, teacher):
        model.to(memory_format=torch.channels_last)
    for epoch in range(recipe.epochs):
        student.train()
        started, losses = time.process_time(), []
        for step, (x, y) in enumerate(batches):
            images = torch.from_numpy(x).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    taught = teacher(images)
                outputs = student(images)
            soft = whet.torch.soft_targets(outputs, taught, 4.0)
            loss = (1 - weight) * torch.nn.functional.cross_entropy(outputs.float(), torch.from_numpy(y)) + weight * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            losses.append(loss.item())
            if step % 100 == 99:
                print(f"    step {step + 1} of {len(batches)}: loss {np.mean(losses[-100:]):.4f}", flush=True)
        spent = time.process_time() - started
        print(f"  epoch {epoch + 1}: loss {np.mean(losses):.4f}, {spent:.0f} s of processor time", flush=True)
        made.save(place, overwrite=True)
    student.eval().to(memory_format=torch.contiguous_format)


def run(name: str, recipe: Recipe, args: argparse.Namespace) -> None:
    """Prune, train, export, and measure beside the original."""
    original = getattr(cifar, name)()
    x, y = cifar.images("train", 50_000)
    order = np.random.default_rng(args.seed).permutation(len(x))[: args.examples]  # they are sorted by class
    x, y = x[order], y[order]
    started = time.perf_counter()
    if args.start:
        made = whet.load(args.start, model=getattr(cifar, name)())
    else:
        made = pruned(original, recipe, [(x[i : i + 128], y[i : i + 128]) for i in range(0, 512, 128)])
    seconds = time.perf_counter() - started
    before, after = whet.inspect(original, x[:1]), whet.inspect(made.model, x[:1])
    print(f"{name}: {before.macs:,} → {after.macs:,} MACs, x {before.macs / after.macs:.2f} fewer; parameters", end=" ")
    print(f"{before.parameters:,} → {after.parameters:,}; chosen and removed in {seconds:.1f} s", flush=True)
    with TemporaryDirectory() as folder:
        place = Path(args.out or folder)
        place.mkdir(parents=True, exist_ok=True)
        train(made, getattr(cifar, name)(), Crops(x, y, args.batch), recipe, args.teacher, place / f"{name}-pruned")
        measure(name, original, made, place, args)


def measure(name: str, original: Any, made: Any, place: Path, args: argparse.Namespace) -> None:
    """Export both and run them in alternation; print accuracies with intervals, sizes, latencies and their ratios."""
    test = cifar.images("test", args.tested)
    data = [(test[0][i : i + 500], test[1][i : i + 500]) for i in range(0, len(test[0]), 500)]
    files = {"original": place / f"{name}.onnx", "pruned": place / f"{name}-pruned.onnx"}
    whet.torch.export(original, None, find_target("onnxruntime", "torch"), files["original"], example=test[0][:8])
    made.export(files["pruned"], overwrite=True)
    found = gather(files, data, Metric(ACCURACY.fn, name="accuracy"), batches=(8, 1), threads=1, progress=False)
    for row in found.values():
        print(f"  {row.evidence}", flush=True)
    one, two = found["original"], found["pruned"]
    print(f"  {name} loses {paired_drop(one.scores, two.scores)} of accuracy; load {os.getloadavg()[0]:.0f}", flush=True)
    for before, after in zip(one.evidence.latencies, two.evidence.latencies, strict=True):
        print(
            f"  batch {before.batch}: {before.p50:.3f} -> {after.p50:.3f} ms, x {before.p50 / after.p50:.2f} faster", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=sorted(RECIPES))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--teacher", type=float, default=0.9, help="weight of the teacher's soft targets")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--examples", type=int, default=50_000)
    parser.add_argument("--tested", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", help="a folder that an earlier run saved: its model is trained further")
    parser.add_argument("--out", help="a folder that keeps the models and files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    for name in args.models:
        recipe = RECIPES[name]
        epochs = recipe.epochs if args.epochs is None else args.epochs
        run(name, replace(recipe, epochs=epochs, rate=args.rate or recipe.rate), args)


if __name__ == "__main__":
    main()
