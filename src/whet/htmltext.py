"""Records as small pieces of HTML for notebooks: escaped, without scripts, in the notebook's own colours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from whet import texts

_LISTED = 60  # rows of a table; what is left out is said


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]], *, title: str = "", notes: Iterable[str] = ()) -> str:
    """A table whose first column is text and whose others are aligned to the right; every cell is escaped."""
    shown = rows if len(rows) <= _LISTED else [*rows[: _LISTED - 10], *rows[-10:]]
    lines = [f"<tr>{''.join(_cell('td', text, i) for i, text in enumerate(row))}</tr>" for row in shown]
    if len(shown) < len(rows):
        gap = f'<tr><td colspan="{len(header)}">… {len(rows) - len(shown)} more …</td></tr>'
        lines.insert(_LISTED - 10, gap)
    head = "".join(_cell("th", text, i) for i, text in enumerate(header))
    told = heading(title) if title else ""
    said = "".join(f"<p>{_text(note)}</p>" for note in notes)
    return f"<div>{told}<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>{said}</div>"


def heading(text: str) -> str:
    """A line in bold above a table."""
    return f"<p><strong>{_text(text)}</strong></p>"


def report_html(data: Mapping[str, Any]) -> str:
    """The content of a report.json: before and after where it was measured, and the steps."""
    before, after, change = data.get("original"), data.get("compressed"), data.get("change")
    parts = []
    if before and after and change:
        name = before["metric"]["name"]
        rows = [
            (
                f"{name} (n={before['metric']['n']:,})",
                texts.score_with_interval(before["metric"]),
                texts.score_with_interval(after["metric"]),
                f"drop {texts.drop_text(change['metric_drop'], name)}",
            ),
            ("file", *_sizes(before, after, "bytes"), texts.ratio_text(change["size_ratio"])),
            ("file, gzipped", *_sizes(before, after, "gzip_bytes"), texts.ratio_text(change["gzip_ratio"])),
        ]
        ratio = change.get("latency_ratio")
        if before.get("latency_ms") and after.get("latency_ms") and ratio and ratio.get("value") is not None:
            old, new = (texts.ms_text(entry["latency_ms"]["p50"]) for entry in (before, after))
            rows.append(("latency p50", old, new, texts.ratio_text(ratio["value"]) + texts.interval(ratio, False, 3)))
        warnings = [*(data.get("warnings") or ()), *(after.get("warnings") or ())]
        parts.append(table(("", "original", "compressed", "change"), rows, title=_verdict(data), notes=dict.fromkeys(warnings)))
    steps = [
        (index, next(iter(step["spec"]), "?"), len(step["changed"]), len(step["skipped"]), f"{step['seconds']:.1f}")
        for index, step in enumerate(data.get("steps") or (), 1)
    ]
    if steps:
        parts.append(table(("step", "spec", "weights changed", "skipped", "seconds"), steps))
    return "".join(parts) or "<div><p>Nothing was done or measured yet.</p></div>"


def evidence_html(plain: Mapping[str, Any]) -> str:
    """One measured file: `Evidence.to_dict()`."""
    latency, stored = plain.get("latency_ms"), plain["dtypes"].get("stored") or {}
    timed = f"{texts.ms_text(latency['p50'])} (p90 {texts.ms_text(latency['p90'])})" if latency else "not measured"
    rows = [
        (f"{plain['metric']['name']} (n={plain['metric']['n']:,})", texts.score_with_interval(plain["metric"])),
        ("file", texts.bytes_text(plain["bytes"])),
        ("file, gzipped", texts.bytes_text(plain["gzip_bytes"])),
        ("latency p50", timed),
        ("stored", ", ".join(f"{dtype} {texts.bytes_text(count)}" for dtype, count in stored.items()) or "nothing"),
        ("runtime", f"{plain['runtime'].get('name')} {plain['runtime'].get('version')}"),
    ]
    return table(("", plain["file"]), rows, notes=plain.get("warnings") or ())


def _sizes(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> tuple[str, str]:
    return texts.bytes_text(before[key]), texts.bytes_text(after[key])


def _verdict(data: Mapping[str, Any]) -> str:
    budget = data.get("budget") or {}
    if "met" not in budget:
        return "Before and after"
    missed = "; ".join(map(str, budget.get("missed") or ()))
    return "Budget met" if budget["met"] else f"Budget MISSED: {missed}"


def _cell(tag: str, text: Any, index: int) -> str:
    side = "left" if index == 0 else "right"
    return f'<{tag} style="text-align:{side}">{_text(text)}</{tag}>'


def _text(value: Any) -> str:
    return escape(texts.printable(value))
