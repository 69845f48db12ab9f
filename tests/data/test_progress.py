"""Progress: lines in a log, a bar on a terminal, silence when switched off."""

from __future__ import annotations

import json
import sys

import pytest

import whet.progress
from whet.errors import MissingExtraError, OutputError, SpecError, require
from whet.progress import log_to, task


def test_silent_when_switched_off(capsys) -> None:
    with task("train", 3, enabled=False) as made:
        made.advance(note="loss 1")
    assert made.done == 1 and capsys.readouterr() == ("", "")


def test_lines_in_a_log(capsys, monkeypatch) -> None:
    monkeypatch.setattr(whet.progress, "QUIET_SECONDS", 0.0)
    with task("train", 4, enabled=True) as made:
        made.advance(2, note="loss [0.5]")
    out, err = capsys.readouterr()
    first, last = err.splitlines()
    assert out == "" and first == "train: 2/4, 0 s left, loss [0.5]" and last.endswith(" s, loss [0.5]")


def test_lines_tell_the_time_left_at_the_pace_since_the_task_began(capsys, monkeypatch) -> None:
    clock = iter([0.0, 20.0, 20.0, 40.0, 40.0, 400.0, 400.0, 420.0])
    monkeypatch.setattr(whet.progress.time, "monotonic", lambda: next(clock))
    with task("train", 100, enabled=True) as made:
        made.resume(50, "after epoch 5")  # what was done before says nothing
        made.advance(10)
        made.advance(10)
    assert capsys.readouterr().err.splitlines() == [
        "train: 50/100, after epoch 5",
        "train: 60/100, 3 min left, after epoch 5",
        "train: 70/100, 10 min left, after epoch 5",
        "train: 420.0 s, after epoch 5",
    ]


RECORDS = [{"epoch": 1, "loss": 0.5, "metric": None}, {"epoch": 2, "loss": 0.25, "metric": 0.75}]


def test_records_are_appended_to_json_lines_and_to_a_table(tmp_path) -> None:
    for record in RECORDS:
        log_to(tmp_path / "new" / "log.jsonl")(record)
        log_to(str(tmp_path / "log.csv"))(record)
    assert [json.loads(line) for line in (tmp_path / "new" / "log.jsonl").read_text().splitlines()] == RECORDS
    assert (tmp_path / "log.csv").read_text() == "epoch,loss,metric\n1,0.5,\n2,0.25,0.75\n"
    assert log_to(None) is None and log_to(print) is print


def test_a_log_that_cannot_be_written_is_named_before_training(tmp_path) -> None:
    with pytest.raises(SpecError, match=r"log must be a function .*, or the path of a \.jsonl or \.csv file, got 'a\.txt'"):
        log_to("a.txt")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Cannot write the log"):
        log_to(tmp_path / "file" / "log.csv")
    (tmp_path / "log.csv").write_text("other,columns\n")
    with pytest.raises(OutputError, match="a table of other columns"):
        log_to(tmp_path / "log.csv")(RECORDS[0])


def test_few_lines_by_default(capsys) -> None:
    with task("train", None, enabled=True) as made:
        for _ in range(100):
            made.advance()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_bar_shows_names_as_text(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    with task("layer [bold]x[/bold]", 2, enabled=True) as made:
        made.advance(2, note="loss [0.5]")
    err = capsys.readouterr().err
    assert "[bold]x[/bold]" in err and "loss [0.5]" in err


def test_the_task_ends_on_an_error(capsys) -> None:
    with pytest.raises(ZeroDivisionError), task("train", 1, enabled=True):
        raise ZeroDivisionError
    assert "train: " in capsys.readouterr().err


def test_a_missing_package_names_its_extra() -> None:
    with pytest.raises(
        MissingExtraError, match=r"Exporting needs the package 'no_such_package'.*pip install 'whet\[onnx\]'"
    ) as caught:
        require("no_such_package", "onnx", "Exporting")
    assert isinstance(caught.value, ImportError) and isinstance(caught.value.__cause__, ImportError)
