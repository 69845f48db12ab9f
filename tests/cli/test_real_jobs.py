"""The command on real models: both frameworks, from the file that is given to the file that runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from job_fixtures import quick
from whet.cli import app

__all__ = ["quick"]  # every test below uses it

JOB = """
import numpy as np
import torch
import whet

torch.manual_seed(0)
DIRECTIONS = np.random.default_rng(0).normal(size=(8, 3))


def data(seed, n=200):
    x = np.random.default_rng(seed).normal(size=(n, 8)).astype(np.float32)
    return x, (x @ DIRECTIONS).argmax(1)


def model():
    made = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
    return whet.fit(made, whet.Train(epochs=5, learning_rate=1e-2), train=train(), progress=False).model


def train():
    return data(1, 600)


def val():
    return data(2)


def test():
    return data(3)


def metric(outputs, targets):
    return (outputs.argmax(-1) == targets).astype(float)


def recipe():
    return [whet.Quantize()]
"""


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_torch_job(tmp_path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    job, out = tmp_path / "job.py", tmp_path / "out"
    job.write_text(JOB, encoding="utf-8")

    shown = run("inspect", job)
    assert shown.exit_code == 0, shown.output
    assert "Linear" in shown.stdout and "4,931" in shown.stdout  # (8·64 + 64) + (64·64 + 64) + (64·3 + 3)

    made = run("compress", job, "-o", out, "--max-drop", "0.5")
    assert made.exit_code == 0, made.output
    numbers = {"history.csv", "summary.csv"}
    assert {path.name for path in out.iterdir()} == {"original.onnx", "model.onnx", "report.json", "report.html"} | numbers
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["compressed"]["bytes"] == (out / "model.onnx").stat().st_size < (out / "original.onnx").stat().st_size
    assert report["compressed"]["dtypes"]["stored"]["int8"] >= 8 * 64 + 64 * 64 + 64 * 3
    assert report["budget"]["reported_on"] == "test"
    assert "Budget met" in made.stdout and "int8" in made.stdout

    again = run("compress", job, "-o", out)
    assert again.exit_code == 2 and "--overwrite" in again.stderr

    measured = run("measure", out / "original.onnx", out / "model.onnx", "--data", job)
    assert measured.exit_code == 0, measured.output
    value = f"{report['compressed']['metric']['value']:.4g}"[:5]
    assert value in measured.stdout  # the same file on the same data: the same score
    assert "metric drop" in " ".join(measured.stdout.split())

    missed = run("compress", job, "-o", tmp_path / "tiny", "--size", "10 B", "--quiet")
    assert missed.exit_code == 3
    assert missed.stdout == "" and "Budget missed: " in missed.stderr and "size" in missed.stderr
    assert (tmp_path / "tiny" / "model.onnx").exists()


@pytest.fixture
def keras_files(tmp_path):
    keras = pytest.importorskip("keras")
    pytest.importorskip("ai_edge_litert")
    keras.utils.set_random_seed(0)
    directions = np.random.default_rng(0).normal(size=(8, 3))
    for seed, name in enumerate(("train", "val")):
        x = np.random.default_rng(seed).normal(size=(200, 8)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", x=x, y=(x @ directions).argmax(1))
    layers = [keras.Input((8,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(3)]
    keras.Sequential(layers).save(tmp_path / "model.keras")
    return tmp_path


def test_a_keras_file(keras_files) -> None:
    folder, out = keras_files, keras_files / "out"
    (folder / "recipe.yaml").write_text("format: 1\nrecipe:\n- Quantize: {}\n", encoding="utf-8")
    files = ["--train", folder / "train.npz", "--val", folder / "val.npz"]

    shown = run("inspect", folder / "model.keras")
    assert shown.exit_code == 0, shown.output
    assert "Dense" in shown.stdout and "771" in shown.stdout  # (8·64 + 64) + (64·3 + 3)

    made = run(
        "compress",
        folder / "model.keras",
        *files,
        "--recipe",
        folder / "recipe.yaml",
        "--target",
        "litert",
        "-o",
        out,
        "--max-drop",
        1,
    )
    assert made.exit_code == 0, made.output
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["compressed"]["dtypes"]["stored"]["int8"] >= 8 * 64 + 64 * 3
    assert report["recipe"]["recipe"] == [{"Quantize": {}}]

    measured = run("measure", out / "model.tflite", "--data", folder / "val.npz")
    assert measured.exit_code == 0, measured.output
    assert f"{100 * report['compressed']['metric']['value']:.1f} %" in measured.stdout

    wrong = run("compress", folder / "model.keras", *files, "--target", "executorch", "-o", folder / "other")
    assert wrong.exit_code == 2 and "litert" in wrong.stderr
    assert not (folder / "other").exists()


def test_code_in_a_keras_file_is_not_run(tmp_path) -> None:
    keras = pytest.importorskip("keras")
    keras.Sequential([keras.Input((8,)), keras.layers.Lambda(lambda x: x * 2)]).save(tmp_path / "model.keras")
    found = run("inspect", tmp_path / "model.keras")
    assert found.exit_code == 2
    assert "Lambda" in found.stderr and "job.py" in found.stderr and "safe_mode=False" not in found.stderr


def test_sensitivity_of_a_torch_job(tmp_path) -> None:
    pytest.importorskip("torch")
    job, out = tmp_path / "job.py", tmp_path / "layers.json"
    job.write_text(JOB, encoding="utf-8")
    found = run("sensitivity", job, "--bits", "8,3", "--weights-only", "--examples", "64", "-o", out, "-q")
    assert found.exit_code == 0, found.output
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 6 and {row["bits"] for row in rows} == {8, 3} and all(row["drop"]["ci95"] for row in rows)
    assert all(row["layer"] in found.stdout for row in rows) and "int3 per channel" in found.stdout
    again = run("sensitivity", job, "--examples", "32", "-o", out, "-q")  # the job's own recipe, and a file that is there
    assert again.exit_code == 2 and "overwrite" in again.output
    assert run("sensitivity", job, "--weights-only").exit_code == 2
