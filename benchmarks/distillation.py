"""What a teacher adds: small students on MNIST, Banking77 and CIFAR-10, taught and untaught; and what teaching costs.

    python benchmarks/distillation.py [--parts mnist banking77 cifar10 overhead] [--seeds 3] [--quick] [--record FILE.json]

Every row is the mean top-1 of the seeds on the whole test set, with the half-width of its 95 % interval (Student's t over the
seeds); a gain is paired by seed. No epoch is chosen by test examples. In whole the CIFAR-10 part takes a day of one processor:
`--epochs`, `--images` and `--seeds` cut it, and the table says so. With `--kept FILE.json` every score is written down when it
is known, and a run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import distillation_data as data
import numpy as np
import tables
import torch
from distillation_models import Encoder, mlp
from torch import nn

import whet
from whet.files import replacing
from whet.specs import DIST, DKD, AttentionMatrices, AttentionRelations, Distill, Features, LogitsMSE, SoftTargets, Train

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided, by the number of seeds


def interval(values: list[float]) -> str:
    """Mean and half-width of the 95 % interval; the value alone of one seed."""
    if len(values) < 2:
        return f"{values[0]:.2f} (one seed)"
    return f"{np.mean(values):.2f} ± {T_95[len(values)] * np.std(values, ddof=1) / np.sqrt(len(values)):.2f}"


def top1(model: Any, test: tuple[Any, np.ndarray]) -> float:
    """Per cent of the test set."""
    inputs, labels = test
    plain = getattr(model, "model", model)
    rows = range(0, len(labels), 500)
    cut = lambda i: {k: v[i : i + 500] for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs[i : i + 500]  # noqa: E731
    found = np.concatenate([whet.torch.predict(plain, cut(i)).argmax(-1) for i in rows])
    return float(100 * np.mean(found == labels))


def show(
    table: tables.Table,
    scores: Mapping[str, list[float]],
    against: str,
    bars: Mapping[str, Sequence[tuple[str, float]]],
) -> None:
    """A row for each variant, and for each comparison of it; bars: of a variant, with whom and how many points above."""
    for name, values in scores.items():
        cells = [name, interval(values)]
        for other, bar in bars.get(name, [(against, None)] if name != against else []):
            gains = [a - b for a, b in zip(values, scores[other], strict=True)]
            reached = "" if bar is None else tables.against(float(np.mean(gains)), bar)
            table.add(*cells, f"{interval(gains)} over {other}", reached)
            cells = ["", ""]
        if cells[0]:
            table.add(*cells, "", "")


class Kept:
    """Scores by what made them, in a file where one is given."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}

    def once(self, key: str, work: Callable[[], Any]) -> Any:
        """What `key` is known to give, or what `work()` finds."""
        if key not in self.known:
            self.known[key] = work()
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(self.path, overwrite=True) as temporary:
                    temporary.write_text(json.dumps(self.known, indent=1), encoding="utf-8")
        return self.known[key]


def seeded(build: Any, seed: int) -> Any:
    """`build()` with torch's random numbers drawn from `seed`."""
    torch.manual_seed(seed)
    return build()


