"""`whet.sensitivity`: what each layer alone costs when it is quantized, measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from whet import htmltext, texts
from whet.data import Batches, concatenate, leaves, primary, rows
from whet.errors import DataError, RuntimeFileError, SpecError
from whet.graph.placement import Plan
from whet.graph.variants import Part, Variants, parts_of, restricted
from whet.numerics.affine import QParams
from whet.numerics.codebook import Codebook
from whet.pipeline.compressed import Compressed, as_metric, start
from whet.progress import Task, task
from whet.records import Estimate
from whet.runtimes.comparison import score_drop
from whet.runtimes.scoring import Score, score, take
from whet.specs import Metric, Quantize, Target, find_target, to_dict
from whet.specs.quantization import Adaptive, AdaRound
from whet.specs.schemes import SCHEMES, Scheme

ENOUGH = 256  # examples that rank layers; every layer and candidate costs a pass over them
_LEAST = 1e-12  # probability
_STORED = {"int4": 4, "int8": 8, "int16": 16, "float32": 32}  # bits
_FEW = 1e-3  # what 32-bit sums of probabilities may be off


@dataclass(frozen=True, slots=True)
class Damage:
    """What one layer alone costs, quantized as the spec of index `spec` says.

    scheme: of its weights, in words. bits: of one code, on average. parameters: how many weights change. bytes: of these
    in the target's file: codes, scales, zero points and levels. noise: `Σ (r - a)² / Σ r²` over all outputs `a` against those
    of the float model `r`. divergence: `KL(float ‖ quantized)` of the class probabilities, in nats, a mean over examples; None
    where the model's outputs are none (see `Sensitivity`). drop: of the metric, where labelled data was given, with its paired
    interval. weight_db: the worst signal-to-error ratio of its stored weights, which are `weights` by name.
    """

    layer: str
    spec: int
    scheme: str
    bits: float
    parameters: int
    bytes: int
    noise: float
    divergence: float | None = None
    drop: Estimate | None = None
    weight_db: float | None = None
    weights: tuple[str, ...] = ()

    @property
    def damage(self) -> float:
        """The divergence where there is one, else the noise: what layers are ranked by."""
        return self.noise if self.divergence is None else self.divergence

    @property
    def sqnr_db(self) -> float | None:
        """The outputs' signal-to-error ratio, None where nothing changed."""
        return None if self.noise == 0 else float(-10 * np.log10(self.noise))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        plain = {name: getattr(self, name) for name in self.__slots__ if name not in ("drop", "weights")}
        drop = None if self.drop is None else self.drop.to_dict()
        return {**plain, "weights": list(self.weights), "drop": drop, "damage": self.damage, "sqnr_db": self.sqnr_db}


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Every layer under every spec, each alone. Prints as a table, the most sensitive layer first.

    measured_on: which data, "val" or "calibration". examples: how many. metric: the record of the float model's metric, None
    without labelled data. Class probabilities are outputs that sum to 1, or logits: the softmax of outputs whose targets are
    classes.
    """

    specs: tuple[Quantize, ...]
    rows: tuple[Damage, ...]
    measured_on: str
    examples: int
    metric: dict[str, Any] | None = None
    seconds: float = field(default=0.0, compare=False)
    target: str = ""

    def of(self, layer: str, spec: int = 0) -> Damage:
        """The row of `layer` under the spec of index `spec`.

        Raises:
            SpecError: no such row.
        """
        for row in self.rows:
            if row.layer == layer and row.spec == spec:
                return row
        raise SpecError(f"There is no layer {layer!r} under spec {spec}. Layers: {', '.join(self.layers)}.")

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers, in the order in which they run."""
        return tuple(dict.fromkeys(row.layer for row in self.rows))

    def ranked(self, spec: int = 0) -> tuple[str, ...]:
        """The layers that the spec of index `spec` changes, by falling damage; equals in the order in which they run."""
        own = [row for row in self.rows if row.spec == spec]
        return tuple(row.layer for row in sorted(own, key=lambda row: -row.damage))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "specs": [to_dict(spec) for spec in self.specs],
            "rows": [row.to_dict() for row in self.rows],
            "measured_on": self.measured_on,
            "examples": self.examples,
            "metric": self.metric,
            "seconds": self.seconds,
            "target": self.target,
        }

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """A row for each layer and spec: the most sensitive layer (by its worst damage) first."""
        worst = {layer: max(row.damage for row in self.rows if row.layer == layer) for layer in self.layers}
        order = sorted(self.layers, key=lambda layer: -worst[layer])
        kind = "KL, nats" if any(row.divergence is not None for row in self.rows) else "noise"
        header: tuple[str, ...] = ("layer", "scheme", "bytes", kind, "outputs, dB", "weights, dB")
        header = header if self.metric is None else (*header, f"{self.metric['name']} drop")
        body: list[tuple[str, ...]] = []
        for row in sorted(self.rows, key=lambda row: (order.index(row.layer), row.spec)):
            cells: tuple[str, ...] = (
                row.layer,
                row.scheme,
                f"{row.bytes:,}",
                texts.significant(row.damage),
                "exact" if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
                "exact" if row.weight_db is None else f"{row.weight_db:.1f}",
            )
            named = (
                None if self.metric is None or row.drop is None else texts.drop_text(row.drop.to_dict(), self.metric["name"])
            )
            body.append(cells if named is None else (*cells, named))
        return header, body

    def __str__(self) -> str:
        header, body = self._table()
        widths = [max(len(row[i]) for row in (header, *body)) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
            for row in (header, *body)
        ]
        return "\n".join([*(line.rstrip() for line in lines), self._note()])

    def _note(self) -> str:
        return (
            f"Each layer alone, {self.examples:,} examples of {self.measured_on}, {self.seconds:.1f} s, target {self.target}."
        )

    def _repr_html_(self) -> str:
        header, body = self._table()
        return htmltext.table(header, body, title="Sensitivity", notes=[self._note()])


