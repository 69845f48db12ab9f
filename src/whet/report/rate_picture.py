"""The picture of a learning-rate search: the loss over the rate, in SVG that stands alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from whet.report.charts import nice_ticks, tick_label

WIDTH, HEIGHT = 480.0, 260.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 34.0, 40.0
BLUE, ORANGE, GREY = "#3b7dd8", "#e08a2b", "#808080"


def rate_picture(rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], marks: dict[str, float]) -> str:
    """Losses as they were (thin) and smoothed over rates on a logarithmic axis; `marks` are rates with a name."""
    ticks = nice_ticks(min(smoothed), max(smoothed))
    low, high = ticks[0], ticks[-1]
    first, last = math.log10(rates[0]), math.log10(rates[-1])

    def x(rate: float) -> float:
        return LEFT + (math.log10(rate) - first) / (last - first or 1) * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return HEIGHT - BOTTOM - (min(max(loss, low), high) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def curve(values: Sequence[float], width: float, opacity: float) -> str:
        points = " ".join(f"{x(rate):.1f},{y(value):.1f}" for rate, value in zip(rates, values, strict=True))
        return f'<polyline points="{points}" fill="none" stroke="{BLUE}" stroke-width="{width}" stroke-opacity="{opacity}"/>'

    parts = [curve(losses, 1, 0.35), curve(smoothed, 2, 1)]
    for value in ticks:
        parts.append(_line(LEFT, y(value), WIDTH - RIGHT, y(value), GREY, 0.25))
        parts.append(_text(LEFT - 6, y(value) + 4, tick_label(value, ticks, False), "end"))
    for decade in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1):
        parts.append(_text(x(10.0**decade), HEIGHT - BOTTOM + 16, f"1e{decade}", "middle"))
    for row, (name, rate) in enumerate(marks.items()):
        at, turned = x(rate), x(rate) > WIDTH / 2
        parts.append(_line(at, TOP - 6, at, HEIGHT - BOTTOM, ORANGE, 1))
        parts.append(_text(at + (-4 if turned else 4), TOP - 18 + 13 * row, f"{name} {rate:.2g}", "end" if turned else "start"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "learning rate", "middle"))
    parts.append(_text(8, TOP - 18, "loss", "start"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" font-family="sans-serif" role="img">'
    return f"{head}<title>Loss over the learning rate</title>{''.join(parts)}</svg>\n"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, opacity: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}" stroke-opacity="{opacity}" fill="none"/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" text-anchor="{anchor}" fill="{GREY}">{escape(words)}</text>'
