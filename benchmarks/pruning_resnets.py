"""Channels removed from cifar10/resnet20 and resnet56, trained with the original as teacher, and run by ONNX Runtime.

    python benchmarks/pruning_resnets.py [MODEL …] --out FOLDER   # as the recipes below say: three quarters of an hour
    python benchmarks/pruning_resnets.py [MODEL …] --out FOLDER --again   # what it saved, measured again
    python benchmarks/pruning_resnets.py resnet20 --epochs 0                # removal and latency alone

The shortcuts are of option A (a pad by a literal number of channels), so that the channels between blocks stay, and what leaves
are whole blocks, and channels inside the others. ONNX Runtime computes output channels in blocks of 16 on AVX-512, so that 8
instead of 16 cost as much where they are made and half where they are read; a whole block takes its additions along, and
saves as much time as it saves MACs. Of ResNet-56 those blocks leave whose removal alone costs least. ResNet-20 has none to
spare: what stays of it is solved anew (`Reconstruct()`), and most is cut where that gives back most. `resnet20-two-teachers` is
taught by ResNet-56 beside the original.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cifar
import numpy as np
import tables
import torch
from qat import Crops

import whet
from whet.numerics.metrics import ACCURACY
from whet.numerics.statistics import paired_drop
from whet.runtimes.evidence import gather
from whet.specs import Channel, Layer, Magnitude, Metric, Prune, Reconstruct, Taylor, find_target


@dataclass(frozen=True)
class Recipe:
    """blocks: removed whole; cuts: (fraction removed, blocks); then `epochs` of SGD at `rate`, taught by the original.

    features: the weight of the outputs of its stages. reconstruct: solve what stays of the layers before that. teachers: models
    whose soft targets count as much as the original's. weight: of the soft targets; the rest is the labels'.
    """

    original: str
    blocks: tuple[str, ...]
    cuts: tuple[tuple[float, tuple[str, ...]], ...]
    epochs: int
    rate: float
    features: float = 1.0
    reconstruct: bool = False
    teachers: tuple[str, ...] = ()
    weight: float = 0.9


RECIPES = {
    "resnet20": Recipe(
        "resnet20",
        (),
        (
            (0.75, ("layer1.[01]",)),
            (0.5, ("layer1.2", "layer2.[012]")),
            (0.25, ("layer3.[012]",)),
        ),
        epochs=5,
        rate=0.04,
        features=4.0,
        reconstruct=True,
        weight=0.7,
    ),
    "resnet56": Recipe(
        "resnet56",
        ("layer1.5", "layer1.8", "layer2.4", "layer2.7", "layer2.8"),
        (
            (0.5, ("layer1.[0234]", "layer2.[1235]", "layer3.[0-8]")),
            (0.6, ("layer2.6",)),
        ),
        epochs=5,
        rate=0.02,
    ),
}
RECIPES["resnet20-two-teachers"] = replace(RECIPES["resnet20"], teachers=("resnet56",), weight=0.9)
BARS = {"resnet20": (1.7, 87.3, 1.4), "resnet56": (2.1, 89.4, 1.6)}  # times fewer MACs, top-1, times faster


def pruned(original: Any, recipe: Recipe, data: list[Any]) -> Any:
    """The original without the blocks of `recipe`, and without the channels that a criterion chooses on `data`: Taylor's, or
    the size of their weights where what stays is solved anew."""
    made: Any = original
    if recipe.blocks:
        leaving = Prune(granularity=Layer(len(recipe.blocks)), include=recipe.blocks)
        made = whet.prune(made, leaving, train=data, progress=False)
    for fraction, blocks in recipe.cuts:
        spec = Prune(
            fraction,
            granularity=Channel(),
            criterion=Magnitude() if recipe.reconstruct else Taylor(batches=len(data)),
            reconstruct=Reconstruct(batches=len(data)) if recipe.reconstruct else None,
            include=tuple(f"{block}.conv1" for block in blocks),
            round_to=4,
        )
        made = whet.prune(made, spec, train=data, progress=False)
    return made


def train(made: Any, batches: Crops, recipe: Recipe, place: Path) -> None:
    """SGD as in ResNet's paper, on `recipe.weight` · soft targets, the rest cross-entropy, and the outputs of the three stages.

    These keep their shapes, so that the pruned ones can follow the original's (FitNets; Romero et al. 2015, arXiv:1412.6550).
    """
    student, teachers = made.model, [getattr(cifar, name)() for name in (recipe.original, *recipe.teachers)]
    optimizer = torch.optim.SGD(student.parameters(), recipe.rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    total = max(recipe.epochs * len(batches), 1)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + np.cos(np.pi * step / total)))
    for model in (student, *teachers):
        model.to(memory_format=torch.channels_last)
    hooks: list[Any] = []
    heard, taught = heard_stages(student, hooks), heard_stages(teachers[0], hooks)
    for epoch in range(recipe.epochs):
        student.train()
        clock, losses = tables.Clock(), []
        for step, (x, y) in enumerate(batches):
            images = torch.from_numpy(x).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    wanted = [teacher(images) for teacher in teachers]
                outputs = student(images)
            soft = sum(whet.torch.soft_targets(outputs, one, 4.0) for one in wanted) / len(wanted)
            loss = (1 - recipe.weight) * torch.nn.functional.cross_entropy(outputs.float(), torch.from_numpy(y))
            loss = loss + recipe.weight * soft
            for one, other in zip(heard.values(), taught.values(), strict=True):
                loss = loss + recipe.features * torch.mean((one.float() - other.float()) ** 2) / torch.mean(other.float() ** 2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            losses.append(loss.item())
            if step % 100 == 99:
                print(f"    step {step + 1} of {len(batches)}: loss {np.mean(losses[-100:]):.4f}", flush=True)
        print(f"  epoch {epoch + 1}: loss {np.mean(losses):.4f}, {clock.seconds()[1]:.0f} s of processor time", flush=True)
        made.save(place, overwrite=True)
    for hook in hooks:
        hook.remove()
    student.eval().to(memory_format=torch.contiguous_format)


def heard_stages(model: Any, hooks: list[Any]) -> dict[str, torch.Tensor]:
    """The outputs of the model's three stages, after every call of it, until the `hooks` are removed."""
    found: dict[str, torch.Tensor] = {}
    for name in ("layer1", "layer2", "layer3"):
        hear = lambda _, __, output, name=name: found.__setitem__(name, output)  # noqa: E731
        hooks.append(getattr(model, name).register_forward_hook(hear))
    return found


