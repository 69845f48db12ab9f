"""What every form of a report says: the console table, the Markdown table and the HTML page are drawn from this."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from whet.errors import RuntimeFileError
from whet.records import Report
from whet.report import words

_FILE = ("file", "bytes", "gzip_bytes", "metric.name", "metric.value", "metric.n", "runtime.name", "runtime.version", "dtypes")
_NEEDED = (
    *(f"{which}.{path}" for which in ("original", "compressed") for path in _FILE),
    "change.metric_drop.value",
    "change.size_ratio",
    "change.gzip_ratio",
    "steps",
    "environment",
    "seed",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the before/after table. tone: "good", "bad" or "" for how the change is coloured."""

    label: str
    original: str
    compressed: str
    change: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight over all steps; what no step said is None. removed: the fraction of its numbers that left, of `shapes`, the
    first and the last. error_db: SQNR of the stored weight in dB. sensitivity: what the outputs lost with this weight's layer
    alone changed (KL in nats, or relative noise). histograms: number of a step -> the values before and after it."""

    name: str
    parameters: int | None = None
    removed: float | None = None
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    sparsity: float | None = None
    bits: int | None = None
    scheme: str | None = None
    error_db: float | None = None
    sensitivity: float | None = None
    histograms: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


_ROW = ("parameters", "removed", "sparsity", "bits", "scheme", "error_db", "sensitivity")  # of a changed weight, as it is


@dataclass(frozen=True, slots=True)
class Skipped:
    """What a step left as it was."""

    step: int
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class StepView:
    """One step in words. removal: what left, and how it was checked. solved: `{"name", "silenced_db", "output_db"}` of weights
    solved anew. train: the step's training record, if it trained."""

    number: int
    spec: str
    outcome: str
    removal: str | None
    solved: tuple[Mapping[str, Any], ...]
    stop: str | None
    unmatched: tuple[str, ...]
    train: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class View:
    """A report in words."""

    headline: str
    verdict: str
    met: bool | None
    missed: tuple[str, ...]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    steps: tuple[StepView, ...]
    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]


def beside(report: Report, others: Sequence[Report]) -> Report:
    """`report` with the compressed files of `others` in its comparison of runtimes.

    Raises:
        RuntimeFileError: a report lacks an entry.
    """
    for each in (report, *others):
        for path in _NEEDED:
            _require(each.data, path)
    known = report.data.get("runtimes") or [report.data["original"], report.data["compressed"]]
    return Report({**report.data, "runtimes": [*known, *(other.data["compressed"] for other in others)]})


def view_of(report: Report) -> View:
    """The report in words.

    Raises:
        RuntimeFileError: the report lacks an entry, which is named.
    """
    data = report.data
    for path in _NEEDED:
        _require(data, path)
    budget = data.get("budget") or {}
    steps = tuple(_step(number, step) for number, step in enumerate(data["steps"], 1))
    return View(
        headline=_headline(data),
        verdict=_verdict(budget),
        met=budget.get("met"),
        missed=tuple(map(str, budget.get("missed") or ())),
        rows=tuple(_rows(data)),
        warnings=_warnings(data),
        steps=steps,
        layers=_layers(data["steps"]),
        skipped=tuple(
            Skipped(number, str(item["name"]), str(item["reason"]))
            for number, step in enumerate(data["steps"], 1)
            for item in step["skipped"]
        ),
        notes=tuple(_notes(data, budget)),
    )


def _require(data: Any, path: str) -> None:
    found = data
    for part in path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise RuntimeFileError(f"This report.json has no entry {path!r}. Write it again with whet compress.")
        found = found[part]


def _headline(data: Mapping[str, Any]) -> str:
    before, after, change = data["original"]["metric"], data["compressed"]["metric"], data["change"]
    parts = [
        f"{words.ratio_text(change['size_ratio'])} the bytes ({words.ratio_text(change['gzip_ratio'])} gzipped)",
        f"{before['name']} {words.score(before)} → {words.score(after)}",
    ]
    latency = change.get("latency_ratio")
    verdict = words.latency_verdict(latency)
    if verdict in ("faster", "SLOWER"):
        parts.append(f"{verdict}: {words.ratio_text(latency['value'])} the latency")
    elif verdict:
        parts.append(f"latency: {verdict}")
    return ", ".join(parts)


