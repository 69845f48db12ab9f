"""The further numbers of the two files, below the table that decides: every batch size, operators, memory, a cold start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from whet.report import words
from whet.report.view import Row


def detail_rows(data: Mapping[str, Any]) -> list[Row]:
    """Original and compressed side by side; what neither file's record holds is left out."""
    before, after = data["original"], data["compressed"]
    rows = [*_latencies(before.get("latencies") or (), after.get("latencies") or ())]
    texts: tuple[tuple[str, Callable[[Mapping[str, Any]], str | None]], ...] = (
        ("file, zstd", _zstd),
        ("operators", _operators),
        ("import of the runtime", _process("import_s", _seconds)),
        ("opening the file", _process("load_s", _seconds)),
        ("first run", _process("first_run_s", _seconds)),
        ("peak memory of the process", _process("peak_rss_bytes", words.bytes_text)),
    )
    for label, text in texts:
        old, new = text(before), text(after)
        if old is not None or new is not None:
            rows.append(Row(label, old or "not measured", new or "not measured"))
    return rows


def _latencies(before: Any, after: Any) -> list[Row]:
    """p50, p90 and p99 of every batch size and thread count that both files were timed with."""
    known = {(entry["batch"], entry["threads"]): entry for entry in before}
    rows = []
    for entry in after:
        old = known.get((entry["batch"], entry["threads"]))
        if old is not None:
            threads = f"{entry['threads']} thread{'' if entry['threads'] == 1 else 's'}"
            label = f"p50 / p90 / p99, batch {entry['batch']}, {threads}"
            rows.append(Row(label, _quantiles(old), _quantiles(entry), words.latency_text(entry.get("ratio"))))
    return rows


def _quantiles(entry: Mapping[str, Any]) -> str:
    values = (entry.get(name) for name in ("p50", "p90", "p99"))
    return " / ".join("–" if value is None else words.significant(value) for value in values) + " ms"


def _zstd(plain: Mapping[str, Any]) -> str | None:
    packed = plain.get("zstd_bytes")
    if not packed:
        return None
    return str(packed.get("reason")) if packed.get("value") is None else words.bytes_text(packed["value"])


def _operators(plain: Mapping[str, Any]) -> str | None:
    counts = plain.get("operators")
    if not counts:
        return None
    said = [f"{counts[kind]} {name}" for kind, name in (("quantized", "in integers"), ("float", "in float")) if kind in counts]
    if counts.get("other"):
        said.append(f"{counts['other']} other")
    if counts.get("delegated") is not None:
        said.append(f"{counts['delegated']} delegated")
    return ", ".join(said)


def _process(key: str, said: Callable[[float], str]) -> Callable[[Mapping[str, Any]], str | None]:
    def text(plain: Mapping[str, Any]) -> str | None:
        value = (plain.get("process") or {}).get(key)
        return None if value is None else said(value)

    return text


def _seconds(seconds: float) -> str:
    return words.ms_text(1e3 * seconds)
