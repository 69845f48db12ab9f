"""The Markdown table, and putting it into a README."""

from __future__ import annotations

import pytest

from report_samples import sample_report
from whet.errors import OutputError, RuntimeFileError
from whet.records import Report
from whet.report.markdown import before_after_table, update_between


def test_the_table_has_four_columns_and_says_how_it_was_made() -> None:
    lines = before_after_table(Report(sample_report()), command="make demo").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 8
    assert all(line.count("|") == 5 for line in table)
    assert "| file | 89.4 kB | 27.1 kB | 0.303 × |" in table
    assert lines[-1].endswith("Made by `make demo`.")
    assert "onnxruntime 1.31.1, batch 1, 1 thread" in lines[-1]
    assert "&lt;b>2.1 GHz" in lines[-1]


def test_a_metric_name_does_not_break_the_table() -> None:
    data = sample_report()
    data["original"]["metric"]["name"] = "a|b*c<br>`d\ne"
    line = next(line for line in before_after_table(Report(data)).splitlines() if "a\\|b" in line)
    assert line.startswith("| a\\|b\\*c&lt;br>\\`d e (n=360) |")


def test_between_markers(tmp_path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- demo -->\nold\n<!-- /demo -->\nafter\n", encoding="utf-8")
    update_between(readme, "demo", "new\n")
    once = readme.read_text(encoding="utf-8")
    assert once == "before\n<!-- demo -->\nnew\n<!-- /demo -->\nafter\n"
    update_between(readme, "demo", "new\n")
    assert readme.read_text(encoding="utf-8") == once


@pytest.mark.parametrize(
    "text", ["nothing", "<!-- /demo --><!-- demo -->", "<!-- demo --><!-- demo --><!-- /demo -->", "<!-- demo -->"]
)
def test_markers_must_be_there_once_and_in_order(tmp_path, text) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(RuntimeFileError, match="once each"):
        update_between(readme, "demo", "new")
    assert readme.read_text(encoding="utf-8") == text


def test_a_wrong_marker_and_a_missing_file(tmp_path) -> None:
    with pytest.raises(OutputError, match="marker"):
        update_between(tmp_path / "README.md", "a --> b", "new")
    with pytest.raises(RuntimeFileError, match="Cannot read"):
        update_between(tmp_path / "README.md", "demo", "new")
