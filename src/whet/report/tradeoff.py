"""The geometry of accuracy against size and against latency: the original and every recipe that was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet.report import words
from whet.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Tick, nice_ticks, tick_label


@dataclass(frozen=True, slots=True)
class Place:
    """Where a label stands: its baseline's start, middle or end."""

    x: float
    y: float
    anchor: str


@dataclass(frozen=True, slots=True)
class Point:
    """One file, in SVG units. kind: "original", "candidate" or "chosen". low, high: the ends of the metric's interval.

    place: where its label stands, None where it would cover another's.
    """

    x: float
    y: float
    low: float
    high: float
    kind: str
    label: str
    place: Place | None
    tip: str


@dataclass(frozen=True, slots=True)
class Scatter:
    """One plot. note: what was measured on which data."""

    title: str
    points: tuple[Point, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    note: str


@dataclass(frozen=True, slots=True)
class _File:
    kind: str
    label: str
    recipe: str
    metric: Mapping[str, Any]
    bytes: int
    latency: Mapping[str, Any] | None


def scatters(data: Mapping[str, Any]) -> tuple[Scatter, ...]:
    """Accuracy against bytes, and against the median latency where files were timed.

    All points of a plot were measured on the same data: the validation data where the recipes tried were recorded with their
    intervals (and timed), else what the report itself is on, the original and the result.
    """
    tried, final = _tried(data), _final(data)
    name = str(data["original"]["metric"]["name"])
    found = [_scatter(f"{name} against the file's size", tried or final, _bytes, words.bytes_text, _split(data, tried))]
    timed = [file for file in tried if file.latency is not None]
    if len(timed) < max(2, len(tried)):
        timed = [file for file in final if file.latency is not None]
    if len(timed) > 1:
        on = _split(data, tried if timed[0] in tried else [])
        found.append(_scatter(f"{name} against the median latency", timed, _median, words.ms_text, on))
    return tuple(found)


def _bytes(file: _File) -> float:
    return float(file.bytes)


def _median(file: _File) -> float:
    return 0.0 if file.latency is None else float(file.latency["p50"])


def _tried(data: Mapping[str, Any]) -> list[_File]:
    """The original and all candidates on the validation data; nothing where the report does not have these."""
    candidates = data.get("candidates") or ()
    if not candidates or not all(candidate.get("on_val") and candidate.get("original_on_val") for candidate in candidates):
        return []
    first = next((candidate for candidate in candidates if candidate.get("chosen")), candidates[0])
    files = [_file("original", "original", "", first["original_on_val"])]
    for number, candidate in enumerate(candidates, 1):
        kind = "chosen" if candidate.get("chosen") else "candidate"
        files.append(_file(kind, f"recipe {number}", words.recipe_text(candidate["recipe"]), candidate["on_val"]))
    return files


def _final(data: Mapping[str, Any]) -> list[_File]:
    made = _file("chosen", "compressed", words.recipe_text(data.get("recipe") or []), data["compressed"])
    return [_file("original", "original", "", data["original"]), made]


def _file(kind: str, label: str, recipe: str, plain: Mapping[str, Any]) -> _File:
    return _File(kind, label, recipe, plain["metric"], plain["bytes"], plain.get("latency_ms"))


def _split(data: Mapping[str, Any], tried: Sequence[_File]) -> str:
    reported = {"val": "validation", "test": "test"}.get(str((data.get("budget") or {}).get("reported_on")))
    return "validation data" if tried else f"{reported} data" if reported else "the data of this report"


def _scatter(title: str, files: Sequence[_File], position: Any, said: Any, split: str) -> Scatter:
    spans = [(f.metric["value"], *(f.metric.get("ci95") or (f.metric["value"],) * 2)) for f in files]
    ticks = nice_ticks(min(map(min, spans)), max(map(max, spans)))
    x_ticks = nice_ticks(0.0, max(position(file) for file in files) or 1.0)
    in_percent = words.is_percentage(str(files[0].metric["name"]))

    def x(value: float) -> float:
        return round(LEFT + value / x_ticks[-1] * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (HEIGHT - TOP - BOTTOM), 1)

    points = []
    places = _places([(x(position(file)), y(span[0]), file.label) for file, span in zip(files, spans, strict=True)])
    for file, (value, low, high), place in zip(files, spans, places, strict=True):
        at = x(position(file))
        lines = [file.label, words.score_with_interval(file.metric), said(position(file)), file.recipe]
        tip = "\n".join(line for line in lines if line)
        points.append(Point(at, y(value), y(low), y(high), file.kind, file.label, place, tip))
    unit = said(x_ticks[-1]).split()[-1]  # in the title: beside every number they would run into one another
    points.sort(key=lambda point: point.kind == "chosen")  # drawn last, it is never covered
    return Scatter(
        f"{title}, {unit}",
        tuple(points),
        tuple(Tick(x(value), _plain_tick(value, unit)) for value in x_ticks),
        tuple(Tick(y(value), tick_label(value, ticks, in_percent)) for value in ticks),
        f"On the {split.removeprefix('the ')}; bars are 95 % confidence intervals.",
    )


def _places(labelled: Sequence[tuple[float, float, str]]) -> list[Place | None]:
    """A place for each label beside, above or below its point, where it covers neither a point nor an earlier label."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y, _ in labelled]
    found: list[Place | None] = []
    for x, y, label in labelled:
        width, chosen = 6.6 * len(label), None
        for place in (
            Place(x + 9, y + 4, "start"),
            Place(x - 9, y + 4, "end"),
            Place(x, y - 11, "middle"),
            Place(x, y + 19, "middle"),
        ):
            left = place.x - {"start": 0.0, "middle": width / 2, "end": width}[place.anchor]
            box = (left, place.y - 10, left + width, place.y + 2)
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM + 4
            if inside and not any(_overlap(box, other) for other in taken):
                chosen = place
                taken.append(box)
                break
        found.append(chosen)
    return found


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _plain_tick(value: float, unit: str) -> str:
    """`20` of the unit."""
    scale = {"kB": 1e3, "MB": 1e6, "GB": 1e9}.get(unit, 1.0)
    return f"{value / scale:,.6g}"