def run_mnist(given: argparse.Namespace) -> None:
    """784-64-32-10 teaches 784-32-10: 2,000 labelled images, and the other 58,000 without their labels."""
    train, test = data.mnist("train"), data.mnist("test")
    epochs, more = (2, 1) if given.quick else (80, 10)
    head = f"MNIST, {epochs} epochs of 2,000 labelled images, {more} of all 60,000 without labels, shifted by up to a pixel"
    columns = ("", "top-1, %", "gain, points", "to reach")
    table = tables.Table("distill-mnist", head, columns, "python benchmarks/distillation.py --parts mnist", record=given.record)
    labelled_fit, fit = Train(epochs=epochs, learning_rate=3e-3), Train(epochs=more, learning_rate=5e-3)

    def trained(seed: int) -> dict[str, float]:
        rows = np.random.default_rng(seed).permutation(len(train[1]))[:2000]
        labelled = lambda at: data.Shifts(train[0][rows], train[1][rows], 64, at)  # noqa: E731
        student = seeded(lambda: mlp(784, 32, 10), seed)
        teachers = [
            whet.fit(
                seeded(lambda: mlp(784, 64, 32, 10), 100 + 10 * seed + k),
                labelled_fit,
                train=labelled(seed + 10 * k),
                seed=seed,
                progress=False,
            ).model
            for k in range(2)
        ]
        full = whet.fit(
            seeded(lambda: mlp(784, 64, 32, 10), 200 + seed),
            fit,
            train=data.Shifts(*train, 256, seed),
            seed=seed,
            progress=False,
        ).model
        alone = whet.fit(student, labelled_fit, train=labelled(seed), seed=seed, progress=False)

        def taught(teacher: Any, student: Any = student, seed: int = seed) -> Any:
            images = data.Shifts(train[0], None, 256, seed)
            spec = Distill([SoftTargets(1.0)], student_weight=0)
            return whet.distill(student, teacher, spec, fit=fit, train=images, seed=seed, progress=False)

        found = {
            "teacher, 2,000 labels": teachers[0],
            "student alone, 2,000 labels": alone,
            "one teacher of 2,000 labels": taught(teachers[0]),
            "two teachers of 2,000 labels": taught(teachers),
            "teacher, 60,000 labels": full,
            "one teacher of 60,000 labels": taught(full),
        }
        return {name: top1(model, test) for name, model in found.items()}

    scores: dict[str, list[float]] = {}
    for seed in range(given.seeds):
        for name, score in given.kept.once(f"mnist, seed {seed}: {labelled_fit}, {fit}", lambda: trained(seed)).items():  # noqa: B023
            scores.setdefault(name, []).append(score)
        print(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.2f}" for name, values in scores.items()), flush=True)
    lone, one = "student alone, 2,000 labels", "one teacher of 2,000 labels"
    two, all_labels = "two teachers of 2,000 labels", "one teacher of 60,000 labels"
    bars = {one: [(lone, 1.0)], two: [(lone, 1.0), (one, 0.0)], all_labels: [(lone, 1.0)]}
    show(table, scores, lone, bars)


def run_banking(given: argparse.Namespace) -> None:
    """A 4-layer transformer teaches a 2-layer one of half the width, by attention, hidden states and its outputs.

    With few labels the taught student sees all questions without any, in as many steps as the student alone makes.
    """
    train, test, words = data.banking()
    if given.quick:
        train = ({key: value[:512] for key, value in train[0].items()}, train[1][:512])
    count, labels = len(train[1]), min(128 if given.quick else given.labels, len(train[1]))
    epochs = 1 if given.quick else given.epochs or (60 if labels < count else 40)
    more = max(round(epochs * labels / count), 1)
    what = f"{epochs} epochs of {labels:,} questions" + (f", {more} of all {count:,} without labels" if labels < count else "")
    head = f"Banking77, {what}, words of the training set; all from scratch"
    columns = ("", "top-1, %", "gain, points", "to reach")
    command = f"python benchmarks/distillation.py --parts banking77 --seeds {given.seeds} --labels {labels} --epochs {epochs}"
    name = "distill-banking77" + ("" if labels < count else "-all")
    table = tables.Table(name, head, columns, command + _losses(given), record=given.record)
    layers, attention = "encoder.layers.?", "encoder.layers.?.self_attn"
    inside = [AttentionMatrices(attention, attention, weight=0.1), Features(layers, layers, weight=0.1)]
    variants = {
        "attention, hidden states, DIST": [DIST(temperature=1.0), *inside],
        "attention, hidden states, soft targets": [SoftTargets(2.0), *inside],
        "soft targets": [SoftTargets(2.0)],
        "value relations, soft targets": [SoftTargets(2.0), AttentionRelations(attention, attention)],
    }
    variants = {name: variants[name] for name in tables.chosen(given.losses or [], variants, "variant of Banking77")}
    fit = Train(epochs=epochs, learning_rate=1e-3, weight_decay=0.01)
    shown, taught = (train[0], replace(fit, epochs=more)) if labels < count else (train, fit)

    def trained(seed: int) -> dict[str, float]:
        rows = np.random.default_rng(seed).permutation(count)[:labels] if labels < count else slice(None)
        labelled = {key: value[rows] for key, value in train[0].items()}, train[1][rows]
        teacher = seeded(lambda: Encoder(words, width=96, heads=4, layers=4), 100 + seed)
        taught_by = whet.fit(teacher, fit, train=labelled, seed=seed, progress=False).model
        student = seeded(lambda: Encoder(words, width=48, heads=2, layers=2), seed)
        found = {"teacher, 4 layers": taught_by}
        found["student alone, 2 layers"] = whet.fit(student, fit, train=labelled, seed=seed, progress=False)
        for name, losses in variants.items():
            spec = Distill(losses, student_weight=0.1 if labels == count else 0)
            found[name] = whet.distill(student, taught_by, spec, fit=taught, train=shown, seed=seed, progress=False)
        return {name: top1(model, test) for name, model in found.items()}

    scores: dict[str, list[float]] = {}
    for seed in range(given.seeds):
        key = f"banking77 {labels} questions, seed {seed}: {fit}, {variants}"
        for name, score in given.kept.once(key, lambda: trained(seed)).items():  # noqa: B023
            scores.setdefault(name, []).append(score)
        print(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.2f}" for name, values in scores.items()), flush=True)
    lone = "student alone, 2 layers"
    show(table, scores, lone, {name: [(lone, 1.0)] for name in variants if name.startswith("attention")})


