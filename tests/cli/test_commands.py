"""The commands, without a framework: reports, help, targets and refusals."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import whet
from report_samples import sample_report
from whet import Prune, Quantize
from whet.cli import app
from whet.cli.app import _told_before

COMMANDS = ("compress", "inspect", "sensitivity", "measure", "report", "compare", "targets")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def report_json(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(sample_report()), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command) -> None:
    found = run(command, "--help")
    assert found.exit_code == 0
    examples = [line for line in found.stdout.splitlines() if line.strip().startswith(f"whet {command}")]
    assert examples, found.stdout


def test_help_lists_the_commands_and_the_exit_status() -> None:
    found = run("--help").stdout
    assert all(command in found for command in COMMANDS)
    assert "3 if the budget was missed" in " ".join(run("compress", "--help").stdout.split())


STARTUP = """
import sys
from whet.cli import app
try:
    app(["compress", "--help"])
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {"torch", "keras", "tensorflow", "onnx", "onnxruntime", "jinja2", "ai_edge_litert", "numpy"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else 0)
"""


def test_help_imports_no_framework() -> None:
    ran = subprocess.run([sys.executable, "-c", STARTUP], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "whet compress job.py -o out/" in ran.stdout


def test_python_m_whet_says_its_version_even_to_an_ascii_terminal() -> None:
    import whet

    ran = subprocess.run([sys.executable, "-m", "whet", "--version"], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, f"whet {whet.__version__}\n")


def test_an_ascii_terminal_gets_a_report_too(report_json) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "whet", "report", str(report_json)],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": "", "PYTHONUTF8": "0"},
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert b"SLOWER" in ran.stdout
    assert max(ran.stdout) < 128


def test_targets_are_listed() -> None:
    found = run("targets")
    assert found.exit_code == 0
    assert "onnxruntime" in found.stdout and "litert" in found.stdout


def test_a_report_is_printed(report_json) -> None:
    found = run("report", report_json)
    assert found.exit_code == 0
    assert "97.2" in found.stdout and "SLOWER" in found.stdout


def test_a_report_as_markdown(report_json) -> None:
    found = run("report", report_json, "--format", "md", "--made-by", "make it")
    assert found.stdout.startswith("| | original |") and "`make it`" in found.stdout


def test_a_report_as_a_page(report_json, tmp_path) -> None:
    page = tmp_path / "page.html"
    assert run("report", report_json, "--html", page).exit_code == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    again = run("report", report_json, "--html", page)
    assert again.exit_code == 2 and "exists" in again.stderr
    assert run("report", report_json, "--html", page, "--overwrite").exit_code == 0


def test_a_report_goes_to_csv_files(report_json, tmp_path) -> None:
    found = run("report", report_json, "--csv", tmp_path / "numbers")
    assert found.exit_code == 0 and found.stdout == ""
    assert (tmp_path / "numbers" / "summary.csv").read_text().startswith("name,original,compressed")
    again = run("report", report_json, "--csv", tmp_path / "numbers")
    assert again.exit_code == 2 and "overwrite" in again.stderr
    assert run("report", report_json, "--csv", tmp_path / "numbers", "--overwrite").exit_code == 0


def test_a_report_beside_another_runtimes(report_json, tmp_path) -> None:
    other = sample_report()
    other["compressed"] |= {"file": "model.xml", "runtime": {"name": "openvino", "version": "2026.4"}}
    (tmp_path / "other.json").write_text(json.dumps(other), encoding="utf-8")
    page = tmp_path / "page.html"
    found = run("report", report_json, "--beside", tmp_path / "other.json", "--html", page)
    assert found.exit_code == 0, found.output
    assert "openvino 2026.4" in page.read_text(encoding="utf-8")


def test_a_report_goes_into_a_readme(report_json, tmp_path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- demo -->\n<!-- /demo -->\nb\n", encoding="utf-8")
    assert run("report", report_json, "--into", readme, "--marker", "demo").exit_code == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("a\n<!-- demo -->\n| | original") and text.endswith("<!-- /demo -->\nb\n")
    alone = run("report", report_json, "--into", readme)
    assert alone.exit_code == 2 and "--marker" in alone.stderr


@pytest.mark.parametrize("content", ["{}", "not json", "[]", '{"format": 99}', '{"format": 1}'])
def test_a_report_that_is_none_is_refused(tmp_path, content) -> None:
    path = tmp_path / "report.json"
    path.write_text(content, encoding="utf-8")
    found = run("report", path)
    assert found.exit_code == 2
    assert found.stderr.startswith("Error: ") and "Traceback" not in found.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compress", "model.pt", "-o", "out"], "pickle"),
        (["compress", "none.py", "-o", "out"], "no job file"),
        (["compress", "model.keras", "-o", "out"], "--train and --val"),
        (["compress", "none.py", "-o", "out", "--max-drop", "nan"], "Budget.max_drop"),
        (["compress", "none.py", "-o", "out", "--size", "lots"], "Budget.size"),
        (["compress", "none.py", "-o", "out", "--recipe", "none.yaml"], "Cannot read the recipe"),
        (["compress", "none.py", "-o", "out", "--metric", "json:nope"], "json:nope"),
        (["inspect", "model.onnx"], "exported file"),
        (["measure", "none.onnx", "--data", "data.npz"], "no file"),
        (["measure", "none.onnx", "--data", "none.npz"], "no data file"),
        (["measure", "a.onnx", "a.onnx", "--data", "data.npz"], "twice"),
        (["report", "none.json"], "Cannot read the report"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(tmp_path, monkeypatch, arguments, said) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", x=np.zeros((4, 2), np.float32), y=np.zeros(4, int))
    found = run(*arguments)
    assert found.exit_code == 2, found.output
    assert found.stderr.startswith("Error: ") and said in found.stderr
    assert "Traceback" not in found.output
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path) -> None:
    found = run("report", tmp_path / "none.json", "--debug")
    assert type(found.exception).__name__ == "RuntimeFileError"


def test_a_jobs_own_error_is_shown_as_its_own(tmp_path) -> None:
    job = tmp_path / "job.py"
    job.write_text("def model(): return 1\ndef train():\n    return {}['missing']\ndef val(): return 1\n", encoding="utf-8")
    found = run("compress", job, "-o", tmp_path / "out")
    assert found.exit_code == 2
    assert f"Error in {job}, line 3, in train(): KeyError: 'missing'" in found.stderr
    assert "Traceback" not in found.output


def test_data_goes_with_a_keras_file_and_not_with_a_job(tmp_path) -> None:
    job = tmp_path / "job.py"
    job.write_text("", encoding="utf-8")
    found = run("compress", job, "-o", tmp_path / "out", "--val", "val.npz")
    assert found.exit_code == 2 and "--val goes with model.keras" in found.stderr


def test_without_a_recipe_what_those_that_are_tried_will_give_is_said_first(capsys) -> None:
    x, y = np.zeros((8, 4), np.float32), np.arange(8) % 2
    _told_before(None, (x, y), "onnxruntime")
    first, second, third = capsys.readouterr().err.strip().splitlines()
    assert first.startswith("No recipe given: 3 are tried")
    assert second == f"Prune: {whet.expectation(Prune(0.8), 'onnxruntime')}" and "keeps its bytes and its time" in second
    assert third.startswith("Prune: 50% of the weights become zeros") and "gzip" in third
    _told_before([Quantize()], (x, y), None)
    _told_before(None, [x], None)  # without targets nothing is pruned
    assert capsys.readouterr().err == ""