def _verdict(budget: Mapping[str, Any]) -> str:
    if "met" not in budget:
        return "No budget was set."
    spec = words.spec_text(budget.get("spec") or {"Budget": {}})
    decided = f", decided on {budget['decided_on']}" if budget.get("decided_on") else ""
    return f"Budget {'met' if budget['met'] else 'MISSED'}: {spec}{decided}."


def _rows(data: Mapping[str, Any]) -> list[Row]:
    before, after, change = data["original"], data["compressed"], data["change"]
    name, drop = before["metric"]["name"], change["metric_drop"]
    worse, better = _sides(drop, 0.0)
    label = f"{name} (n={before['metric']['n']:,})"
    old, new = (words.score_with_interval(e["metric"]) for e in (before, after))
    rows = [
        Row(label, old, new, f"drop {words.drop_text(drop, name)}", "bad" if worse else "good" if better else ""),
        _size_row("file", before["bytes"], after["bytes"], change["size_ratio"]),
        _size_row("file, gzipped", before["gzip_bytes"], after["gzip_bytes"], change["gzip_ratio"]),
    ]
    rows += _latency_rows(before.get("latency_ms"), after.get("latency_ms"), change.get("latency_ratio"))
    for what, text in (("stored", words.stored_text), ("computed", words.computed_text)):
        rows.append(Row(what, text(before["dtypes"]), text(after["dtypes"])))
    return rows


def _size_row(label: str, before: int, after: int, ratio: float) -> Row:
    tone = "good" if ratio < 1 else "bad" if ratio > 1 else ""
    suffix = " LARGER" if ratio > 1 else ""
    return Row(label, words.bytes_text(before), words.bytes_text(after), words.ratio_text(ratio) + suffix, tone)


def _latency_rows(before: Any, after: Any, ratio: Any) -> list[Row]:
    if not before or not after:
        return [Row("latency", "not measured", "not measured")]
    tone = {"faster": "good", "SLOWER": "bad"}.get(words.latency_verdict(ratio) or "", "")
    change = words.latency_text(ratio)
    return [
        Row("latency p50", words.ms_text(before["p50"]), words.ms_text(after["p50"]), change, tone),
        Row("latency p90", words.ms_text(before["p90"]), words.ms_text(after["p90"])),
    ]


def _sides(estimate: Mapping[str, Any], neutral: float) -> tuple[bool, bool]:
    """(surely above, surely below) `neutral`, by the interval; without one nothing is sure."""
    if estimate.get("ci95") is None:
        return False, False
    low, high = estimate["ci95"]
    return low > neutral, high < neutral


def _warnings(data: Mapping[str, Any]) -> tuple[str, ...]:
    found = [*(data.get("warnings") or ())]
    found += data["compressed"].get("warnings") or ()
    found += [f"the original: {warning}" for warning in data["original"].get("warnings") or ()]
    return tuple(dict.fromkeys(map(str, found)))


def _step(number: int, step: Mapping[str, Any]) -> StepView:
    count, skipped = len(step["changed"]), len(step["skipped"])
    outcome = f"{count} weight{'' if count == 1 else 's'} changed, {skipped} skipped, {step['seconds']:.1f} s"
    train, stop = step.get("train"), None
    if train:
        ended = train["stop"]
        best = "no best epoch" if ended["best_epoch"] is None else f"weights of epoch {ended['best_epoch']} kept"
        stop = "; ".join([ended["reason"], f"{best}, {ended['epochs']} epochs run", *map(str, train.get("notes") or ())])
    return StepView(
        number,
        words.spec_text(step["spec"]),
        outcome,
        _removal(step),
        tuple((step["removal"].get("reconstructed") or {}).get("layers") or ()) if step.get("removal") else (),
        stop,
        tuple(step.get("unmatched") or ()),
        train,
    )