def _losses(given: argparse.Namespace) -> str:
    """What the command line says of the variants."""
    return " ".join([" --losses", *map(repr, given.losses)]) if given.losses else ""


def run_cifar(given: argparse.Namespace) -> None:
    """ResNet-56 teaches the architecture of ResNet-20 from scratch; its outputs are stored once for views fixed by index."""
    from cifar import ResNet20, images, resnet56

    count, epochs = (512, 1) if given.quick else (given.images, given.epochs or 15)
    (x, y), test = images("train", count), images("test", 500 if given.quick else 10_000)
    views = min(epochs, 3)
    head = f"CIFAR-10, ResNet-20 from scratch, {epochs} epochs of {count:,} images in {views} fixed views; ResNet-56 teaches"
    columns = ("", "top-1, %", "gain, points", "to reach")
    command = f"python benchmarks/distillation.py --parts cifar10 --seeds {given.seeds} --epochs {epochs} --images {count}"
    command += _losses(given)
    table = tables.Table("distill-cifar10", head, columns, command, record=given.record)
    variants: dict[str, Any] = {
        "labels alone": None,
        "soft targets": SoftTargets(4.0),
        "DKD": DKD(1.0, 8.0, 4.0),
        "DIST": DIST(),
        "soft targets, features": [SoftTargets(4.0), Features("layer?", "layer?", weight=0.3)],
        "soft targets, standardized": SoftTargets(2.0, standardize=True),
    }
    names, scores = tables.chosen(given.losses or [], variants, "variant of CIFAR-10"), dict[str, list[float]]()
    with TemporaryDirectory() as folder:
        every = data.Views(x, y, 128, views, at=None)
        store = whet.teacher_outputs(resnet56(), every, Path(given.store or folder) / "resnet56", progress=False)
        teachers = {
            name: None if loss is None else resnet56() if isinstance(loss, list) else store for name, loss in variants.items()
        }
        for seed in range(given.seeds):
            for name in names:
                loss = variants[name]
                apply = [] if loss is None else [Distill(loss, student_weight=0.1)]
                fit = Train(epochs=epochs, learning_rate=2e-3, weight_decay=5e-4, precision="bfloat16", apply=apply)

                def taught(seed: int = seed, fit: Train = fit, teacher: Any = teachers[name]) -> float:
                    student = seeded(lambda: ResNet20(3), seed).to(memory_format=torch.channels_last)
                    train = data.Views(x, y, 128, views, at=seed)
                    return top1(whet.fit(student, fit, train=train, teacher=teacher, seed=seed, progress=False), test)

                score = given.kept.once(f"cifar10 {count} images, seed {seed}: {fit}", taught)
                scores.setdefault(name, []).append(score)
                print(f"seed {seed}: {name} {scores[name][-1]:.2f}", flush=True)
    alone = "labels alone", 1.0
    bars = {name: [alone, ("soft targets", 0.0)] for name in ("DKD", "DIST")} | {"soft targets": [alone]}
    shown = {name: [bar for bar in found if bar[0] in scores] for name, found in bars.items()}
    show(table, scores, "labels alone", shown)


