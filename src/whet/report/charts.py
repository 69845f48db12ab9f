"""The geometry of the page's charts, in SVG user units. The template draws it, so that every label is escaped there.

One panel is 360 × 190 units: small enough to stand alone on a phone at full text size, or beside others on a desk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet.report import words

WIDTH, HEIGHT = 360.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 10.0, 22.0, 26.0
_DOTS, _HITS = 80, 400  # beyond this many epochs the dots of a line are not drawn, and not told to the pointer


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled position on an axis."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Dot:
    """One epoch's value."""

    x: float
    y: float
    label: str


@dataclass(frozen=True, slots=True)
class Marker:
    """A vertical line that marks an epoch. anchor: on which side of the line its label stands."""

    x: float
    label: str
    kind: str
    anchor: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One curve over the epochs. lines: polylines, cut where a value is missing. shade: right end of the pruning ramp.

    is_dotted: whether the dots are drawn; the pointer finds them all the same.
    """

    title: str
    lines: tuple[str, ...]
    dots: tuple[Dot, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    markers: tuple[Marker, ...]
    shade: float | None
    is_dotted: bool = True


@dataclass(frozen=True, slots=True)
class Whisker:
    """A score and its interval on a common scale, in percent of the width."""

    at: float
    low: float
    high: float


def training_panels(train: Mapping[str, Any]) -> tuple[Panel, ...]:
    """The curves of one training record: the validation metric, the loss and the sparsity, each where it was recorded."""
    history, stop = train["history"], train["stop"]
    epochs = [row["epoch"] for row in history]
    if not epochs:
        return ()
    name = f"{train.get('metric') or 'metric'} on validation data"
    panels = []
    for key, title in (("metric", name), ("loss", "training loss"), ("sparsity", "sparsity")):
        values = [_finite(row.get(key)) for row in history]
        if any(value is not None for value in values):
            in_percent = key == "sparsity" or (key == "metric" and words.is_percentage(name))
            panels.append(_panel(title, epochs, values, stop, _ramp_end(history), in_percent))
    return tuple(panels)


def whiskers(metrics: Sequence[Mapping[str, Any]]) -> tuple[Whisker, ...]:
    """Scores with their intervals on one scale that holds them all with some room."""
    spans = [(m["value"], *(m["ci95"] if m.get("ci95") is not None else (m["value"], m["value"]))) for m in metrics]
    low, high = min(map(min, spans)), max(map(max, spans))
    room = (high - low) * 0.15 or max(abs(high) * 0.05, 1e-9)
    scale = 100 / (high - low + 2 * room)
    placed = [[round((value - low + room) * scale, 2) for value in span] for span in spans]
    return tuple(Whisker(*span) for span in placed)


def _panel(
    title: str,
    epochs: list[int],
    values: list[float | None],
    stop: Mapping[str, Any],
    ramp_end: int | None,
    in_percent: bool,
) -> Panel:
    known = [value for value in values if value is not None]
    ticks = nice_ticks(min(known), max(known))
    low, high = min(ticks[0], *known), max(ticks[-1], *known)
    first, last = epochs[0], max(epochs[-1], epochs[0] + 1)

    def x(epoch: float) -> float:
        return round(LEFT + (epoch - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    lines: list[list[str]] = [[]]
    dots: list[Dot] = []
    for epoch, value in zip(epochs, values, strict=True):
        if value is None:
            lines.append([])
            continue
        lines[-1].append(f"{x(epoch)},{y(value)}")
        said = words.percent(value) if in_percent else words.significant(value, 4)
        dots.append(Dot(x(epoch), y(value), f"epoch {epoch}: {said}"))
    return Panel(
        title=title,
        lines=tuple(" ".join(line) for line in lines if line),
        dots=tuple(dots[:: math.ceil(len(dots) / _HITS)]),
        is_dotted=len(dots) <= _DOTS,
        x_ticks=tuple(Tick(x(e), str(e)) for e in _epoch_ticks(first, epochs[-1])),
        y_ticks=tuple(Tick(y(value), tick_label(value, ticks, in_percent)) for value in ticks),
        markers=_markers(stop, epochs, x),
        shade=None if ramp_end is None else x(ramp_end),
    )


def _markers(stop: Mapping[str, Any], epochs: list[int], x: Any) -> tuple[Marker, ...]:
    """The epoch whose weights were kept, and the last one if training was stopped before its end."""
    best, last = stop.get("best_epoch"), epochs[-1]
    markers = []
    if best is not None and best in epochs:
        markers.append(Marker(x(best), f"kept {best}", "kept", "end" if x(best) > WIDTH / 2 else "start"))
    if str(stop.get("reason", "")).startswith("stopped") and last != best:
        near = best is not None and x(last) - x(best) < 60 and markers and markers[0].anchor == "start"
        if not near:
            markers.append(Marker(x(last), "stop", "stop", "end" if best is None or x(last) - x(best) > 40 else "none"))
    return tuple(markers)


def _ramp_end(history: Sequence[Mapping[str, Any]]) -> int | None:
    """The last epoch before patience began, if the sparsity rose during training."""
    waiting = [int(row["epoch"]) for row in history if row.get("eligible") is False]
    if waiting:
        return waiting[-1]
    values = [_finite(row.get("sparsity")) or 0.0 for row in history]
    if values[-1] <= values[0] + 1e-6:
        return None
    return next(int(row["epoch"]) for row, value in zip(history, values, strict=True) if value >= values[-1] - 1e-3)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers whose range holds `[low, high]`; a flat range is widened."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        margin = abs(high) * 0.05 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 2.5, 5) if m * power >= rough * 0.999), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _epoch_ticks(first: int, last: int) -> list[int]:
    step = max(1, round(nice_ticks(0, max(last - first, 1), 6)[1]))
    return list(range(first, last + 1, step))


def tick_label(value: float, ticks: Sequence[float], in_percent: bool) -> str:
    """`value` with as many decimals as tell it from the other `ticks`."""
    step, shown = ticks[1] - ticks[0], value
    if in_percent:
        step, shown = step * 100, value * 100
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    decimals += 0 if abs(step * 10**decimals - round(step * 10**decimals)) < 1e-6 else 1
    if decimals > 5:
        return f"{shown:.1e}"
    return f"{shown:,.{decimals}f}{' %' if in_percent else ''}"


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