def _removal(step: Mapping[str, Any]) -> str | None:
    """How many numbers left, and how the outputs differ from the original's with these at zero, and from the original's."""
    known, rows = step.get("removal"), [row for row in step["changed"] if row.get("removed") is not None]
    if not known or not rows:
        return None
    before = sum(row["parameters"] for row in rows)
    left = before - sum(round(row["removed"] * row["parameters"]) for row in rows)
    solved = (known.get("reconstructed") or {}).get("layers") or ()
    parts = [f"{before:,} → {left:,} parameters in the weights that lost some"]
    if known.get("oracle") is not None:
        parts.append(f"checked: within {words.significant(known['oracle'])} of the same model with those at zero")
    if known.get("change") is not None:
        parts.append(f"outputs moved by {words.significant(known['change'])} of the largest")
    if solved:
        parts.append(f"{len(solved)} weight{'' if len(solved) == 1 else 's'} solved anew")
    return "; ".join(parts)


def _layers(steps: list[Mapping[str, Any]]) -> tuple[Layer, ...]:
    """One entry per changed weight, later steps filling in and replacing what earlier ones said."""
    found: dict[str, dict[str, Any]] = {}
    for number, step in enumerate(steps, 1):
        for item in step["changed"]:
            known = {key: item[key] for key in _ROW if item.get(key) is not None}
            fields = found.setdefault(str(item["name"]), {"histograms": {}})
            fields.update(known, name=str(item["name"]))
            if item.get("shape") and item.get("left"):
                first, last = fields.get("shapes", (tuple(item["shape"]),))[0], tuple(item["left"])
                size = math.prod(last)
                fields.update(shapes=(first, last), removed=1 - size / math.prod(first), parameters=size)
            if item.get("histogram") is not None:
                fields["histograms"][number] = item["histogram"]
    return tuple(Layer(**fields) for fields in found.values())


def _notes(data: Mapping[str, Any], budget: Mapping[str, Any]) -> list[str]:
    notes = ["Intervals in brackets are 95 % confidence intervals; the drop's is paired, example by example."]
    reasons = (
        ("the metric", data["original"]["metric"]),
        ("the drop", data["change"]["metric_drop"]),
        ("the latency", data["change"].get("latency_ratio") or {}),
    )
    notes += [f"No interval for {what}: {e['reason']}" for what, e in reasons if e.get("ci95") is None and e.get("reason")]
    if budget.get("reported_on"):
        same = budget["reported_on"] == budget.get("decided_on")
        notes.append(
            f"Measured on {budget['reported_on']}"
            + (": the data it was decided on, so the result is optimistic; pass test data for a fair one." if same else ".")
        )
    runtime, latency = data["compressed"]["runtime"], data["compressed"].get("latency_ms")
    if latency:
        notes.append(
            f"{runtime['name']} {runtime['version']}, batch {latency['batch']}, {latency['threads']} thread"
            f"{'' if latency['threads'] == 1 else 's'}, {latency['runs']} runs in alternation, "
            f"CPU time {latency['cpu_per_wall']:.2f} × wall time."
        )
    parity, simulated = data["compressed"].get("parity"), data.get("simulation_parity")
    if parity:
        notes.append(f"Against the original file: {_parity_text(parity)}.")
    if simulated:
        notes.append(f"The file against its simulation in the framework: {_parity_text(simulated)}.")
    return notes


def _parity_text(parity: Mapping[str, Any]) -> str:
    parts = []
    if parity.get("agreement") is not None:
        parts.append(f"top-1 agreement {words.percent(parity['agreement'])}")
    if parity.get("max_error") == 0 or (parity.get("agreement") == 1 and parity.get("sqnr_db") is None):
        return "all outputs are equal"
    if parity.get("sqnr_db") is not None:
        parts.append(f"SQNR {parity['sqnr_db']:.1f} dB")
    if parity.get("max_error") is not None:
        parts.append(f"largest difference {words.significant(parity['max_error'])}")
    return ", ".join(parts) or "not measured"
