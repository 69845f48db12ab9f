"""Bits chosen layer by layer, and layers put back to float until a drop holds: ResNet-20 on CIFAR-10, in both frameworks.

    python benchmarks/adaptive.py [--only bits drop] [--frameworks torch keras] [--averages 5 4 3] [--roundings nearest GPTQ]

bits: `Adaptive` at 3, 4 and 5 bits on average and a little, beside one scheme for all layers. Damage is measured on 256 of the
1,024 images of calibration, without labels; activations are int8. Top-1 and the drop with its paired 95 % interval are those of
the exported file (ONNX Runtime for PyTorch, LiteRT for Keras) on the test images.
--why: what was chosen for each layer, and why.

drop: `max_drop=` with 4-bit weights and activations. Layers go back to float until the upper end of the interval holds on the
first half of the test images; the drop is then measured again on the second half, which decided nothing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import torch
from cifar import folder, images, resnet20

import whet
from whet.data import Batches
from whet.numerics.metrics import ACCURACY
from whet.pipeline.compressed import Compressed, start
from whet.runtimes.evidence import Measured, gather, metric_drop
from whet.specs import GPTQ, MSE, Adaptive, BiasCorrection, Budget, Int, PerTensor, Quantize

CALIBRATION, BATCH = 1024, 128
CANDIDATES = (Int(8), Int(6), Int(5), Int(4), Int(3), Int(2))
RECIPES: dict[str, dict[str, Any]] = {
    "nearest": {},
    "GPTQ": {"rounding": GPTQ(), "weight_observer": MSE(), "correct_bias": BiasCorrection()},
}
EDGES = {"conv1": Int(8), "linear": Int(8)}
TARGETS = {"torch": ("onnxruntime", ".onnx"), "keras": ("litert", ".tflite")}
FOUR = Int(4, symmetric=False, granularity=PerTensor())
LIMIT = 0.03


class Subject:
    """A framework's ResNet-20, its images, and the files of both models that are compared."""

    def __init__(self, framework: str, count: int, place: Path) -> None:
        self.framework, self.place = framework, place
        self.target, self.suffix = TARGETS[framework]
        x, self.y = images("test", count)
        calibration, _ = images("train", CALIBRATION)
        if framework == "keras":
            x, calibration = (array.transpose(0, 2, 3, 1).copy() for array in (x, calibration))
        self.x, self.calibration = x, [calibration[i : i + BATCH] for i in range(0, CALIBRATION, BATCH)]
        self.model = resnet20() if framework == "torch" else _keras()
        self._original = self.export(start(self.model, example=self.calibration[0]), "float")
        self._measured: dict[tuple[int, int], Measured] = {}

    def quantize(self, spec: Quantize, **options: Any) -> tuple[Compressed, float]:
        """The result, and the seconds it took."""
        started = time.perf_counter()
        made = whet.quantize(self.model, spec, calibration=self.calibration, target=self.target, progress=False, **options)
        return made, time.perf_counter() - started

    def export(self, made: Compressed, name: str) -> Path:
        """Its file."""
        return made.export(self.place / f"{self.framework}-{name}{self.suffix}", self.target, overwrite=True)

    def labelled(self, first: int, last: int) -> Batches:
        """Test images from `first` to `last`."""
        return Batches(
            [(self.x[i : min(i + BATCH, last)], self.y[i : min(i + BATCH, last)]) for i in range(first, last, BATCH)], "val"
        )

    def row(self, name: str, made: Compressed, seconds: float, first: int = 0, last: int | None = None) -> dict[str, Any]:
        """Top-1 and drop of the exported file on a range of the test images, and bits of its weights on average."""
        last = len(self.x) if last is None else last
        data = self.labelled(first, last)
        files = {"original": self._original, "made": self.export(made, "made")}
        if (first, last) not in self._measured:
            self._measured[first, last] = gather({"original": files["original"]}, data, ACCURACY, runs=0, progress=False)[
                "original"
            ]
        found = gather({"made": files["made"]}, data, ACCURACY, runs=0, progress=False)["made"]
        drop = metric_drop(self._measured[first, last], found, ACCURACY)
        changed = made.steps[-1].changed
        bits = sum(row["bits"] * row["parameters"] for row in changed) / sum(row["parameters"] for row in changed)
        return {
            "framework": self.framework,
            "name": name,
            "bits": bits,
            "top1": found.score.value,
            "original": self._measured[first, last].score.value,
            "drop": drop.value,
            "ci95": drop.ci95,
            "images": last - first,
            "bytes": files["made"].stat().st_size,
            "seconds": seconds,
        }


