"""Models that one ONNX file cannot hold, by a limit of a few kilobytes in place of 2 GB."""

from functools import cache

import numpy as np
import pytest

import whet
from bench import bench
from whet.errors import OutputError
from whet.formats import onnx_external
from whet.runtimes.sessions import open_session, parts
from whet.specs import TARGETS

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

LIMIT = 2500  # bytes


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(onnx_external, "LARGEST", LIMIT)
    monkeypatch.setattr(onnx_external, "KEPT", 64)


@cache
def quantized(framework, target):
    b = bench(framework)
    return whet.quantize(b.build(), whet.Quantize(), calibration=b.data(48)[0], target=target, progress=False)


@pytest.fixture
def made(b):
    return quantized(b.name, "onnxruntime")


def outputs(path, x):
    return open_session(path, threads=1).run(x)


def test_weights_lie_beside_the_file_and_both_run(b, made, tmp_path, small_limit, monkeypatch):
    x, y = b.data(24, 1)
    large = made.export(tmp_path / "large.onnx")
    monkeypatch.setattr(onnx_external, "LARGEST", 2**31)
    small = made.export(tmp_path / "small.onnx")
    beside = tmp_path / "large.onnx.data"
    assert parts(large) == [large, beside] and parts(small) == [small]
    names = {item.name for item in onnx.load(str(large), load_external_data=False).graph.initializer if item.external_data}
    assert names and large.stat().st_size < small.stat().st_size
    np.testing.assert_array_equal(outputs(large, x), outputs(small, x))
    measured = {path: whet.measure(path, (x, y), progress=False) for path in (large, small)}
    assert measured[large].bytes == large.stat().st_size + beside.stat().st_size > measured[small].bytes
    assert measured[large].metric == measured[small].metric


def test_both_files_move_together(b, made, tmp_path, small_limit):
    made.export(tmp_path / "model.onnx")
    moved = (tmp_path / "away").resolve()
    moved.mkdir()
    for part in parts(tmp_path / "model.onnx"):
        part.rename(moved / part.name)
    assert np.isfinite(outputs(moved / "model.onnx", b.data(4)[0])).all()


def test_a_smaller_model_in_its_place_leaves_no_weights_behind(b, made, tmp_path, small_limit, monkeypatch):
    path = made.export(tmp_path / "model.onnx")
    with pytest.raises(OutputError, match="exists"):
        made.export(path)
    before = [part.read_bytes() for part in parts(path)]
    assert [part.read_bytes() for part in parts(made.export(path, overwrite=True))] == before
    monkeypatch.setattr(onnx_external, "LARGEST", 2**31)
    made.export(path, overwrite=True)
    assert list(tmp_path.iterdir()) == [path]


def test_weights_of_another_file_are_not_overwritten(made, tmp_path, small_limit):
    (tmp_path / "model.onnx.data").write_text("mine")
    with pytest.raises(OutputError, match=r"model\.onnx\.data"):
        made.export(tmp_path / "model.onnx")
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx.data"]
    assert (tmp_path / "model.onnx.data").read_text() == "mine"


def test_a_disk_that_fills_up_leaves_neither_file(made, tmp_path, small_limit, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save_model", full)
    with pytest.raises(OutputError, match="No space left"):
        made.export(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_its_weights_is_an_error(b, made, tmp_path, small_limit):
    path = made.export(tmp_path / "model.onnx")
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(whet.WhetError, match=r"model\.onnx"):
        outputs(path, b.data(4)[0])


def test_openvino_is_made_of_both_files(b, tmp_path, small_limit):
    pytest.importorskip("openvino")
    made = quantized(b.name, "openvino")
    x, _ = b.data(24, 1)
    path = made.export(tmp_path / "model.xml")
    assert [item.name for item in parts(path)] == ["model.xml", "model.bin"]
    got = outputs(path, x)
    onnx_external.LARGEST = 2**31  # undone with the fixture
    np.testing.assert_array_equal(got, outputs(made.export(tmp_path / "other.xml"), x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_stay_16_bits_beside_the_file(dtype, tmp_path, small_limit):
    torch = pytest.importorskip("torch")
    pytest.importorskip("openvino")
    from whet.torch import export

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)).to(getattr(torch, dtype))
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    for target, suffix in (("onnxruntime", ".onnx"), ("openvino", ".xml")):
        path = tmp_path / f"model{suffix}"
        export(model, None, TARGETS[target], path, example=x)
        stored = sum(part.stat().st_size for part in parts(path))
        assert stored < 2 * sum(p.numel() for p in model.parameters()) + 12_000
        expected = model(torch.from_numpy(x).to(getattr(torch, dtype))).float().detach().numpy()
        np.testing.assert_allclose(outputs(path, x), expected, atol=0.05)


def test_the_size_of_a_model_is_known_without_writing_it(b, made, tmp_path):
    path = made.export(tmp_path / "model.onnx")
    guessed = onnx_external.size_of(onnx.load(str(path)))
    assert path.stat().st_size <= guessed <= path.stat().st_size + 20_000
