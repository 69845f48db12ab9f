"""Evidence from real files: what report.json says of them can be recomputed here."""

import gzip
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import runtime_files
from whet.data import Batches
from whet.errors import DataError, MetricError, RuntimeFileError
from whet.numerics.metrics import ACCURACY
from whet.records import Evidence
from whet.runtimes.evidence import change, gather, gzip_size, pack, predict, score
from whet.runtimes.sessions import open_session
from whet.specs import Metric

RNG = np.random.default_rng(5)
IMAGES = RNG.random((150, 1, 8, 8), np.float32)


@pytest.fixture(scope="module")
def labelled(onnx_float):
    """Images with the float file's own answers, one in five changed."""
    targets = open_session(onnx_float[0], threads=1).run(IMAGES).argmax(1)
    targets[::5] = (targets[::5] + 1) % 10
    return IMAGES, targets


def test_evidence_of_a_pair_of_onnx_files(onnx_float, onnx_int8, labelled):
    measured = gather({"original": onnx_float[0], "model": onnx_int8}, labelled, ACCURACY, runs=30, progress=False)
    original, model = measured["original"].evidence, measured["model"].evidence
    assert original.metric["value"] == pytest.approx(0.8) and original.metric["n"] == 150
    outputs = open_session(onnx_int8, threads=1).run(IMAGES)
    np.testing.assert_array_equal(measured["model"].outputs, outputs)
    assert model.metric["value"] == (outputs.argmax(1) == labelled[1]).mean()
    assert original.bytes == onnx_float[0].stat().st_size and original.file == "float.onnx"
    assert original.gzip_bytes == len(gzip.compress(onnx_float[0].read_bytes(), 9, mtime=0))
    assert original.parity is None and original.placement is None
    assert 0.9 < model.parity["agreement"] <= 1 and model.parity["sqnr_db"] > 20
    assert (model.latency_ms.runs, model.latency_ms.batch, model.latency_ms.threads) == (30, 1, 1)
    assert model.runtime["name"] == "onnxruntime" and "int8" in model.dtypes["stored"]
    assert any(text.startswith("LARGER") for text in model.warnings) == (model.bytes > original.bytes)
    moved = change(measured["original"], measured["model"], ACCURACY)
    assert moved["metric_drop"]["value"] == pytest.approx(0.8 - model.metric["value"])
    text = json.dumps([original.to_dict(), model.to_dict(), moved], allow_nan=False)
    assert "/" not in original.file and str(onnx_float[0].parent) not in text


def test_evidence_of_a_pair_of_litert_files(litert):
    model, files = litert
    x = IMAGES.transpose(0, 2, 3, 1)
    targets = model.predict(x, verbose=0).argmax(1)
    measured = gather({"original": files["float"], "model": files["int8"]}, (x, targets), ACCURACY, runs=20, progress=False)
    assert measured["original"].evidence.metric["value"] == 1.0
    assert measured["model"].evidence.parity["agreement"] >= 0.95
    assert measured["model"].evidence.runtime["kernels"].startswith("XNNPACK")
    assert measured["model"].evidence.dtypes["computed"]["CONV_2D"] == {"int8": 1}


def test_no_timing_when_no_runs_are_wanted(onnx_float, labelled):
    measured = gather({"a": onnx_float[0], "b": onnx_float[0]}, labelled, ACCURACY, runs=0, progress=False)
    assert measured["a"].evidence.latency_ms is None and measured["b"].timings is None
    assert change(measured["a"], measured["b"], ACCURACY)["latency_ratio"]["value"] is None
    assert measured["b"].evidence.parity["max_error"] == 0


def test_batches_of_any_size_give_the_same_evidence(onnx_float, labelled):
    def values(data):
        evidence = gather({"a": onnx_float[0]}, data, ACCURACY, runs=0, progress=False)["a"].evidence
        return evidence.metric

    x, y = labelled
    assert values(labelled) == values([(x[:1], y[:1]), (x[1:100], y[1:100]), (x[100:], y[100:])])


