"""Files and folders are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from whet.errors import OutputError
from whet.files import replacing


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path) -> None:
    path = tmp_path / "model.onnx"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists() and temporary.suffix == ".onnx"
    assert path.read_text() == "new" and left(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_leaves_everything_as_it_was(tmp_path, kind) -> None:
    path = tmp_path / "out"
    path.mkdir() if kind == "folder" else path.write_text("old")
    if kind == "folder":
        (path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path, overwrite=True) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert (path / "a" if kind == "folder" else path).read_text() == "old" and left(tmp_path) == ["out"]


@pytest.mark.parametrize("before", ["file", "folder"])
@pytest.mark.parametrize("after", ["file", "folder"])
def test_overwrite_replaces_files_and_folders_whole(tmp_path, before, after) -> None:
    path = tmp_path / "out"
    if before == "folder":
        path.mkdir()
        (path / "stale").write_text("old")
    else:
        path.write_text("old")
    if (before, after) == ("file", "folder"):
        with pytest.raises(OutputError, match="What was there is unchanged"), replacing(path, overwrite=True) as temporary:
            temporary.mkdir()
        assert path.read_text() == "old"
        return
    with replacing(path, overwrite=True) as temporary:
        if after == "folder":
            temporary.mkdir()
            (temporary / "fresh").write_text("new")
        else:
            temporary.write_text("new")
    assert (left(path) == ["fresh"]) if after == "folder" else (path.read_text() == "new")
    assert left(tmp_path) == ["out"]


def test_an_existing_path_is_refused_before_the_work_begins(tmp_path) -> None:
    (tmp_path / "out").write_text("old")
    with (
        pytest.raises(OutputError, match=r"exists. Choose another path, remove it, or pass overwrite=True"),
        replacing(tmp_path / "out"),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "out").read_text() == "old"


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="Cannot write to"), replacing(tmp_path / "file" / "deep" / "model"):
        pytest.fail("the block must not run")
    assert left(tmp_path) == ["file"]


def test_writing_nothing_is_an_error_and_leaves_no_folders(tmp_path) -> None:
    with pytest.raises(OutputError), replacing(tmp_path / "a" / "b" / "model"):
        pass
    assert left(tmp_path) == []


def test_folders_made_on_the_way_stay_only_with_the_file(tmp_path) -> None:
    with replacing(tmp_path / "a" / "b" / "model") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "a" / "b" / "model").read_text() == "x"


def test_a_failed_swap_puts_the_old_folder_back(tmp_path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "a").write_text("old")
    with pytest.raises(OutputError), replacing(path, overwrite=True):
        pass  # nothing written: the second rename fails after the first
    assert left(path) == ["a"] and left(tmp_path) == ["out"]


def test_what_is_written_beside_comes_along(tmp_path):
    with replacing(tmp_path / "m.xml") as temporary:
        temporary.write_text("graph")
        temporary.with_suffix(".bin").write_text("weights")
    assert {item.name: item.read_text() for item in tmp_path.iterdir()} == {"m.xml": "graph", "m.bin": "weights"}


def test_a_file_beside_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "m.bin").write_text("mine")
    with pytest.raises(OutputError, match=r"m\.bin.*belongs to 'm\.xml'"):
        with replacing(tmp_path / "m.xml") as temporary:
            temporary.write_text("graph")
            temporary.with_suffix(".bin").write_text("weights")
    assert {item.name: item.read_text() for item in tmp_path.iterdir()} == {"m.bin": "mine"}


def test_a_failed_move_puts_every_file_back(tmp_path, monkeypatch):
    for name in ("m.xml", "m.bin"):
        (tmp_path / name).write_text("old")
    move, target = os.replace, str(tmp_path / "m.xml")

    def fail_at_the_last(source, destination):
        if str(destination) == target:
            raise OSError(28, "No space left on device")
        move(source, destination)

    monkeypatch.setattr(os, "replace", fail_at_the_last)
    with pytest.raises(OutputError, match="No space left"):
        with replacing(tmp_path / "m.xml", overwrite=True) as temporary:
            temporary.write_text("new")
            temporary.with_suffix(".bin").write_text("new")
    assert {item.name: item.read_text() for item in tmp_path.iterdir()} == {"m.xml": "old", "m.bin": "old"}


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(OutputError, match="nothing was written"):
        with replacing(tmp_path / "m.xml"):
            pass
    assert list(tmp_path.iterdir()) == []