def run(name: str, recipe: Recipe, table: tables.Table, args: argparse.Namespace) -> None:
    """Prune, train, export, and measure beside the original."""
    original = getattr(cifar, recipe.original)()
    x, y = cifar.images("train", args.examples)
    with TemporaryDirectory() as folder:
        place = Path(args.out or folder)
        place.mkdir(parents=True, exist_ok=True)
        saved = place / f"{name}-pruned"
        if args.again:
            made = whet.load(saved, model=getattr(cifar, recipe.original)())
        else:
            clock = tables.Clock()
            made = pruned(original, recipe, [(x[i : i + 128], y[i : i + 128]) for i in range(0, 512, 128)])
            print(f"chosen and removed in {clock.seconds()[1]:.1f} s of processor time", flush=True)
            train(made, Crops(x, y, args.batch), recipe, saved)
        measure(name, recipe, original, made, table, place, args)


def measure(
    name: str, recipe: Recipe, original: Any, made: Any, table: tables.Table, place: Path, args: argparse.Namespace
) -> None:
    """Export both and run them in alternation: accuracies with intervals, and how many times fewer MACs and milliseconds."""
    test = cifar.images("test", args.tested)
    data = [(test[0][i : i + 500], test[1][i : i + 500]) for i in range(0, len(test[0]), 500)]
    files = {"original": place / f"{name}.onnx", "pruned": place / f"{name}-pruned.onnx"}
    for model, file in zip((original, made.model), files.values(), strict=True):
        file.unlink(missing_ok=True)
        whet.torch.export(model, None, find_target("onnxruntime", "torch"), file, example=test[0][:8])
    found = gather(files, data, Metric(ACCURACY.fn, name="accuracy"), batches=(8, 1), threads=1, progress=False)
    one, two = found["original"], found["pruned"]
    before, after = whet.inspect(original, test[0][:1]), whet.inspect(made.model, test[0][:1])
    fewer, top1, faster = BARS[recipe.original]
    right = [int(np.sum(row.scores)) for row in (one, two)]
    low, high = paired_drop(one.scores, two.scores)
    table.add(
        f"{name}, {recipe.epochs} epochs: MACs", f"{before.macs:,}", f"{after.macs:,}", *ratio(before.macs, after.macs, fewer)
    )
    table.add(
        f"{name}: parameters", f"{before.parameters:,}", f"{after.parameters:,}", *ratio(before.parameters, after.parameters)
    )
    cells = [tables.top1(n, len(row.scores)) for n, row in zip(right, (one, two), strict=True)]
    told = tables.against(100 * right[1] / len(two.scores), top1)
    table.add(f"{name}: top-1 of the files, %", *cells, f"loses {100 * low:.2f} to {100 * high:.2f}", told)
    for old, new in zip(one.evidence.latencies, two.evidence.latencies, strict=True):
        cells = [f"{old.p50:.3f}", f"{new.p50:.3f}", *ratio(old.p50, new.p50, faster)]
        table.add(f"{name}: median ms at batch {old.batch}", *cells)


def ratio(before: float, after: float, bar: float | None = None) -> tuple[str, str]:
    """How many times less, and whether that was to be reached."""
    return f"{before / after:.2f} times", "" if bar is None else tables.against(round(before / after, 2), bar, unit=" times")


def main() -> None:
    """Print the table."""
    options = tables.parser(__doc__)
    options.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(RECIPES)}; all without one")
    options.add_argument("--epochs", type=int)
    options.add_argument("--rate", type=float)
    options.add_argument("--teacher", type=float, help="weight of the teachers' soft targets")
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--examples", type=int, default=50_000)
    options.add_argument("--tested", type=int, default=10_000)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", help="a folder that keeps the models and files")
    options.add_argument("--again", action="store_true", help="measure what an earlier run left in --out, without training")
    args = options.parse_args()
    models = tables.chosen(args.models, RECIPES, "model")
    if args.again and not args.out:
        options.error("--again needs the --out of the run that trained.")
    if args.quick:
        args.epochs, args.tested = 0, 500
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    head = "Blocks and channels removed from CIFAR-10's ResNets, then SGD taught by the original; ONNX Runtime"
    command = "python benchmarks/pruning_resnets.py --out FOLDER" + (", timed again with `--again`" if args.again else "")
    table = tables.Table("resnets", head, ("", "original", "pruned", "less", "to reach"), command, record=args.record)
    for name in models:
        recipe = RECIPES[name]
        epochs = recipe.epochs if args.epochs is None else args.epochs
        weight = recipe.weight if args.teacher is None else args.teacher
        run(name, replace(recipe, epochs=epochs, rate=args.rate or recipe.rate, weight=weight), table, args)


if __name__ == "__main__":
    main()