def _keras() -> Any:
    import keras_litert
    from safetensors.numpy import load_file

    return keras_litert.resnet20(load_file(folder() / "resnet20.safetensors"))


def bits_rows(
    subject: Subject, averages: Sequence[int] = (5, 4, 3), roundings: Sequence[str] = tuple(RECIPES)
) -> Iterator[dict[str, Any]]:
    """One scheme for all, the same with both ends in 8 bits, and Adaptive within the average bits of that."""
    for rounding in roundings:
        recipe = RECIPES[rounding]
        for average in averages:
            scheme, found = Int(average), float(average)
            specs = {
                f"{rounding}, {average} bits": Quantize(scheme, **recipe),
                f"{rounding}, {average} bits, ends 8": Quantize(scheme, overrides=EDGES, **recipe),
                f"{rounding}, Adaptive": None,
            }
            for name, given in specs.items():
                spec = Quantize(Adaptive(CANDIDATES, budget=Budget(bits=found)), **recipe) if given is None else given
                made, seconds = subject.quantize(spec)
                row = subject.row(name, made, seconds)
                found = row["bits"]
                row["control"] = made.steps[-1].control
                row["layers"] = [
                    {key: layer.get(key) for key in ("name", "scheme", "bits", "parameters", "sensitivity", "why")}
                    for layer in made.steps[-1].changed
                ]
                yield row


def drop_rows(subject: Subject, limit: float = LIMIT, roundings: Sequence[str] = tuple(RECIPES)) -> Iterator[dict[str, Any]]:
    """W4A4 as it is, and with as few layers in float as let `limit` hold."""
    half = len(subject.x) // 2
    val = list(subject.labelled(0, half))
    for rounding in roundings:
        spec = Quantize(Int(4), FOUR, **RECIPES[rounding])
        made, seconds = subject.quantize(spec)
        yield subject.row(f"{rounding}, W4A4", made, seconds, half)
        made, seconds = subject.quantize(replace(spec, max_drop=limit), val=val, metric=ACCURACY)
        row = subject.row(f"{rounding}, W4A4, max_drop={limit}", made, seconds, half)
        yield row | {"control": made.steps[-1].control}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| | bits | top-1 | drop, points (95 %) | seconds |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row["ci95"]
        lines.append(
            f"| {row['framework']}: {row['name']} | {row['bits']:.2f} | {row['top1']:.2%} | "
            f"{100 * row['drop']:.2f} ({100 * low:.2f} to {100 * high:.2f}) | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def _say(row: dict[str, Any], why: bool) -> None:
    print(table([row]).splitlines()[-1], flush=True)
    control = (row.get("control") or {}).get("max_drop")
    if control is not None:
        ends = [f"{len(trial['reverted'])} in float: up to {100 * trial['drop']['ci95'][1]:.2f}" for trial in control["trials"]]
        print(f"    {'held' if control['met'] else control['missed']}; in float: {', '.join(control['reverted']) or 'none'}")
        print(f"    on the first half, points at 95 %: {'; '.join(ends)}", flush=True)
    for layer in row.get("layers", ()) if why else ():
        if layer["why"]:
            print(f"    {layer['name']}: {layer['scheme']}, {layer['parameters']:,} weights: {layer['why']}")


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", nargs="+", default=["bits", "drop"], choices=["bits", "drop"])
    options.add_argument("--frameworks", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    options.add_argument("--images", type=int, default=10_000)
    options.add_argument("--averages", nargs="+", type=int, default=[5, 4, 3])
    options.add_argument("--roundings", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    options.add_argument("--why", action="store_true", help="what was chosen for each layer, and why")
    given = options.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    print("\n".join(table([]).splitlines()))
    for framework in given.frameworks:
        with tempfile.TemporaryDirectory() as place:
            subject = Subject(framework, given.images, Path(place))
            parts = {
                "bits": bits_rows(subject, given.averages, given.roundings),
                "drop": drop_rows(subject, roundings=given.roundings),
            }
            for row in (row for name in given.only for row in parts[name]):
                _say(row, given.why)


if __name__ == "__main__":
    main()
