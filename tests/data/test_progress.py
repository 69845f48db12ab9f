"""Progress: lines in a log, a bar on a terminal, silence when switched off."""

from __future__ import annotations

import sys

import pytest

import whet.progress
from whet.errors import MissingExtraError, require
from whet.progress import task


def test_silent_when_switched_off(capsys) -> None:
    with task("train", 3, enabled=False) as made:
        made.advance(note="loss 1")
    assert made.done == 1 and capsys.readouterr() == ("", "")


def test_lines_in_a_log(capsys, monkeypatch) -> None:
    monkeypatch.setattr(whet.progress, "QUIET_SECONDS", 0.0)
    with task("train", 4, enabled=True) as made:
        made.advance(2, note="loss [0.5]")
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[0] == "train: 2/4, loss [0.5]" and err.splitlines()[1].endswith(" s, loss [0.5]")


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