def run_overhead(given: argparse.Namespace) -> None:
    """Processor time of a step: the student alone, the teacher's forward pass alone, and both in `whet.fit`.

    Of a long epoch less a short one, per batch of the difference: what is looked at once, before the first step, is no step's.
    """
    from cifar import ResNet20

    short, long, rounds = (2, 4, 1) if given.quick else (4, 20, 4)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64 * long, 3, 32, 32)).astype(np.float32), rng.integers(0, 10, 64 * long)
    head = f"Overhead of a step of 64 images, ResNet-20 taught by ResNet-56: {long} batches less {short}, median of {rounds}"
    columns = ("", "CPU ms", "bound, CPU ms", "to reach")
    command = "python benchmarks/distillation.py --parts overhead"
    table = tables.Table("distill-overhead", head, columns, command, record=given.record)
    student, teacher = ResNet20(3), ResNet20(9).eval()
    spent: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[int], Any]) -> None:
        taken = []
        for batches in (short, long):
            clock = tables.Clock()
            work(64 * batches)
            taken.append(clock.seconds()[1])
        spent.setdefault(name, []).append(1000 * (taken[1] - taken[0]) / (long - short))

    def train(loss: Any, teacher: Callable[[int], Any]) -> Callable[[int], Any]:
        fit = Train(epochs=1, apply=[] if loss is None else [Distill(loss)])
        return lambda n: whet.fit(student, fit, train=(x[:n], y[:n]), teacher=teacher(n), progress=False)

    with TemporaryDirectory() as folder:
        stores = {
            64 * n: whet.teacher_outputs(teacher, x[: 64 * n], Path(folder) / str(n), progress=False) for n in (short, long)
        }
        for _ in range(rounds):
            timed("student", train(None, lambda n: None))
            timed("teacher forward", lambda n: forward(teacher, x[:n]))
            for name, loss in (("soft targets", SoftTargets()), ("DKD", DKD()), ("DIST", DIST()), ("logits", LogitsMSE())):
                timed(f"{name}, live", train([loss], lambda n: teacher))
                timed(f"{name}, stored", train([loss], stores.__getitem__))
    median = {name: float(np.median(values)) for name, values in spent.items()}
    for name, step in median.items():
        live = name.endswith("live")
        bound = 1.1 * (median["student"] + (median["teacher forward"] if live else 0.0))
        is_bound = name.endswith(("live", "stored"))
        told = tables.against(round(step, 1), round(bound, 1), most=True) if is_bound else ""
        table.add(name, f"{step:.1f}", f"{bound:.1f}" if is_bound else "", told)


def forward(model: nn.Module, x: np.ndarray) -> None:
    """The forward passes of one epoch."""
    with torch.no_grad():
        for start in range(0, len(x), 64):
            model(torch.from_numpy(x[start : start + 64]))


PARTS = {"mnist": run_mnist, "banking77": run_banking, "cifar10": run_cifar, "overhead": run_overhead}


def main() -> int:
    """Print the tables."""
    options = tables.parser(__doc__)
    options.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    options.add_argument("--seeds", type=int, default=3, choices=range(1, 6))
    options.add_argument("--epochs", type=int, help="instead of each part's own, but MNIST's")
    options.add_argument("--images", type=int, default=50_000, help="of CIFAR-10's training set")
    options.add_argument("--labels", type=int, default=2500, help="of Banking77's 10,003 questions; all: no others are shown")
    options.add_argument("--losses", nargs="+", help="of the variants of Banking77 and CIFAR-10")
    options.add_argument("--store", help="a folder that keeps ResNet-56's outputs")
    options.add_argument("--kept", type=Path, help="a JSON file that keeps every score, for a run that is cut off")
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    given.kept = Kept(given.kept)
    for part in given.parts:
        PARTS[part](given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
