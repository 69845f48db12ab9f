"""The page: whole, offline, and with every name as text."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from report_samples import EVIL, sample_report
from whet import Recipe
from whet.errors import OutputError
from whet.records import Report
from whet.report.html import render_html, write_html

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every tag that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.parts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        self.text.setdefault(tag, []).append(data)
        if tag not in ("script", "style", "title"):
            self.parts.append(data)

    def all_text(self) -> str:
        return " ".join(self.parts)


def page(**changes) -> Page:
    return Page(render_html(Report(sample_report(**changes))))


def test_the_summary_comes_first_and_everything_is_there() -> None:
    text = page().all_text()
    order = ["Budget met", "89.4", "[95.2", "Steps", "Weights, one by one", "Horizontal: epochs", "Skipped, and why"]
    order += ["Recipes tried", "format: 1", "Environment"]
    places = [text.index(word) for word in order]
    assert places == sorted(places)
    for word in ("SLOWER", "QLinearConv", "classifier*", "kept 18", "biases are not pruned", "avx512_vnni", "2.13.0"):
        assert word in text


def test_nothing_is_loaded_from_anywhere() -> None:
    found = page()
    for tag, attrs in found.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action", "poster"} & set(attrs), (tag, attrs)
        assert not any((name or "").startswith("on") for name in attrs), (tag, attrs)
    text = render_html(Report(sample_report()))
    assert "http://" not in text and "https://" not in text
    assert "url(" not in text and "@import" not in text
    policy = next(attrs["content"] for tag, attrs in found.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def evil_everywhere(value):
    """The sample with every text (and key of free naming) turned into a script."""
    if isinstance(value, dict):
        return {key: evil_everywhere(item) for key, item in value.items()}
    if isinstance(value, list):
        return [evil_everywhere(item) for item in value]
    return f"{EVIL}\"'&</script></style>{value}" if isinstance(value, str) else value


def test_every_text_of_a_report_stays_text() -> None:
    plain, evil = sample_report(), evil_everywhere(sample_report())
    evil["original"]["dtypes"]["computed"] = {EVIL: {EVIL: 1}}
    evil["environment"][EVIL] = EVIL
    text = render_html(Report(evil))
    assert EVIL not in text
    assert "<script>alert" not in text
    calm, hostile = Page(render_html(Report(plain))), Page(text)
    scripts = [attrs for tag, attrs in hostile.tags if tag == "script"]
    assert scripts == [attrs for tag, attrs in calm.tags if tag == "script"]
    assert "alert(1)" in hostile.all_text()
    assert {tag for tag, _ in hostile.tags} == {tag for tag, _ in calm.tags}


def test_a_layer_name_stays_text_in_tables_data_and_charts() -> None:
    data = sample_report()
    data["steps"][0]["train"]["metric"] = EVIL
    found = Page(render_html(Report(data)))
    assert f"{EVIL}.weight" in "".join(found.text["td"])
    assert any(EVIL in text for text in found.text["h4"])
    assert any(attrs.get("aria-label", "").startswith(EVIL) for tag, attrs in found.tags if tag == "svg")
    embedded = json.loads("".join(t for t in found.text["script"] if t.startswith("{")))
    assert embedded == data


def test_the_weights_can_be_sorted() -> None:
    found = page()
    names = [attrs["data-value"] for tag, attrs in found.tags if tag == "td" and attrs.get("class") == "name"]
    assert "conv1.weight" in names
    headings = found.text["button"]
    assert headings[:6] == ["weight", "parameters", "sparsity", "bits", "scheme", "SQNR, dB"]


def test_the_further_numbers_of_both_files() -> None:
    data = sample_report()
    for entry, ms in ((data["original"], 1.0), (data["compressed"], 0.5)):
        timed = {"p50": ms, "p90": 2 * ms, "p99": 3 * ms, "batch": 8, "threads": 2, "runs": 9, "cpu_per_wall": 1.0}
        entry["latencies"] = [{**timed, "ratio": {"value": ms, "ci95": [ms, ms]}}]
        entry["operators"] = {"quantized": 4, "float": 1, "other": 2, "delegated": None, "reason": "it does not tell"}
        entry["process"] = {"import_s": 0.1, "load_s": 0.007, "first_run_s": 0.001, "peak_rss_bytes": 64_000_000}
        entry["zstd_bytes"] = {"value": None, "reason": "not installed"}
    text = page(original=data["original"], compressed=data["compressed"]).all_text()
    for said in (
        "p50 / p90 / p99, batch 8, 2 threads",
        "0.500 / 1.00 / 1.50",
        "4 in integers, 1 in float, 2 other",
        "64.0",
        "7.00",
    ):
        assert said in text
    assert "Further numbers" not in page().all_text()


def test_columns_that_no_step_filled_are_left_out() -> None:
    data = sample_report()
    for step in data["steps"]:
        for item in step["changed"]:
            item.pop("parameters", None)
            item.pop("bits", None)
    headings = Page(render_html(Report(data))).text["button"]
    assert headings[:4] == ["weight", "sparsity", "scheme", "SQNR, dB"]


def test_the_recipe_can_be_copied_and_used() -> None:
    found = page()
    recipe = Recipe.from_yaml("".join(found.text["pre"]))
    assert recipe == Recipe.from_dict(sample_report()["recipe"])


def test_a_missed_budget_a_missing_latency_and_no_training_are_drawn() -> None:
    data = sample_report(
        budget={"spec": {"Budget": {}}, "met": False, "missed": [EVIL], "decided_on": "val", "reported_on": "val"}
    )
    data["original"]["latency_ms"] = data["compressed"]["latency_ms"] = None
    data["change"]["latency_ratio"] = {"value": None, "ci95": None}
    data["original"]["metric"]["ci95"] = data["compressed"]["metric"]["ci95"] = None
    data["change"]["metric_drop"] = {"value": 0.1, "ci95": None, "reason": "one number"}
    data["steps"] = [data["steps"][1]]
    for candidate in data["candidates"]:
        candidate["on_val"]["latency_ms"] = None
    found = Page(render_html(Report(data)))
    text = found.all_text()
    assert "Budget MISSED" in text and "not measured" in text and "No interval for the drop: one number" in text
    charts = [attrs["aria-label"] for tag, attrs in found.tags if tag == "svg" and attrs["class"] == "chart"]
    assert charts == ["accuracy against the file's size, kB"]


def test_a_report_with_the_least_content_is_drawn() -> None:
    data = sample_report(steps=[], candidates=[], warnings=[])
    for key in ("recipe", "budget", "simulation_parity", "created"):
        del data[key]
    text = Page(render_html(Report(data))).all_text()
    assert "No budget was set." in text and "Nothing was skipped." in text


def test_writing_is_whole_and_asks_before_it_replaces(tmp_path) -> None:
    path = tmp_path / "report.html"
    write_html(Report(sample_report()), path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(OutputError, match="exists"):
        write_html(Report(sample_report()), path)
    write_html(Report(sample_report(seed=123456)), path, overwrite=True)
    assert "123456" in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
