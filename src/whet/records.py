"""What was done and what was measured: plain data that becomes `report.json` (format 1) unchanged.

Everything a step or a measurement says is in these records; `whet.report` only draws them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whet import htmltext, texts
from whet.errors import RuntimeFileError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95 % interval; `ci95` is None with a `reason` when none can be had."""

    value: float
    ci95: tuple[float, float] | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """`{"value", "ci95"}`, with `"reason"` where there is no interval."""
        plain: dict[str, Any] = {"value": self.value, "ci95": None if self.ci95 is None else list(self.ci95)}
        if self.reason is not None:
            plain["reason"] = self.reason
        return plain


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds for one batch, timed in alternation with the original where there is one.

    cpu_per_wall: CPU time of the process over wall time while timing; about `threads` on a quiet machine. ratio: of medians,
    to the original timed in the same turns, `{"value", "ci95"}`; None for the original itself.
    """

    p50: float
    p90: float
    batch: int
    threads: int
    runs: int
    cpu_per_wall: float
    p99: float | None = None
    ratio: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a mapping."""
        names = ("p50", "p90", "p99", "batch", "threads", "runs", "cpu_per_wall", "ratio")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Evidence:
    """One file, run by its runtime.

    metric: `{"name", "value", "ci95", "n", "higher_is_better"}`. dtypes: `{"stored": {dtype: bytes}, "computed": {operator:
    {dtype: count}}}`. placement: `{"target", "quantized_values", …}` or None for a float file. parity: against the
    original file, `{"agreement", "max_error", "mean_error", "sqnr_db"}`, None for the original. warnings: plain words.

    latencies: one for every batch size and thread count that was timed, `latency_ms` the first. zstd_bytes: `{"value"}`,
    None with a "reason" where it was not packed. operators: `{"quantized", "float", "other", "delegated"}`, how many
    operators compute in integers, in float, and in neither; and how many of all run in a delegate, None where the runtime
    does not tell. process: what a fresh process that opens and runs the file once needs, see `whet.runtimes.probe`.
    """

    file: str
    bytes: int
    gzip_bytes: int
    metric: dict[str, Any]
    latency_ms: Latency | None
    runtime: dict[str, str]
    placement: dict[str, Any] | None
    dtypes: dict[str, Any]
    parity: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    latencies: tuple[Latency, ...] = ()
    zstd_bytes: dict[str, Any] | None = None
    operators: dict[str, Any] | None = None
    process: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The form of `E` in report.json."""
        plain: dict[str, Any] = {
            "file": self.file,
            "bytes": self.bytes,
            "gzip_bytes": self.gzip_bytes,
            "metric": self.metric,
            "latency_ms": None if self.latency_ms is None else self.latency_ms.to_dict(),
            "runtime": self.runtime,
            "placement": self.placement,
            "dtypes": self.dtypes,
            "warnings": list(self.warnings),
            "latencies": [latency.to_dict() for latency in self.latencies],
            "zstd_bytes": self.zstd_bytes,
            "operators": self.operators,
            "process": self.process,
        }
        if self.parity is not None:
            plain["parity"] = self.parity
        return plain

    def __str__(self) -> str:
        """A line of what matters, and a line for every warning."""
        parts = [f"{self.metric['name']} {texts.score_with_interval(self.metric)} (n={self.metric['n']:,})"]
        if self.bytes:
            parts.append(f"{texts.bytes_text(self.bytes)}, {texts.bytes_text(self.gzip_bytes)} gzipped")
        if self.latency_ms is not None:
            timed = self.latency_ms
            parts.append(f"{texts.ms_text(timed.p50)} (batch {timed.batch}, {timed.threads} thread{'s'[: timed.threads > 1]})")
        parts.append(" ".join(filter(None, (self.runtime["name"], self.runtime.get("version")))))
        return "\n".join([f"{self.file}: " * bool(self.file) + "; ".join(parts), *(f"! {text}" for text in self.warnings)])

    def _repr_html_(self) -> str:
        return htmltext.evidence_html(self.to_dict())


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a recipe, as it was done.

    spec: the spec's plain form. changed: one mapping per changed weight, `{"name", …}` with any of "sparsity", "bits",
    "scheme", "error_db" (SQNR of the stored weight), "parameters", "sensitivity", "why", "histogram" (`{"edges": [low, high],
    "before": [counts], "after": [counts]}`), "removed" (the fraction of its numbers that left), "shape" and "left" (its shape
    before and after). skipped: what stayed as it was, and why. unmatched: patterns of the spec that named nothing.

    train: None, or `{"history": [{"epoch", "loss", "metric", "sparsity", "learning_rate", "eligible", "phase"}], "stop":
    {"reason", "best_epoch", "epochs"}, "metric": name, "notes": [sentence]}`; epochs count from 1; eligible: whether the epoch
    could be best (the pruning schedule was done).

    control: None, or how a search for what to quantize went: "adaptive" and "max_drop", see docs/report.md.
    removal: None, or what is known of channels that left: "oracle" (the largest difference from the original with them
    silenced, of the largest output) and "tolerance", "change" (the same from the original itself, before any training),
    "silent", "constant" and "varying" (how many groups were zero, always another number, or neither), "folded" and "left"
    (`{"layer", "channels", "largest", …}`: layers that took such numbers over, and those that could not, with the "reason"),
    "reconstructed" (`{"layers": [{"name", "silenced_db", "output_db"}], "skipped": [{"name", "reason"}]}`, decibels).
    """

    spec: dict[str, Any]
    changed: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, str], ...]
    seconds: float
    train: dict[str, Any] | None = None
    unmatched: tuple[str, ...] = ()
    control: dict[str, Any] | None = None
    removal: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The form of a step in report.json."""
        return {
            "spec": self.spec,
            "changed": list(self.changed),
            "skipped": list(self.skipped),
            "seconds": self.seconds,
            "train": self.train,
            "unmatched": list(self.unmatched),
            "control": self.control,
            "removal": self.removal,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Step:
        """The step that `to_dict` wrote."""
        return cls(
            plain["spec"],
            tuple(plain["changed"]),
            tuple(plain["skipped"]),
            plain["seconds"],
            plain["train"],
            tuple(plain.get("unmatched", ())),
            plain.get("control"),
            plain.get("removal"),
        )


@dataclass(frozen=True, slots=True)
class Report:
    """Before and after. `data` is the content of report.json: see docs/report.md for its fields."""

    data: dict[str, Any] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        return htmltext.report_html(self.data)

    def to_json(self) -> str:
        """The text of report.json: indented, a list of numbers on one line."""
        text = json.dumps(self.data, indent=1, allow_nan=False)
        # A text in JSON holds no line break, so these are lists.
        return re.sub(r"\[\n[-+\d.eE,\s]+\n\s*\]", lambda found: re.sub(r"\n\s*", "", found[0]).replace(",", ", "), text)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Report:
        """The report in a report.json file.

        Raises:
            RuntimeFileError: there is no such file, it is not a report, or of another format.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as cause:
            raise RuntimeFileError(f"Cannot read the report {os.fspath(path)!r}: {cause.strerror}.") from cause
        except ValueError as cause:
            raise RuntimeFileError(f"{os.fspath(path)!r} is not a report.json: {cause}") from cause
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            got = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise RuntimeFileError(f"This Whet reads reports of format {FORMAT}; {os.fspath(path)!r} has format {got!r}.")
        return cls(data)
