"""The sinks: what they write is read back by csv, TensorBoard and MLflow themselves."""

from __future__ import annotations

import csv
import sys

import pytest

from report_samples import sample_report
from whet.errors import MissingExtraError, OutputError, RuntimeFileError
from whet.records import Report
from whet.report.sinks import history_csv, summary_csv, to_mlflow, to_tensorboard, write_csv


def report(**changes) -> Report:
    return Report(sample_report(**changes))


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def test_csv_has_every_epoch_and_the_final_numbers(tmp_path) -> None:
    paths = write_csv(report(), tmp_path / "new")
    assert [path.name for path in paths] == ["history.csv", "summary.csv"]
    history, final = (rows_of(path.read_text()) for path in paths)
    plain = sample_report()["steps"][0]["train"]["history"]
    assert len(history) == len(plain) == 24
    assert [float(row["loss"]) for row in history] == [row["loss"] for row in plain]
    assert history[3]["step"] == "1" and history[3]["epoch"] == "3" and history[3]["eligible"] == ""
    by_name = {row["name"]: row for row in final}
    assert by_name["bytes"] == {
        "name": "bytes",
        "original": "89412",
        "compressed": "27104",
        "change": "0.3031",
        "low": "",
        "high": "",
    }
    assert by_name["accuracy (change: drop)"]["low"] == "-0.0083"
    assert by_name["latency_p50_ms"]["change"] == "1.286" and by_name["latency_p50_ms"]["high"] == "1.33"


def test_csv_replaces_only_when_told(tmp_path) -> None:
    (tmp_path / "summary.csv").write_text("mine")
    with pytest.raises(OutputError, match=r"summary\.csv"):
        write_csv(report(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.csv"]  # nothing was written before it was refused
    write_csv(report(), tmp_path, overwrite=True)
    assert "mine" not in (tmp_path / "summary.csv").read_text()


def test_without_training_and_latency_there_are_headers_and_empty_cells() -> None:
    data = sample_report()
    data["steps"] = data["steps"][1:]
    data["original"]["latency_ms"] = data["compressed"]["latency_ms"] = data["change"]["latency_ratio"] = None
    assert history_csv(Report(data)) == "step,epoch,loss,metric,sparsity,learning_rate,eligible\n"
    assert "latency_p50_ms,,,,,\n" in summary_csv(Report(data))


def test_a_name_is_never_a_formula_and_commas_stay_in_their_cell() -> None:
    data = sample_report()
    data["original"]["metric"]["name"] = '=HYPERLINK("x","y")'
    first = rows_of(summary_csv(Report(data)))[0]
    assert first["name"].startswith('\'=HYPERLINK("x","y")') and float(first["original"]) == 0.975


def test_a_report_with_half_of_its_measurements_is_refused(tmp_path) -> None:
    with pytest.raises(RuntimeFileError, match=r"original\.file"):
        write_csv(Report({"format": 1, "seed": 0, "steps": [], "compressed": {}}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def steps_alone() -> Report:
    """The report of `whet.fit`: nothing was exported or measured."""
    return Report({key: sample_report()[key] for key in ("format", "seed", "steps")})


def test_the_steps_of_a_single_verb_are_logged_too(tmp_path) -> None:
    history, final = write_csv(steps_alone(), tmp_path)
    assert len(history.read_text().splitlines()) == 25 and final.read_text().splitlines() == [
        "name,original,compressed,change,low,high"
    ]
    pytest.importorskip("tensorboard")
    to_tensorboard(steps_alone(), tmp_path / "runs")
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_mlflow_takes_the_steps_of_a_single_verb(mlflow) -> None:
    run_id = to_mlflow(steps_alone(), "verbs")
    client = mlflow.MlflowClient()
    assert len(client.get_metric_history(run_id, "step 1/loss")) == 24
    assert [item.path for item in client.list_artifacts(run_id)] == ["report.json"]


def test_tensorboard_reads_the_curves_and_the_final_numbers(tmp_path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    to_tensorboard(report(), tmp_path / "runs")
    found = reading.EventAccumulator(str(tmp_path / "runs"), size_guidance={"tensors": 0})
    found.Reload()
    tags = found.Tags()["tensors"]
    assert {"step 1/loss", "step 1/metric", "step 1/sparsity", "compressed/bytes", "change/accuracy"} <= set(tags)
    events = found.Tensors("step 1/loss")
    assert [event.step for event in events] == list(range(24))
    assert events[0].tensor_proto.float_val[0] == pytest.approx(1.98, rel=1e-5)
    assert found.Tensors("compressed/bytes")[0].tensor_proto.float_val[0] == 27_104


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")
    monkeypatch.chdir(tmp_path)
    mlflow = pytest.importorskip("mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    yield mlflow
    mlflow.set_tracking_uri(before)


def test_mlflow_keeps_metrics_parameters_and_the_page(mlflow) -> None:
    run_id = to_mlflow(report(), "tests of (whet)")
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert client.get_experiment(run.info.experiment_id).name == "tests of (whet)"
    assert run.data.metrics["compressed/bytes"] == 27_104 and run.data.metrics["change/latency_p50_ms"] == 1.286
    assert run.data.params["target"] == "onnxruntime" and run.data.params["step 1"].startswith("Train(epochs=30")
    curve = client.get_metric_history(run_id, "step 1/sparsity")
    assert [point.step for point in sorted(curve, key=lambda point: point.step)] == list(range(24))
    assert {item.path for item in client.list_artifacts(run_id)} == {"report.json", "report.html"}


def test_mlflow_logs_into_the_run_that_is_open(mlflow) -> None:
    with mlflow.start_run() as run:
        assert to_mlflow(report()) == run.info.run_id
        assert mlflow.active_run() is not None


def test_mlflow_says_what_it_could_not_store(mlflow, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    mlflow.set_tracking_uri((tmp_path / "file").as_uri())
    with pytest.raises(OutputError, match="MLflow could not store the run at"):
        to_mlflow(report())


@pytest.mark.parametrize(
    ("sink", "module", "extra"), [(to_tensorboard, "tensorboard.summary", "tensorboard"), (to_mlflow, "mlflow", "mlflow")]
)
def test_a_sink_that_is_not_installed_names_its_extra(sink, module, extra, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"whet\[{extra}\]"):
        sink(report(), tmp_path / "x")