def sensitivity(
    model: Any,
    specs: Quantize | Scheme | Sequence[Quantize | Scheme] | None = None,
    *,
    calibration: Any = None,
    val: Any = None,
    metric: Any = None,
    target: str | Target | None = None,
    example: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Sensitivity:
    """What each layer of `model` costs when it alone is quantized: its weights, and the values that it reads.

    `specs` are `Quantize(…)`, or schemes of weights alone such as `Int(4)`; by default `Quantize()`. Ranges come from
    `calibration`, unlabelled. Damage is measured on `val` where it is given, with the drop of `metric` (by default accuracy
    or the mean squared error), else on `calibration`, without labels. The model is traced, calibrated and solved once for each
    spec; then its layers are switched one by one in a running model, each at the cost of a pass over the data.

    Raises:
        SpecError, DataError, ModelError, TargetError: as `whet.quantize`.
    """
    wanted = _specs(specs)
    compressed = start(model, example=example, seed=seed)
    rules = find_target(target, compressed.side.FRAMEWORK)
    batches = None if calibration is None else Batches(calibration, "calibration")
    labelled = None if val is None else Batches(val, "val")
    source = labelled if labelled is not None else batches
    if source is None:
        raise DataError("sensitivity() measures outputs and needs data: pass calibration=, or labelled val= with a metric.")
    if compressed.example is None:
        compressed.example, _ = (source if batches is None else batches).first()
    score_by = None if labelled is None or (metric is None and labelled.first()[1] is None) else as_metric(metric, labelled)
    return measured(compressed, wanted, rules, calibration=batches, data=source, metric=score_by, progress=progress)


def measured(
    compressed: Compressed,
    specs: Sequence[Quantize],
    target: Target,
    *,
    calibration: Batches | None,
    data: Batches,
    metric: Metric | None,
    progress: bool,
) -> Sensitivity:
    """`sensitivity` of the float model of `compressed`, which is untouched."""
    started = time.perf_counter()
    rows: list[Damage] = []
    record: dict[str, Any] | None = None
    examples = 0
    with task("Sensitivity", None, enabled=progress) as bar:
        for index, spec in enumerate(specs):
            plan, step = compressed.side.quantize(
                compressed.float_model, spec, target, calibration=calibration, example=compressed.example, progress=False
            )
            variants = compressed.side.variants(compressed.float_model, plan, compressed.example)
            probe = _Probe(variants, plan, {row["name"]: row for row in step.changed}, data, metric)
            parts = parts_of(variants.graph, plan, probe.changed)
            bar.total = len(parts) * len(specs)
            rows += probe.damages(parts, index, bar)
            record = None if probe.before is None else probe.before.record
            examples = probe.examples
    return Sensitivity(tuple(specs), tuple(rows), data.what, examples, record, time.perf_counter() - started, target.name)


def sampled(data: Batches, limit: int = ENOUGH) -> Batches:
    """`limit` examples of `data` or a few less, as many from each batch, at equal distances: of data that is sorted too."""
    batches = list(data)
    sizes = [rows(inputs) for inputs, _ in batches]
    total = sum(sizes)
    if total <= limit:
        return data
    kept, start = [], 0
    for (inputs, targets), size in zip(batches, sizes, strict=True):
        own = np.arange(start, start + size)
        chosen = np.flatnonzero(own * limit // total != (own - 1) * limit // total)
        start += size
        if len(chosen):
            kept.append((take(inputs, chosen), None if targets is None else take(targets, chosen)))
    return Batches(kept, data.what)


class _Probe:
    """One plan, of which parts are switched on and their outputs compared with the float model's."""

    def __init__(
        self, variants: Variants, plan: Plan, changed: dict[str, dict[str, Any]], data: Batches, metric: Metric | None
    ) -> None:
        self.variants, self.plan, self.changed, self.data, self.metric = variants, plan, changed, data, metric
        self.variants.use(restricted(plan, (), changed))
        self.reference = self._outputs()
        self.examples = len(leaves(self.reference)[0])
        self.power = sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in _numbers(self.reference))
        self.kind = classes_of(primary(self.reference), data.first()[1])
        self.logs = None if self.kind is None else log_probabilities(primary(self.reference), self.kind)
        self.before: Score | None = None if metric is None else score(self.reference, data, metric)

    def damages(self, parts: Sequence[Part], index: int, bar: Task) -> Iterator[Damage]:
        """The row of every part."""
        for part in parts:
            self.variants.use(restricted(self.plan, (part,), self.changed))
            yield self._damage(part, index)
            bar.advance(note=part.layer)

    def _damage(self, part: Part, index: int) -> Damage:
        outputs = self._outputs()
        pairs = zip(_numbers(self.reference), _numbers(outputs), strict=True)
        error = sum(float(np.sum(np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)))) for a, b in pairs)
        if not np.isfinite(error):
            raise RuntimeFileError(f"With {part.layer!r} quantized the model's outputs are not finite.")
        divergence = None
        if self.kind is not None and self.logs is not None:
            divergence = _divergence(self.logs, log_probabilities(primary(outputs), self.kind))
        drop = None
        if self.before is not None and self.metric is not None:
            drop = score_drop(self.before, score(outputs, self.data, self.metric), self.metric)
        rows = [self.changed[name] for name in part.weights]
        parameters = sum(row["parameters"] for row in rows)
        return Damage(
            part.layer,
            index,
            " + ".join(dict.fromkeys(row["scheme"] for row in rows)),
            sum(row["bits"] * row["parameters"] for row in rows) / max(parameters, 1),
            parameters,
            sum(stored_bytes(self.plan.weights.get(row["name"]), row) for row in rows),
            error / self.power if self.power else error,
            divergence,
            drop,
            _weight_db(rows),
            part.weights,
        )

    def _outputs(self) -> Any:
        return concatenate([self.variants.predict(inputs) for inputs, _ in self.data])


