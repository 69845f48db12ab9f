"""What a notebook shows of a result: complete, escaped, without scripts."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np

from report_samples import EVIL, evidence, sample_report
from whet.graph.summary import LayerRow, Summary
from whet.htmltext import table
from whet.records import Evidence, Latency, Report


class Fragment(HTMLParser):
    """The tags and the text of a fragment, each tag closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.said = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open.append(tag)
        assert {name for name, _ in attrs} <= {"style", "colspan"}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said += data + " "


HARMLESS = {"div", "p", "strong", "table", "thead", "tbody", "tr", "th", "td"}


def test_a_report_shows_before_and_after_with_intervals() -> None:
    found = Fragment(Report(sample_report())._repr_html_())
    assert found.tags <= HARMLESS
    for text in ("Budget met", "97.5 % [95.5, 98.5]", "89.4 kB", "0.303 ×", "1.29 × [1.21, 1.33]", "SLOWER here", "Quantize"):
        assert text in found.said


def test_a_missed_budget_and_a_report_of_steps_alone() -> None:
    budget = {"met": False, "missed": [f"size is {EVIL}"]}
    found = Fragment(Report(sample_report(budget=budget))._repr_html_())
    assert f"Budget MISSED: size is {EVIL}" in found.said and found.tags <= HARMLESS
    steps = {"format": 1, "seed": 0, "steps": sample_report()["steps"]}
    assert "Train" in Fragment(Report(steps)._repr_html_()).said
    assert "Nothing was done" in Fragment(Report({"steps": []})._repr_html_()).said


def test_a_measured_file() -> None:
    plain = evidence(EVIL, size=27_104, gzip_size=11_870, accuracy=0.972, p50=0.027, integer=True)
    plain["latency_ms"] = Latency(**plain["latency_ms"])
    found = Fragment(Evidence(**{**plain, "warnings": (f"still float {EVIL}",)})._repr_html_())
    assert EVIL in found.said and found.tags <= HARMLESS
    for text in ("97.2 % [95.2, 98.2]", "27.1 kB", "0.0270 ms", "int8 20.9 kB", "onnxruntime 1.31.1", "still float"):
        assert text in found.said
    untimed = Evidence(**{**plain, "latency_ms": None})
    assert "not measured" in Fragment(untimed._repr_html_()).said


def test_a_summary_shows_layers_and_totals() -> None:
    summary = Summary(
        (LayerRow(EVIL, "Conv2d", (None, 8, 4, 4), 80, 1280, 320), LayerRow("fc", "Linear", (10,), 90, 90, 360)), ("head",)
    )
    found = Fragment(summary._repr_html_())
    for text in (EVIL, "?×8×4×4", "1,280", "1,370", "never run by the example: head"):
        assert text in found.said
    assert str(summary).splitlines()[0].split() == ["layer", "kind", "output", "parameters", "MACs", "bytes"]


def test_a_long_table_says_what_it_leaves_out() -> None:
    found = table(("name", "n"), [(f"row{i}", i) for i in range(200)])
    assert "… 140 more …" in found and "row49<" in found and "row50<" not in found and "row190<" in found
    assert found.index("row49<") < found.index("140 more") < found.index("row190<")


def test_a_compressed_model_says_what_it_is() -> None:
    from types import SimpleNamespace

    from whet.pipeline.compressed import Compressed

    class Net:
        pass

    made = Compressed(SimpleNamespace(), Net(), masks={"w": np.array([1, 0, 0, 0], np.uint8)})
    found = Fragment(made._repr_html_())
    assert "Compressed Net: float, 75.0 % of 4 masked weights removed" in found.said and found.tags <= HARMLESS
