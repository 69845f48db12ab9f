"""The report on a terminal and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from report_samples import EVIL, sample_report
from whet.records import Report
from whet.report.console import evidence_table, print_report, report_text


@pytest.mark.parametrize("width", [60, 80, 140])
def test_it_fits_its_width_and_loses_no_number(width) -> None:
    text = report_text(Report(sample_report()), width)
    assert max(map(len, text.splitlines())) <= width
    flat = text.split()
    for word in ("97.5", "97.2", "89.4", "27.1", "0.303", "0.144", "SLOWER", "0.28", "[-0.83,"):
        assert word in flat, word


def test_a_log_gets_no_colour_and_a_terminal_does() -> None:
    assert "\x1b" not in report_text(Report(sample_report()))
    out = io.StringIO()
    print_report(Report(sample_report()), Console(file=out, force_terminal=True, width=80, color_system="standard"))
    assert "\x1b[" in out.getvalue()


def test_names_are_neither_markup_nor_terminal_commands() -> None:
    data = sample_report()
    data["steps"][0]["skipped"] = [{"name": "[red]layer[/red]", "reason": "kept"}, {"name": "a\x1b[2Jb", "reason": "kept"}]
    text = report_text(Report(data))
    assert "[red]layer[/red], a�[2Jb" in text
    assert "\x1b" not in text


def test_it_says_what_was_skipped_what_matched_nothing_and_the_warnings() -> None:
    text = " ".join(report_text(Report(sample_report())).split())
    assert "skipped in step 1, biases are not pruned: conv1.bias" in text
    assert f"norm {EVIL}" in text
    assert "the pattern 'classifier*' matched no layer" in text
    assert "! SLOWER here" in text


def test_many_skipped_layers_are_counted() -> None:
    data = sample_report()
    data["steps"][0]["skipped"] = [{"name": f"layer{i}", "reason": "kept"} for i in range(20)]
    text = report_text(Report(data))
    assert "and 8 more" in text
    assert "layer19" not in text


def test_a_missed_budget_is_told_with_its_reasons() -> None:
    budget = {
        "spec": {"Budget": {}},
        "met": False,
        "missed": ["size is 9 bytes, allowed 3"],
        "decided_on": "val",
        "reported_on": "test",
    }
    text = report_text(Report(sample_report(budget=budget)))
    assert "Budget MISSED: Budget(), decided on val." in text
    assert "missed: size is 9 bytes, allowed 3" in text


def test_files_side_by_side() -> None:
    data = sample_report()
    del data["compressed"]["metric"]["ci95"]
    data["compressed"]["latency_ms"] = None
    out = io.StringIO()
    Console(file=out, width=100, color_system=None).print(evidence_table([data["original"], data["compressed"]]))
    text = out.getvalue()
    for word in ("original.onnx", "model.onnx", "89.4 kB", "27.1 kB", "not measured", "onnxruntime 1.31.1"):
        assert word in text