def test_a_fixed_batch_file_is_timed_with_its_own_batch(tmp_path, labelled):
    path, _ = runtime_files.onnx_file(tmp_path, batch=8)
    evidence = gather({"a": path}, labelled, ACCURACY, runs=5, progress=False)["a"].evidence
    assert evidence.latency_ms.batch == 8 and evidence.metric["n"] == 150


def test_timed_batches_may_exceed_the_data(onnx_float, labelled):
    data = (labelled[0][:3], labelled[1][:3])
    evidence = gather({"a": onnx_float[0]}, data, ACCURACY, batches=16, runs=5, progress=False)["a"].evidence
    assert evidence.latency_ms.batch == 16


def test_outputs_take_the_models_own_structure(tmp_path):
    path, _ = runtime_files.onnx_file(tmp_path, outputs=2)
    session = open_session(path, threads=1)
    outputs = predict(session, Batches(IMAGES, "val"))
    assert isinstance(outputs, tuple)
    by_name = pack(outputs, session, {"f": np.zeros((1, 144)), "y": np.zeros((1, 10))})
    assert by_name["f"].shape == (150, 144) and by_name["y"].shape == (150, 10)
    by_place = pack(outputs, session, {"logits": np.zeros((1, 10)), "more": (np.zeros((1, 144)),)})
    assert by_place["logits"] is outputs[0] and by_place["more"][0] is outputs[1]
    with pytest.raises(RuntimeFileError, match="2 outputs, and the model 1"):
        pack(outputs, session, np.zeros((1, 10)))
    hit = Metric(lambda o, t: o["logits"].argmax(1) == t, name="hit")
    data = (IMAGES, outputs[0].argmax(1))
    like = {"logits": np.zeros((1, 10)), "more": np.zeros((1, 144))}
    assert gather({"a": path}, data, hit, runs=0, like=like, progress=False)["a"].evidence.metric["value"] == 1.0


def test_a_file_that_returns_nan_is_an_error(tmp_path):
    nodes = [helper.make_node("Log", ["x"], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.save(model, str(tmp_path / "log.onnx"))
    x = np.ones((5, 2), np.float32)
    x[3, 1] = -1
    with pytest.raises(RuntimeFileError, match=r"'log.onnx' returns NaN for example 3 of batch 0 of data"):
        gather({"a": tmp_path / "log.onnx"}, (x, np.zeros(5, np.int64)), ACCURACY, progress=False)


def test_bad_metrics_and_data_are_named(onnx_float, labelled):
    with pytest.raises(DataError, match="labelled"):
        gather({"a": onnx_float[0]}, IMAGES, ACCURACY, progress=False)
    with pytest.raises(MetricError, match=r"'broken'.*nan"):
        gather({"a": onnx_float[0]}, labelled, Metric(lambda o, t: np.full(len(t), np.nan), name="broken"), progress=False)


def test_sparsity_is_told_where_it_brings_no_speed(onnx_float, labelled):
    measured = gather(
        {"a": onnx_float[0], "b": onnx_float[0]}, labelled, ACCURACY, sparsity={"b": 0.8}, runs=50, progress=False
    )
    assert any("sparse but not faster: 80 %" in text for text in measured["b"].evidence.warnings)
    assert any("no smaller" in text for text in measured["b"].evidence.warnings)


def test_gzip_is_level_nine_without_a_date(tmp_path):
    path = tmp_path / "x.onnx"
    for content in (b"", b"a" * 3_000_000, RNG.bytes(2_500_001)):
        path.write_bytes(content)
        assert abs(gzip_size(path) - len(gzip.compress(content, 9, mtime=0))) <= 16
        assert gzip_size(path) == gzip_size(path)


def test_score_alone_serves_a_framework_model(labelled):
    made = score(np.eye(10)[labelled[1]], Batches(labelled, "val"), ACCURACY)
    assert made.record["value"] == 1.0 and isinstance(Evidence("", 0, 0, made.record, None, {}, None, {}).to_dict(), dict)