def stored_bytes(params: QParams | Codebook | None, row: dict[str, Any]) -> int:
    """Bytes of one weight in the target's file: its codes in the type they are stored in, with the scales, zero points and
    levels that belong to them (of 32, 8 and 32 bits). row: of its step."""
    total: int = row["parameters"] * _STORED.get(row.get("stored", ""), row["bits"])
    if params is not None:
        total += 32 * params.scale.size
        if isinstance(params, Codebook):
            total += 32 * params.levels.size
        elif not params.spec.symmetric:
            total += 8 * params.zero_point.size
    return -(-total // 8)


def classes_of(outputs: Any, targets: Any) -> str | None:
    """How class probabilities, classes last, are read from a model's outputs: "probabilities", "logits", or None.

    Rows that sum to 1 are probabilities; others are logits where the targets are integers of one dimension less.
    """
    array = np.asarray(outputs)
    if array.dtype.kind != "f" or array.ndim < 2 or array.shape[-1] < 2:
        return None
    if bool(np.all(array >= 0)) and bool(np.all(np.abs(array.sum(axis=-1, dtype=np.float64) - 1) < _FEW)):
        return "probabilities"
    goal = None if targets is None else np.asarray(primary(targets))
    return "logits" if goal is not None and goal.dtype.kind in "iu" and goal.ndim == array.ndim - 1 else None


def log_probabilities(outputs: Any, kind: str) -> npt.NDArray[np.float64]:
    """The logarithms of class probabilities, classes last; `kind` as `classes_of` says."""
    rows = np.asarray(outputs, np.float64)
    if kind == "probabilities":  # rounded ones need not sum to 1
        rows = np.log(np.maximum(rows, _LEAST))
    rows = rows - rows.max(axis=-1, keepdims=True)
    return np.asarray(rows - np.log(np.sum(np.exp(rows), axis=-1, keepdims=True)))


def _divergence(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> float:
    """`Σ p (log p - log q)` in nats, a mean over all but the classes."""
    return max(0.0, float(np.mean(np.sum(np.exp(before) * (before - after), axis=-1))))


def _numbers(outputs: Any) -> list[Any]:
    return [leaf for leaf in map(np.asarray, leaves(outputs)) if leaf.dtype.kind == "f"]


def _weight_db(rows: Sequence[dict[str, Any]]) -> float | None:
    """The worst of the layer's weights."""
    return min((row["error_db"] for row in rows if row.get("error_db") is not None), default=None)


def _specs(specs: Any) -> tuple[Quantize, ...]:
    """Specs as `Quantize`, without what does not belong to one layer alone: training, corrected biases, accuracy control."""
    given = (Quantize(),) if specs is None else tuple(specs) if isinstance(specs, list | tuple) else (specs,)
    found = []
    for spec in given:
        if isinstance(spec, SCHEMES):
            spec = Quantize(spec, None)
        if not isinstance(spec, Quantize) or isinstance(spec.weights, Adaptive):
            raise SpecError(f"sensitivity() takes Quantize(…) of fixed schemes, or schemes such as Int(4), got {spec!r}.")
        found.append(alone(spec))
    if not found:
        raise SpecError("sensitivity() needs at least one spec.")
    return tuple(found)


def alone(spec: Quantize) -> Quantize:
    """`spec` as it is measured for one layer: biases are not corrected, nothing is trained, blocks are rounded by layer."""
    rounding = replace(spec.rounding, blocks=False) if isinstance(spec.rounding, AdaRound) else spec.rounding
    return replace(spec, rounding=rounding, correct_bias=None, qat=None, max_drop=None)


__all__ = [
    "Damage",
    "Sensitivity",
    "alone",
    "classes_of",
    "log_probabilities",
    "measured",
    "sampled",
    "sensitivity",
    "stored_bytes",
]
