"""Real architectures lose 30 % of their channels and of their heads, exactly; a model of 100 million parameters in seconds.

    python benchmarks/zoo.py                      # every section, about five minutes
    python benchmarks/zoo.py transformers large   # some of them
    python benchmarks/zoo.py --only BERT T5

Sections: `transformers` (families that build from a configuration, without a download), `torchvision` (where it is installed),
`keras` (every family of keras.applications), `large` (time and memory). Models are small, with random weights
and with norms and biases that differ from channel to channel. "Off" is the largest difference of any output from the original
with the same channels silenced, over the largest output; "moved" the same from the original itself, before any training.
"""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tables import Clock, Table, parser

import whet
import whet.torch
from whet.errors import WhetError
from whet.specs import Channel, Head, Prune

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import zoo_transformers as zoo

SPARSITY = 0.3
COLUMNS = ("family", "parameters", "removed", "parameters left", "MACs", "MACs left", "off", "moved", "seconds")


def row(table: Table, name: str, build: Callable[[], Any], granularity: Any) -> bool:
    """Remove, and add what became of it to the table; whether something was removed."""
    model, inputs = build()
    before, clock = whet.inspect(model, inputs), Clock()
    try:
        made = whet.prune(model, Prune(SPARSITY, granularity=granularity, round_to=1), example=inputs, progress=False)
    except WhetError as refusal:
        table.add(name, f"{before.parameters:,}", f"refused: {refusal}", *[""] * 6)
        return False
    seconds, after, told = clock.read()[1], whet.inspect(made.model, inputs), made.steps[-1].removal
    groups = told["silent"] + told["constant"] + told["varying"]
    what = f"{groups} {'groups of heads' if isinstance(granularity, Head) else 'channels'}"
    sizes = f"{after.parameters:,}", f"{before.macs:,}", f"{after.macs:,}"
    table.add(name, f"{before.parameters:,}", what, *sizes, f"{told['oracle']:.1e}", f"{told['change']:.2g}", seconds)
    return True


def transformers_section(only: Iterable[str], record: Path | None) -> None:
    """Every family, channels and heads."""
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: pip install transformers")
        return
    import transformers

    transformers.logging.set_verbosity_error()
    title = f"Families of transformers {transformers.__version__}: {SPARSITY:.0%} of channels, or of heads, removed"
    table = Table("removal-transformers", title, COLUMNS, "python benchmarks/zoo.py transformers", record=record)
    refused = []
    for name, build in zoo.FAMILIES.items():
        if only and name not in only:
            continue
        kinds = (Channel(),) if name in zoo.HEADLESS else (Channel(), Head())
        done = [row(table, name, build, kind) for kind in kinds]
        if not all(done):
            refused.append(name)
    table.note(f"Refused: {', '.join(refused) or 'none'}. Seconds are of processor time; channels are what leaves together.")


def torchvision_section(only: Iterable[str], record: Path | None) -> None:
    """One model of every classification family of torchvision."""
    if importlib.util.find_spec("torchvision") is None:
        print("torchvision is not installed: its families are left out")
        return
    from torchvision import models

    names = (
        "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 "
        "mobilenet_v2 mobilenet_v3_small regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 "
        "swin_t swin_v2_t vgg11_bn vit_b_32 wide_resnet50_2"
    ).split()
    title = f"Families of torchvision: {SPARSITY:.0%} of channels removed"
    table = Table("removal-torchvision", title, COLUMNS, "python benchmarks/zoo.py torchvision", record=record)
    for name in names:
        if only and name not in only:
            continue

        def build(name: str = name) -> Any:
            torch.manual_seed(0)
            side = 299 if name == "inception_v3" else 224
            options = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
            made = zoo.spread(models.get_model(name, weights=None, num_classes=10, **options)).eval()
            return made, np.random.default_rng(0).standard_normal((2, 3, side, side)).astype(np.float32)

        row(table, name, build, Channel())


def keras_section(only: Iterable[str], record: Path | None) -> None:
    """keras.applications."""
    from keras_applications import models

    title = f"Families of keras.applications: {SPARSITY:.0%} of channels removed"
    table = Table("removal-keras", title, COLUMNS, "python benchmarks/zoo.py keras", record=record)
    for name, build in models().items():
        if not only or name in only:
            row(table, name, build, Channel())


