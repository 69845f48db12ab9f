"""The report as one HTML file that needs nothing else: no network, no fonts, no scripts from elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import yaml

from whet.files import replacing
from whet.records import Report
from whet.report import charts, histograms, words
from whet.report.details import detail_rows
from whet.report.tradeoff import scatters
from whet.report.view import Layer, View, view_of


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table of weights; it is left out where no step said anything."""

    title: str
    value: Callable[[Layer], Any]
    text: Callable[[Any], str] = str
    numeric: bool = True


COLUMNS = (
    Column("parameters", lambda layer: layer.parameters, "{:,}".format),
    Column("removed", lambda layer: layer.removed, words.percent),
    Column(
        "shape",
        lambda layer: layer.shapes,
        lambda shapes: " → ".join("×".join(map(str, shape)) for shape in shapes),
        numeric=False,
    ),
    Column("sparsity", lambda layer: layer.sparsity, words.percent),
    Column("bits", lambda layer: layer.bits),
    Column("scheme", lambda layer: layer.scheme, numeric=False),
    Column("SQNR, dB", lambda layer: layer.error_db, "{:.1f}".format),
    Column("sensitivity", lambda layer: layer.sensitivity, words.significant),
)


def write_html(report: Report, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the page to `path`, whole or not at all.

    Raises:
        RuntimeFileError: the report lacks an entry.
        OutputError: `path` exists and `overwrite` is false, or cannot be written.
    """
    text = render_html(report)
    with replacing(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render_html(report: Report) -> str:
    """The page as text. Everything that comes from the model or the user is escaped by the template.

    Raises:
        RuntimeFileError: the report lacks an entry.
    """
    view, data = view_of(report), report.data
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["together"] = _together
    template = environment.from_string(_package_file("report.html.j2"))
    return template.render(
        view=view,
        data=data,
        style=_package_file("report.css"),
        script=_package_file("report.js"),
        cards=_cards(data),
        columns=[column for column in COLUMNS if any(column.value(layer) is not None for layer in view.layers)],
        whiskers=charts.whiskers([data["original"]["metric"], data["compressed"]["metric"]]),
        details=detail_rows(data),
        drawn_steps=sorted({number for layer in view.layers for number in layer.histograms}),
        drawn=histograms.drawn,
        mini=histograms,
        scatters=scatters(data),
        trainings=[(step, charts.training_panels(step.train)) for step in view.steps if step.train],
        skipped=_by_reason(view),
        recipe=_recipe_yaml(data),
        environment=words.environment_rows(data["environment"]),
        words=words,
        box=charts,
    )


def _together(text: str) -> str:
    """`text` with its numbers kept on one line with their signs and units, and the two ends of an interval together."""
    text = re.sub(r"(?<=[\d\]]) (?=[%×]|[kMG]?B\b|ms\b|points\b)|(?<=,) (?=-?[\d.,]+\])", "\u00a0", text)
    return re.sub(r" (?=×\d)", "\u00a0", text)


def _package_file(name: str) -> str:
    return (resources.files("whet.report") / "templates" / name).read_text(encoding="utf-8")


def _cards(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Size, gzipped size and latency as pairs of bars: widths in percent of the longer one."""
    before, after, change = data["original"], data["compressed"], data["change"]
    cards = [
        _card("file on disk", before["bytes"], after["bytes"], change["size_ratio"], words.bytes_text),
        _card("file, gzipped", before["gzip_bytes"], after["gzip_bytes"], change["gzip_ratio"], words.bytes_text),
    ]
    ratio = change.get("latency_ratio")
    verdict = words.latency_verdict(ratio)
    if before.get("latency_ms") and after.get("latency_ms") and verdict:
        latencies = before["latency_ms"]["p50"], after["latency_ms"]["p50"]
        card = _card("latency, median", *latencies, ratio["value"], words.ms_text)
        cards.append({**card, "verdict": verdict, "tone": {"faster": "good", "SLOWER": "bad"}.get(verdict, "")})
    return cards


def _card(title: str, before: float, after: float, ratio: float, text: Any) -> dict[str, Any]:
    longest = max(before, after) or 1
    return {
        "title": title,
        "change": words.ratio_text(ratio),
        "verdict": "smaller" if ratio < 1 else "LARGER" if ratio > 1 else "the same",
        "tone": "good" if ratio < 1 else "bad" if ratio > 1 else "",
        "bars": [(text(value), round(100 * value / longest, 1)) for value in (before, after)],
    }


def _by_reason(view: View) -> list[tuple[int, str, list[str]]]:
    """(step, reason, names) in the order first seen."""
    found: dict[tuple[int, str], list[str]] = {}
    for item in view.skipped:
        found.setdefault((item.step, item.reason), []).append(item.name)
    return [(step, reason, names) for (step, reason), names in found.items()]


def _recipe_yaml(data: Mapping[str, Any]) -> str | None:
    recipe = data.get("recipe")
    if not recipe:
        return None
    plain = recipe if isinstance(recipe, Mapping) else {"format": 1, "recipe": recipe}
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return text
