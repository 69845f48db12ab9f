"""job.py: run without leaving anything behind, and blamed for its own errors."""

from __future__ import annotations

import sys

import pytest

from whet.cli.jobs import blame, opened
from whet.errors import SpecError


def write(tmp_path, text, name="myjob.py"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_its_functions_are_called_and_its_neighbours_imported(tmp_path) -> None:
    write(tmp_path, "SIZE = 3\n", "my_sibling.py")
    path = write(tmp_path, "def model():\n    import my_sibling\n    return my_sibling.SIZE\nmetric = max\n")
    with opened(path) as job:
        assert job.call("model") == 3
        assert job.call("test") is None
        assert job.metric is max


def test_nothing_is_left_behind(tmp_path) -> None:
    before = list(sys.path)
    with opened(write(tmp_path, "def model(): return 1\n")):
        assert "myjob" in sys.modules
    assert sys.path == before
    assert "myjob" not in sys.modules


def test_a_job_named_like_a_module_does_not_replace_it(tmp_path) -> None:
    import json

    with opened(write(tmp_path, "def model(): return 1\n", "json.py")) as job:
        assert sys.modules["json"] is json
        assert job.call("model") == 1


def test_missing_functions_are_named_all_at_once(tmp_path) -> None:
    with opened(write(tmp_path, "import os\ndef model(): return 1\ndef helper(): pass\n")) as job:
        with pytest.raises(SpecError, match=r"functions train\(\), val\(\). It defines: model, helper\."):
            job.check("model", "train", "val")
        with pytest.raises(SpecError, match=r"function train\(\), and does not"):
            job.call("train")


def test_something_that_is_no_function_is_refused(tmp_path) -> None:
    with opened(write(tmp_path, "train = [1, 2]\n")) as job, pytest.raises(SpecError, match="must be a function"):
        job.call("train")


def test_a_missing_file_is_refused(tmp_path) -> None:
    with pytest.raises(SpecError, match="no job file"), opened(tmp_path / "none.py"):
        pass


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ndef train():\n    return 1 / 0\n", "myjob.py, line 3, in train(): ZeroDivisionError: division by zero"),
        ("x = 1\nraise ValueError('no')\n", "myjob.py, line 2: ValueError: no"),
        ("x = 1\ndef f(:\n", "myjob.py, line 2: SyntaxError"),
        ("import no_such_module_here\n", "myjob.py, line 1: ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("def train():\n    return int('a'.join(c for c in 3))\n", "myjob.py, line 2, in train(): TypeError"),
    ],
)
def test_its_errors_are_shown_with_their_line(tmp_path, text, said) -> None:
    path = write(tmp_path, text)
    with pytest.raises((Exception,)) as caught, opened(path) as job:
        job.call("train")
    assert said in (blame(caught.value, path) or "")


def test_the_error_of_another_is_not_blamed_on_the_job(tmp_path) -> None:
    path = write(tmp_path, "")
    with pytest.raises(ZeroDivisionError) as caught:
        1 / 0  # noqa: B018
    assert blame(caught.value, path) is None