class Peak:
    """The most memory that this process held while it was open, watched every few milliseconds."""

    def __enter__(self) -> Peak:
        self._process, self._open = psutil.Process(), True
        self.before = self.most = self._process.memory_info().rss
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def _look(self) -> None:
        while self._open:
            self.most = max(self.most, self._process.memory_info().rss)
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._watch.join()

    @property
    def added(self) -> int:
        """Bytes beyond what was held at the beginning."""
        return self.most - self.before


def large_section(only: Iterable[str], record: Path | None) -> None:
    """BERT-base, convolutions and a wide MLP, about 100 million parameters each: read, scored, chosen, cut and checked."""
    columns = ("model", "call", "removed", "parameters", "left", "seconds", "processor seconds", "memory of the model's")
    title = f"Choosing and removing {SPARSITY:.0%} of a model of 100 million parameters, checks included"
    table = Table("removal-large", title, columns, "python benchmarks/zoo.py large", record=record)
    for name, call in itertools.product(LARGE, ("torch.remove", "prune")):
        if (only and name not in only) or ("BERT" in name and importlib.util.find_spec("transformers") is None):
            continue
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:  # its memory holds nothing else
            table.add(name, f"whet.{call}", *fresh.submit(large_row, name, call).result())
    table.note(
        "Memory is the most that the process held, the model before it included, over the model's own. `whet.torch.remove` "
        "works in place; `whet.prune` leaves the model as it is, and gives another. To reach: 30 s and 2 ×."
    )


def large_row(name: str, call: str) -> list[str]:
    """What becomes of one model, in a process of its own."""
    build, granularity = LARGE[name]
    whet.groups(torch.nn.Linear(4, 4), np.zeros((2, 4), np.float32))  # what torch.export imports is no part of it
    model, inputs = build()
    count, size = _weighed(model)
    spec = Prune(SPARSITY, granularity=granularity)
    with Peak() as peak:
        clock = Clock()
        if call == "prune":
            small = whet.prune(model, spec, example=inputs, progress=False).model
        else:
            small = whet.torch.remove(model, spec, example=inputs)[0]
        seconds = clock.read()
    what = "heads" if isinstance(granularity, Head) else "channels"
    return [what, f"{count:,}", f"{_weighed(small)[0]:,}", *seconds, f"{1 + peak.added / size:.2f} ×"]


def _weighed(model: Any) -> tuple[int, int]:
    """Parameters, and their bytes."""
    return sum(p.numel() for p in model.parameters()), sum(p.numel() * p.element_size() for p in model.parameters())


def _bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    words = np.random.default_rng(0).integers(5, 30000, (2, 32))
    return BertForSequenceClassification(BertConfig()).eval(), {"input_ids": words, "attention_mask": np.ones_like(words)}


def _wide() -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3072, 4096), torch.nn.ReLU()]
    for _ in range(6):
        layers += [torch.nn.Linear(4096, 4096), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(4096, 10)).eval(), np.zeros((2, 3072), np.float32)


def _convolutions() -> Any:
    torch.manual_seed(0)
    layers: list[Any] = []
    for wide, stride in ((256, 2), (1024, 2), *((1024, 1),) * 10):
        given = layers[-3].out_channels if layers else 3
        layers += [torch.nn.Conv2d(given, wide, 3, stride, 1, bias=False), torch.nn.BatchNorm2d(wide), torch.nn.ReLU()]
    made = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(1024, 1000))
    return zoo.spread(made).eval(), np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)


LARGE: dict[str, tuple[Callable[[], Any], Any]] = {
    "BERT-base": (_bert, Channel()),
    "BERT-base, heads": (_bert, Head()),
    "12 convolutions": (_convolutions, Channel()),
    "MLP": (_wide, Channel()),
}
SECTIONS = {
    "transformers": transformers_section,
    "torchvision": torchvision_section,
    "keras": keras_section,
    "large": large_section,
}


def main() -> None:
    """Run the sections that are named, or all."""
    options = parser(__doc__ or "")
    options.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    options.add_argument("--only", nargs="*", default=(), help="families")
    given = options.parse_args()
    for name in given.sections or SECTIONS:
        SECTIONS[name](given.only, given.record)


if __name__ == "__main__":
    main()
