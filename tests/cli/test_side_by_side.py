"""`whet measure` of several files, `whet compare` of several reports, `whet targets`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from bench import few_runs
from report_samples import sample_report
from whet.cli import app
from whet.cli.measuring import differences
from whet.specs.target import TARGETS


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def said(found):
    """The words on standard output, however the lines are broken."""
    return " ".join(found.stdout.split())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A float ONNX file and the same in int8, with labelled data in their layout."""
    pytest.importorskip("onnxruntime")
    import runtime_files

    folder = tmp_path_factory.mktemp("files")
    path, _ = runtime_files.onnx_file(folder)
    runtime_files.quantized_onnx(path)
    rng = np.random.default_rng(0)
    images = rng.random((60, 1, 8, 8), np.float32)
    np.savez(folder / "val.npz", x=images, y=np.arange(60) % 10)
    np.savez(folder / "other_layout.npz", x=images.transpose(0, 2, 3, 1), y=np.arange(60) % 10)
    broken = images.copy()
    broken[3, 0, 1, 1] = np.nan
    np.savez(folder / "nan.npz", x=broken, y=np.arange(60) % 10)
    np.savez(folder / "names.npz", pixels=images, y=np.arange(60) % 10)
    return folder


def test_files_side_by_side_at_every_batch_and_thread_count(files, monkeypatch):
    few_runs(monkeypatch, processes=True)
    monkeypatch.setenv("COLUMNS", "200")
    found = run(
        "measure", files / "float.onnx", files / "int8.onnx", "--data", files / "val.npz", "--batch", "1,4", "--threads", "1,2"
    )
    assert found.exit_code == 0, found.output
    text = said(found)
    for label in ("batch 1, 1 thread:", "batch 4, 1 thread:", "batch 1, 2 threads:", "batch 4, 2 threads:"):
        assert label in text
    assert "process, peak memory" in text and "open file" in text and "operators: integer / float / other" in text
    assert "int8.onnx against" in text and "× gzipped" in text
    assert "odd channel counts" in text


@pytest.mark.parametrize(
    ("option", "value"), [("--batch", "0"), ("--batch", "1,x"), ("--threads", ""), ("--threads", "1,,2"), ("--batch", "1.5")]
)
def test_conditions_that_are_no_numbers(files, option, value):
    found = run("measure", files / "float.onnx", "--data", files / "val.npz", option, value)
    assert found.exit_code == 2 and f"{option} takes integers" in found.stderr and "Traceback" not in found.output


def lacking(folder):
    """An ONNX file with an operator that no runtime has."""
    import onnx

    model = onnx.load(str(folder / "float.onnx"))
    model.graph.node[1].op_type = "Reluctant"
    onnx.save(model, str(folder / "lacking.onnx"))
    return folder / "lacking.onnx"


def truncated(folder):
    content = (folder / "float.onnx").read_bytes()
    (folder / "short.onnx").write_bytes(content[: len(content) // 2])
    return folder / "short.onnx"


def foreign(folder):
    (folder / "foreign.onnx").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    return folder / "foreign.onnx"


@pytest.mark.parametrize(
    ("make", "data", "words"),
    [
        (truncated, "val.npz", ("short.onnx", "truncated")),
        (foreign, "val.npz", ("foreign.onnx", "not an ONNX file")),
        (lacking, "val.npz", ("lacking.onnx", "Reluctant")),
        (None, "other_layout.npz", ("'x' (any, 1, 8, 8)", "(60, 8, 8, 1)", "transpose")),
        (None, "nan.npz", ("nan.npz", "nan", "(3, 0, 1, 1)")),
        (None, "names.npz", ("'x'", "'pixels'")),
    ],
)
def test_bad_files_and_data_are_one_sentence(files, make, data, words):
    path = files / "float.onnx" if make is None else make(files)
    before = sorted(item.name for item in files.iterdir())
    found = run("measure", path, "--data", files / data)
    assert found.exit_code == 2, found.output
    assert found.stderr.count("Error:") == 1 and "Traceback" not in found.output
    assert all(word in found.stderr for word in words), found.stderr
    assert sorted(item.name for item in files.iterdir()) == before


def test_a_runtime_that_is_not_installed_names_its_extra(files, monkeypatch):
    import whet.errors

    real = whet.errors.importlib.import_module

    def without(name, *rest):
        if name.startswith("onnxruntime"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(whet.errors.importlib, "import_module", without)
    found = run("measure", files / "float.onnx", "--data", files / "val.npz")
    assert found.exit_code == 2 and "pip install 'whet[onnx]'" in found.stderr and "Traceback" not in found.output


@pytest.fixture
def reports(tmp_path):
    def write(name, change=lambda data: None):
        data = sample_report()
        change(data)
        path = tmp_path / name
        path.write_text(json.dumps(data), encoding="utf-8")
        return path

    return write


def test_reports_side_by_side(reports, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    def smaller(data):
        data["compressed"]["bytes"] = 12_345
        data["change"]["size_ratio"] = 0.15

    found = run("compare", reports("a.json"), reports("b.json", smaller))
    assert found.exit_code == 0, found.output
    text = said(found)
    assert "a.json" in text and "b.json" in text and "12.3 kB" in text and "0.150 ×" in text
    assert "97.2 %" in text and "SLOWER" in text and "cannot be compared" not in text


def test_what_cannot_be_compared_is_said():
    def altered(**changes):
        data = sample_report()
        for path, value in changes.items():
            *keys, last = path.split("__")
            place = data
            for key in keys:
                place = place[key]
            place[last] = value
        return data

    base = sample_report()
    assert differences({"a": base, "b": sample_report()}) == []
    (told,) = differences({"a": base, "b": altered(compressed__metric__name="f1")})
    assert "'f1'" in told and "'accuracy'" in told and "cannot be compared" in told
    (told,) = differences({"a": base, "b": altered(compressed__metric__n=99)})
    assert "99 examples" in told
    (told,) = differences({"a": base, "b": altered(original__metric__value=0.5)})
    assert "same value" in told
    (told,) = differences({"a": base, "b": altered(environment__cpu="Another 3000")})
    assert "Another 3000" in told and "ratios" in told


def test_compare_takes_two_different_reports(reports, tmp_path):
    path = reports("a.json")
    for arguments in ((path,), (path, path)):
        found = run("compare", *arguments)
        assert found.exit_code == 2 and "two or more different" in found.stderr
    (tmp_path / "empty.json").write_text('{"format": 1}', encoding="utf-8")
    found = run("compare", path, tmp_path / "empty.json")
    assert found.exit_code == 2 and "lacks the entry 'compressed'" in found.stderr and "Traceback" not in found.output


def test_targets_tell_their_rules():
    found = run("targets")
    assert found.exit_code == 0
    for name, target in TARGETS.items():
        assert f"\n{name} (" in f"\n{found.stdout}"
        assert all(line in found.stdout for line in target.describe())
    assert "7 of 8 bits (±63)" in "".join(TARGETS["onnxruntime-portable"].describe())
    assert "8 bits (±127)" in "".join(TARGETS["onnxruntime"].describe())
    assert "concat" in TARGETS["litert"].describe()[3] and "softmax 0.00390625" in TARGETS["litert"].describe()[4]
