"""Evidence beyond one latency: several batch sizes and thread counts, operators, packed bytes, memory, warnings."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

import runtime_files
from whet.data import Batches
from whet.errors import RuntimeFileError, SpecError
from whet.numerics.metrics import ACCURACY
from whet.runtimes import content, evidence, onnx_content, probe, sessions
from whet.runtimes.content import Operation, read_content
from whet.runtimes.evidence import gather, gzip_size, zstd_size
from whet.runtimes.sessions import open_session, parts

RNG = np.random.default_rng(7)
DATA = (RNG.random((40, 1, 8, 8), np.float32), np.arange(40) % 10)


def test_every_pair_of_batch_and_threads_is_timed_with_its_ratio(onnx_float, onnx_int8):
    files = {"original": onnx_float[0], "model": onnx_int8}
    measured = gather(files, DATA, ACCURACY, batches=(1, 4), threads=(1, 2), runs=8, progress=False)
    original, model = measured["original"].evidence, measured["model"].evidence
    wanted = [(1, 1), (4, 1), (1, 2), (4, 2)]
    for found in (original, model):
        assert [(latency.batch, latency.threads) for latency in found.latencies] == wanted
        assert found.latency_ms == found.latencies[0]
        assert all(latency.p50 <= latency.p90 <= latency.p99 and latency.runs == 8 for latency in found.latencies)
    assert all(latency.ratio is None for latency in original.latencies)
    for ours, theirs in zip(model.latencies, original.latencies, strict=True):
        low, high = ours.ratio["ci95"]
        assert ours.ratio["value"] == pytest.approx(ours.p50 / theirs.p50) and low <= ours.ratio["value"] <= high
    plain = json.loads(json.dumps(model.to_dict(), allow_nan=False))
    assert [entry["threads"] for entry in plain["latencies"]] == [1, 1, 2, 2] and "p99" in plain["latency_ms"]


def test_a_fixed_batch_leaves_one_condition(tmp_path):
    path, _ = runtime_files.onnx_file(tmp_path, batch=8)
    found = gather({"a": path}, DATA, ACCURACY, batches=(1, 4), runs=5, progress=False)["a"].evidence
    assert [latency.batch for latency in found.latencies] == [8]


@pytest.mark.parametrize(
    "wrong", [{"batches": 0}, {"batches": ()}, {"threads": (1, 0)}, {"batches": (1.5,)}, {"threads": True}]
)
def test_conditions_are_positive_integers(onnx_float, wrong):
    with pytest.raises(SpecError, match="at least 1"):
        gather({"a": onnx_float[0]}, DATA, ACCURACY, progress=False, **wrong)


def test_operators_are_counted_by_how_they_compute(onnx_float, onnx_int8, litert):
    assert read_content(onnx_float[0]).operators["quantized"] == 0
    found = read_content(onnx_int8).operators
    computed = read_content(onnx_int8).dtypes["computed"]
    assert found["quantized"] >= 2 and found["quantized"] + found["float"] + found["other"] == sum(
        count for counts in computed.values() for count in counts.values()
    )
    lite = read_content(litert[1]["int8"]).operators
    assert lite["quantized"] == 6 and lite["delegated"] is None and "delegate" in lite["reason"]


def test_what_stayed_float_is_named(onnx_float, tmp_path):
    import shutil

    path = tmp_path / "float.onnx"
    shutil.copy(onnx_float[0], path)
    part = runtime_files.quantized_onnx(path, keep=("gemm",))
    told = [text for text in read_content(part).warnings if text.startswith("still float")]
    assert len(told) == 1 and "1 of 2 operators" in told[0]
    assert not any(text.startswith("still float") for text in read_content(path).warnings)  # a float file is meant to be


def test_a_delegates_operators_are_counted_where_they_are_known():
    operations = [Operation("conv", "a", "int8", delegated=True), Operation("add", "b", "float32", delegated=False)]
    assert content._summary(operations) == {"quantized": 1, "float": 1, "other": 0, "delegated": 1}


def test_odd_channel_counts_are_told(onnx_float, onnx_int8, litert):
    for path in (onnx_float[0], onnx_int8):
        told = [text for text in read_content(path).warnings if text.startswith("odd channel counts")]
        assert len(told) == 1 and "has 4" in told[0]
    for path in litert[1].values():  # its convolution has 8
        assert not any("channel" in text for text in read_content(path).warnings)
    operations = [operation for operation in onnx_content.weighted(onnx_int8) if operation.channels is not None]
    assert [operation.channels for operation in operations] == [4]


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (["avx2", "avx512f", "avx512_vnni"], "built for processors with VNNI"),
        (["avx2", "avx_vnni"], "built for processors with VNNI"),
        (["avx2"], "this processor has no VNNI"),
        (["neon", "dotprod"], None),
        (None, None),
    ],
)
def test_full_range_codes_are_told_on_x86(monkeypatch, onnx_float, onnx_int8, features, said):
    monkeypatch.setattr(onnx_content, "cpu_features", lambda: features)
    told = [text for text in read_content(onnx_int8).warnings if "VNNI" in text]
    assert len(told) == (said is not None) and all(said in text and "onnxruntime-portable" in text for text in told)
    assert not any("VNNI" in text for text in read_content(onnx_float[0]).warnings)


def test_codes_within_63_need_no_warning(monkeypatch, onnx_int8, tmp_path):
    monkeypatch.setattr(onnx_content, "cpu_features", lambda: ["avx2"])
    model = onnx.load(str(onnx_int8))
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1:
            halved = onnx.numpy_helper.to_array(tensor) // 2
            tensor.CopyFrom(onnx.numpy_helper.from_array(halved, tensor.name))
    onnx.save(model, str(tmp_path / "half.onnx"))
    assert not any("VNNI" in text for text in read_content(tmp_path / "half.onnx").warnings)


def test_companions_count_as_bytes(tmp_path, onnx_float):
    folder = tmp_path / "external"
    folder.mkdir()
    model = onnx.load(str(onnx_float[0]))
    path = folder / "model.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="model.onnx.data", size_threshold=64)
    beside = folder / "model.onnx.data"
    assert parts(path) == [path, beside] and parts(onnx_float[0]) == [onnx_float[0]]
    found = gather({"a": path}, DATA, ACCURACY, runs=0, progress=False)["a"].evidence
    assert found.bytes == path.stat().st_size + beside.stat().st_size > onnx_float[0].stat().st_size
    assert gzip_size(path) > 5000


def test_zstandard_says_why_it_is_missing(monkeypatch, onnx_float):
    monkeypatch.setattr(evidence, "find_spec", lambda name: None)
    found = zstd_size(onnx_float[0])
    assert found["value"] is None and "whet[zstd]" in found["reason"]


def test_zstandard_packs_in_chunks(monkeypatch, onnx_float):
    class Packer:
        def __init__(self):
            self.seen = b""

        def compress(self, chunk):
            self.seen += chunk
            return b""

        def flush(self):
            return self.seen[: len(self.seen) // 2]

    fake = SimpleNamespace(ZstdCompressor=lambda level: SimpleNamespace(compressobj=Packer))
    monkeypatch.setattr(evidence, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "zstandard", fake)
    assert zstd_size(onnx_float[0]) == {"value": onnx_float[0].stat().st_size // 2}


def test_zstandard_itself(onnx_float):
    zstandard = pytest.importorskip("zstandard")
    size = zstd_size(onnx_float[0])["value"]
    assert abs(size - len(zstandard.ZstdCompressor(level=19).compress(onnx_float[0].read_bytes()))) < 64


def test_a_fresh_process_tells_its_memory_and_its_start(onnx_float):
    found = gather({"a": onnx_float[0]}, DATA, ACCURACY, runs=0, processes=True, progress=False)["a"].evidence.process
    assert 0 < found["rss_before_bytes"] < found["rss_imported_bytes"] <= found["rss_loaded_bytes"] <= found["peak_rss_bytes"]
    assert found["rss_before_bytes"] < 40e6 and found["peak_rss_bytes"] < 300e6  # no framework was imported
    assert found["import_s"] > found["load_s"] > 0 and found["first_run_s"] > 0
    assert gather({"a": onnx_float[0]}, DATA, ACCURACY, runs=0, progress=False)["a"].evidence.process is None


def test_a_probe_that_fails_gives_its_reason(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    assert "truncated" in probe.probe(tmp_path / "broken.onnx")["reason"]
    ran = subprocess.run(
        [sys.executable, "-m", "whet.runtimes.probe", str(tmp_path / "none.onnx")], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 2 and "no file" in ran.stderr and "Traceback" not in ran.stderr


def test_a_probe_that_hangs_is_ended(monkeypatch, onnx_float):
    monkeypatch.setattr(probe, "TIMEOUT_S", 0.05)
    assert "longer than 0.05 s" in probe.probe(onnx_float[0])["reason"]


def test_a_keras_file_runs_beside_its_export(litert, tmp_path):
    keras = pytest.importorskip("keras")
    model, files = litert
    path = tmp_path / "model.keras"
    model.save(path)
    x = DATA[0].transpose(0, 2, 3, 1)
    measured = gather({"keras": path, "litert": files["float"]}, (x, DATA[1]), ACCURACY, runs=5, progress=False)
    found = measured["keras"].evidence
    np.testing.assert_allclose(measured["keras"].outputs, model.predict(x, verbose=0), atol=1e-6)
    assert measured["litert"].evidence.parity["agreement"] == 1.0 and measured["litert"].evidence.parity["max_error"] < 1e-5
    assert found.runtime == {"name": "keras", "version": keras.__version__, "kernels": keras.backend.backend()}
    assert found.dtypes["computed"]["Conv2D"] == {"float32": 1}
    assert found.dtypes["stored"] == {"float32": sum(4 * int(np.prod(w.shape)) for w in model.weights)}


def test_a_keras_file_of_several_inputs_and_outputs(tmp_path):
    keras = pytest.importorskip("keras")
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    joined = keras.layers.Concatenate()([a, b])
    model = keras.Model({"b": b, "a": a}, {"y": keras.layers.Dense(4)(joined), "z": keras.layers.Dense(1)(joined)})
    model.save(tmp_path / "model.keras")
    session = open_session(tmp_path / "model.keras", threads=1)
    inputs = {"a": RNG.random((5, 3), np.float32), "b": RNG.random((5, 2), np.float32)}
    wanted = model(inputs)
    got = session.run(inputs)
    np.testing.assert_allclose(got[0], wanted["y"], atol=1e-6)
    np.testing.assert_allclose(got[1], wanted["z"], atol=1e-6)


def test_a_foreign_keras_file_is_one_sentence(tmp_path):
    pytest.importorskip("keras")
    (tmp_path / "model.keras").write_bytes(b"no zip at all")
    with pytest.raises(RuntimeFileError, match=r"Keras cannot load 'model.keras': it is truncated, damaged or foreign"):
        open_session(tmp_path / "model.keras")


def test_another_layout_is_told(onnx_float, litert):
    nhwc = DATA[0].transpose(0, 2, 3, 1)
    with pytest.raises(RuntimeFileError, match=r"channels first: transpose the data to \(0, 3, 1, 2\)"):
        open_session(onnx_float[0]).run(nhwc)
    with pytest.raises(RuntimeFileError, match=r"channels last: transpose the data to \(0, 2, 3, 1\)"):
        open_session(litert[1]["float"]).run(DATA[0])
    with pytest.raises(RuntimeFileError) as wrong:
        open_session(onnx_float[0]).run(np.zeros((2, 5, 5, 5), np.float32))
    assert "transpose" not in str(wrong.value)


def test_every_runtime_names_code_that_is_there():
    assert set(sessions.SUFFIXES.values()) <= set(sessions.RUNTIMES)
    from importlib.util import find_spec

    for runtime in sessions.RUNTIMES.values():
        assert find_spec(runtime.session.partition(":")[0]) is not None
        assert runtime.content is None or find_spec(runtime.content) is not None


def test_a_missing_runtime_names_its_extra(monkeypatch, onnx_float):
    import whet.errors

    real = whet.errors.importlib.import_module

    def without(name, *rest):
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name, *rest)

    monkeypatch.setattr(whet.errors.importlib, "import_module", without)
    with pytest.raises(whet.errors.MissingExtraError, match=r"pip install 'whet\[onnx\]'"):
        open_session(onnx_float[0])


def test_nan_in_the_data_is_named(onnx_float):
    x = DATA[0].copy()
    x[17, 0, 3, 3] = np.nan
    from whet.errors import DataError

    with pytest.raises(DataError, match=r"inputs of val.npz, batch 0 holds nan at index \(17, 0, 3, 3\)"):
        gather({"a": onnx_float[0]}, Batches((x, DATA[1]), "val.npz"), ACCURACY, progress=False)
