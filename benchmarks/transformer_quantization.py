"""A small transformer on banking77, quantized: static, at run time and weights alone, on files run by ONNX Runtime.

Prints two tables: the drop of each scheme against the float file, with its paired 95 % interval, and, with outlier channels
put into what the layers read, what SmoothQuant and AWQ take back of the damage.

    python benchmarks/transformer_quantization.py [--epochs 6] [--quick] [--record out/quantization.json]

The encoder is trained here, in two minutes or so of two idle cores. Outliers are injected by rescaling a norm and the layers
behind it, which leaves the function as it was: it is what large language models show by themselves (Xiao et al. 2022, fig. 1).
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import tables
import torch
from torch import nn
from torch.nn import functional as F

import whet
from whet import AWQ, Dynamic, Int, Metric, PerGroup, Quantize, SmoothQuant
from whet.runtimes.evidence import Measured, gather, metric_drop

WORDS, LENGTH, WIDTH, HEADS, LAYERS, CLASSES = 2500, 24, 128, 4, 2, 77
OUTLIERS, FACTOR = 4, 40.0  # channels, and how much larger they become


class Layer(nn.Module):
    """A pre-norm encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Any) -> Any:
        h = self.norm1(x)
        q, k, v = (part(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.drop(self.out(found))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class Encoder(nn.Module):
    """Words in, intents out: the mean over all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.drop, self.norm, self.head = nn.Dropout(0.3), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Any) -> Any:
        x = self.layers(self.drop(self.words(tokens) + self.places))
        return self.head(self.drop(self.norm(x).mean(1)))


def questions() -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Training and test questions as (n, LENGTH) word numbers, 0 where there is none, and their intents."""
    root = Path(os.environ.get("WHET_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "banking77"
    if not (root / "train.csv").is_file():
        sys.exit(f"This benchmark needs banking77/train.csv and test.csv, which are not in {root.parent}. Set WHET_DATA.")
    rows = {}
    for split in ("train", "test"):
        with (root / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            rows[split] = [(re.findall(r"[a-z']+|\d+", row["text"].lower()), row["category"]) for row in csv.DictReader(file)]
    counts = Counter(word for words, _ in rows["train"] for word in words)
    number = {word: index + 2 for index, (word, _) in enumerate(counts.most_common(WORDS - 2))}
    intent = {name: index for index, name in enumerate(sorted({name for _, name in rows["train"]}))}

    def arrays(split: str) -> tuple[Any, Any]:
        tokens = np.zeros((len(rows[split]), LENGTH), np.int64)
        for line, (words, _) in zip(tokens, rows[split], strict=True):
            numbers = [number.get(word, 1) for word in words[:LENGTH]]
            line[: len(numbers)] = numbers
        return tokens, np.array([intent[name] for _, name in rows[split]])

    return arrays("train"), arrays("test")


def trained(data: tuple[Any, Any], epochs: int) -> Any:
    """An encoder after `epochs`, AdamW with one cycle."""
    torch.manual_seed(0)
    model, (x, y) = Encoder(), (torch.from_numpy(array) for array in data)
    steps = epochs * -(-len(x) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def with_outliers(model: Any) -> Any:
    """The same function: `OUTLIERS` channels behind each norm are `FACTOR` times larger, the weights that read them smaller."""
    made = whet.torch.copy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in made.layers:
            for norm, readers in ((layer.norm1, (layer.q, layer.k, layer.v)), (layer.norm2, (layer.up,))):
                chosen = torch.randperm(WIDTH, generator=generator)[:OUTLIERS]
                for tensor in (norm.weight, norm.bias):
                    tensor[chosen] *= FACTOR
                for reader in readers:
                    reader.weight[:, chosen] /= FACTOR
    return made


class Bench:
    """Files of one float model, measured on the test questions."""

    def __init__(self, model: Any, train: Any, test: Any, folder: Path, name: str) -> None:
        self.model, self.test, self.folder, self.name = model, test, folder, name
        chosen = np.random.default_rng(0).permutation(len(train[0]))[:512]
        self.calibration = [train[0][part] for part in np.split(chosen, 8)]
        self.metric = Metric(lambda outputs, targets: outputs.argmax(-1) == targets, name="accuracy")
        self.batches = [(test[0][i : i + 128], test[1][i : i + 128]) for i in range(0, len(test[0]), 128)]
        self.original = self._measured(whet.quantize, None)

    def _measured(self, verb: Any, spec: Quantize | None) -> Measured:
        path = self.folder / f"{self.name}.onnx"
        if spec is None:
            from whet.pipeline.compressed import start

            start(self.model, example=self.calibration[0]).export(path, "onnxruntime", overwrite=True)
        else:
            made = verb(self.model, spec, calibration=self.calibration, target="onnxruntime", progress=False)
            made.export(path, overwrite=True)
        return gather({"file": path}, self.batches, self.metric, runs=0, progress=False)["file"]

    def row(self, label: str, spec: Quantize) -> list[str]:
        """The cells of a row: accuracy, drop with its interval, the outputs' signal-to-error ratio in dB, bytes, seconds."""
        clock = tables.Clock()
        found = self._measured(whet.quantize, spec)
        drop = metric_drop(self.original, found, self.metric)
        a, b = (np.asarray(m.outputs, np.float64) for m in (self.original, found))
        sqnr = 10 * np.log10(np.sum(a**2) / np.sum((a - b) ** 2))
        low, high = (100 * end for end in drop.ci95 or (np.nan, np.nan))
        accuracy = 100 * found.evidence.metric["value"]
        bar = tables.against(100 * drop.value, BARS[label], most=True) if label in BARS and len(self.test[0]) > 3000 else ""
        cells = [label, f"{accuracy:.2f}", f"{100 * drop.value:+.2f} [{low:.2f}, {high:.2f}]", bar, f"{sqnr:.1f}"]
        return [*cells, f"{found.evidence.bytes:,}", clock.read()[1]]


SCHEMES = {
    "W8A8 static": Quantize(),
    "W8, activations at run time": Quantize(Int(8), Dynamic()),
    "int8 weights alone": Quantize(Int(8), None),
    "int4 weights alone, groups of 32": Quantize(Int(4, granularity=PerGroup(32)), None),
}
REMEDIES = {
    "W8A8 static": Quantize(),
    "W8A8 static, SmoothQuant": Quantize(equalize=SmoothQuant(0.5)),
    "W8, at run time": Quantize(Int(8), Dynamic()),
    "W8, at run time, SmoothQuant": Quantize(Int(8), Dynamic(), equalize=SmoothQuant(0.5)),
    "int4 groups of 32": Quantize(Int(4, granularity=PerGroup(32)), None),
    "int4 groups of 32, AWQ": Quantize(Int(4, granularity=PerGroup(32)), None, equalize=AWQ()),
    "int3 groups of 32": Quantize(Int(3, granularity=PerGroup(32)), None),
    "int3 groups of 32, AWQ": Quantize(Int(3, granularity=PerGroup(32)), None, equalize=AWQ()),
}
BARS = {name: 0.5 for name in list(SCHEMES)[:2]} | {"int4 weights alone, groups of 32": 1.0}  # points of drop, as trained


def model_of(given: argparse.Namespace, train: Any) -> Any:
    """The encoder, trained here or read."""
    if given.weights is None or not given.weights.exists():
        model = trained(train, 1 if given.quick else given.epochs)
        if given.weights is not None:
            torch.save(model.state_dict(), given.weights)
        return model
    model = Encoder().eval()
    model.load_state_dict(torch.load(given.weights, weights_only=True))
    return model


def main() -> int:
    """Train, quantize, export, run, print."""
    options = tables.parser(__doc__)
    options.add_argument("--epochs", type=int, default=6)
    options.add_argument("--weights", type=Path, help="Keep the trained weights here, and read them from here.")
    given = options.parse_args()
    train, test = questions()
    if given.quick:
        train, test = tuple(part[:640] for part in train), tuple(part[:320] for part in test)
    model = model_of(given, train)
    with tempfile.TemporaryDirectory() as folder:
        for name, title, made, rows in (
            ("transformer", "as trained", model, SCHEMES),
            (
                "transformer-outliers",
                f"{OUTLIERS} channels of each norm {FACTOR:g} times larger",
                with_outliers(model),
                REMEDIES,
            ),
        ):
            bench = Bench(made, train, test, Path(folder), name)
            table = tables.Table(
                name,
                f"An encoder on banking77, {title}; ONNX Runtime, {len(test[0]):,} test questions",
                ("", "accuracy, %", "drop, points [95 %]", "to reach", "outputs, dB", "bytes", "CPU s"),
                "python benchmarks/transformer_quantization.py",
                record=given.record,
            )
            value, size = bench.original.evidence.metric["value"], bench.original.evidence.bytes
            table.add("float", f"{100 * value:.2f}", "", "", "", f"{size:,}", "")
            for label, spec in rows.items():
                table.add(*bench.row(label, spec))
    return 0


if __name__ == "__main__":
    sys.exit(main())
