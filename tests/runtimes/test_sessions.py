"""Files run by their runtimes: the right numbers, and one clear error for each thing that can be wrong."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import runtime_files
from whet.errors import MissingExtraError, RuntimeFileError
from whet.runtimes.sessions import open_session


def by_hand(x, w):
    """The ONNX file's computation in float64."""
    n = len(x)
    windows = np.lib.stride_tricks.sliding_window_view(x[:, 0].astype(np.float64), (3, 3), axis=(1, 2))
    conv = np.einsum("nhwij,oij->nohw", windows, w["w1"][:, 0]) + w["b1"][:, None, None]
    return np.maximum(conv, 0).reshape(n, -1) @ w["w2"].T + w["b2"]


def images(n, seed=0):
    return np.random.default_rng(seed).random((n, 1, 8, 8), np.float32)


def test_onnxruntime_computes_what_the_file_says(onnx_float):
    path, weights = onnx_float
    session = open_session(path, threads=1)
    assert (session.name, session.threads, session.file) == ("onnxruntime", 1, "float.onnx")
    assert session.inputs[0].shape == (None, 1, 8, 8) and session.inputs[0].dtype == "float32"
    for n in (1, 5):
        np.testing.assert_allclose(session.run(images(n)), by_hand(images(n), weights), rtol=1e-5, atol=1e-5)


def test_litert_computes_what_keras_does(litert):
    model, files = litert
    session = open_session(files["float"], threads=1)
    assert session.runtime["kernels"].startswith("XNNPACK")
    for n in (1, 5, 2):
        x = images(n).transpose(0, 2, 3, 1)
        np.testing.assert_allclose(session.run(x), model.predict(x, verbose=0), rtol=1e-4, atol=1e-5)


def test_litert_scales_integer_inputs_and_outputs(litert):
    model, files = litert
    x = images(4).transpose(0, 2, 3, 1)
    session = open_session(files["int8_io"], threads=1)
    assert session.inputs[0].dtype == "int8" and session.inputs[0].quantization is not None
    y = session.run(x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, open_session(files["int8"], threads=1).run(x), atol=1e-6)
    assert np.abs(y - model.predict(x, verbose=0)).max() < 0.05


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}, lambda x: x.astype(np.float64), np.asfortranarray]
)
def test_inputs_come_as_array_tuple_or_dict(onnx_float, wrap):
    session = open_session(onnx_float[0], threads=1)
    np.testing.assert_array_equal(session.run(wrap(images(3))), session.run(images(3)))


def test_integers_become_floats_where_nothing_is_lost(onnx_float):
    session = open_session(onnx_float[0], threads=1)
    whole = np.arange(64, dtype=np.uint8).reshape(1, 1, 8, 8)
    np.testing.assert_array_equal(session.run(whole), session.run(whole.astype(np.float32)))
    with pytest.raises(RuntimeFileError, match="without loss"):
        session.run(whole.astype(np.int64) + (2**24 + 1))


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"pixels": images(1)}, r"'x' \(any, 1, 8, 8\) float32.*\['pixels'\]"),
        ((images(1), images(1)), "takes 1 inputs.*got 2"),
        (images(1)[:, :, :7], r"\(1, 1, 7, 8\)"),
        (images(1)[0], r"\(any, 1, 8, 8\).*\(1, 8, 8\)"),
    ],
)
def test_wrong_inputs_say_what_was_expected_and_got(onnx_float, inputs, says):
    with pytest.raises(RuntimeFileError, match=says):
        open_session(onnx_float[0], threads=1).run(inputs)


def token_file(path):
    nodes = [helper.make_node("Add", ["ids", "more"], ["sum"]), helper.make_node("Cast", ["sum"], ["y"], to=1)]
    values = [helper.make_tensor_value_info(name, TensorProto.INT32, ["n", 3]) for name in ("ids", "more")]
    outputs = [
        helper.make_tensor_value_info("sum", TensorProto.INT32, ["n", 3]),
        helper.make_tensor_value_info("y", 1, ["n", 3]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values, outputs), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.save(model, str(path))
    return path


def test_several_inputs_and_outputs_and_integer_widths(tmp_path):
    session = open_session(token_file(tmp_path / "t.onnx"), threads=1)
    ids, more = np.array([[1, 2, 3]], np.int64), np.array([[10, 20, 30]], np.uint8)
    for inputs in ((ids, more), {"more": more, "ids": ids}):
        total, y = session.run(inputs)
        assert total.tolist() == [[11, 22, 33]] and y.dtype == np.float32
    with pytest.raises(RuntimeFileError, match="float32"):
        session.run((ids.astype(np.float32), more))
    with pytest.raises(RuntimeFileError, match="without loss"):
        session.run((ids + 2**40, more))
    with pytest.raises(RuntimeFileError, match="as many examples"):
        session.run((ids, np.vstack([more, more])))


def test_a_file_of_fixed_batch_size_takes_any_number_of_examples(tmp_path, onnx_float):
    path, _ = runtime_files.onnx_file(tmp_path, batch=4, outputs=2)
    session = open_session(path, threads=1)
    assert session.fixed_batch == 4
    free = open_session(onnx_float[0], threads=1)
    for n in (1, 4, 10):
        y, features = session.run(images(n))
        assert features.shape == (n, 144)
        np.testing.assert_allclose(y, free.run(images(n)), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeFileError, match="batches of 4 only, got 3"):
        session.prepare(images(3))


@pytest.mark.parametrize("suffix", [".onnx", ".tflite"])
@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"not a model at all, only text", b"\x1c\x00\x00\x00TFL3", bytes(range(256)) * 8]
)
def test_damaged_files_are_one_clear_error(tmp_path, suffix, content):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(RuntimeFileError, match=f"bad{suffix}"):
        open_session(path, threads=1)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_files_are_one_clear_error(tmp_path, onnx_float, litert, share):
    for whole in (onnx_float[0], litert[1]["int8"]):
        content = whole.read_bytes()
        path = tmp_path / whole.name
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(RuntimeFileError, match="truncated"):
            open_session(path, threads=1)


def test_paths_that_name_no_file(tmp_path):
    with pytest.raises(RuntimeFileError, match="no file"):
        open_session(tmp_path / "missing.onnx")
    with pytest.raises(RuntimeFileError, match="folder"):
        open_session(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(RuntimeFileError, match=r"one of: .*\.onnx.*\.tflite"):
        open_session(tmp_path / "model.pt")


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_threads_must_be_a_positive_integer(onnx_float, threads):
    with pytest.raises(RuntimeFileError, match="threads"):
        open_session(onnx_float[0], threads=threads)


def test_threads_are_given_to_the_runtime(onnx_float, litert):
    for path in (onnx_float[0], litert[1]["float"]):
        assert open_session(path, threads=2).threads == 2
        assert open_session(path).threads >= 1


@pytest.mark.parametrize(
    ("module", "suffix", "extra"), [("onnxruntime", ".onnx", "onnx"), ("ai_edge_litert.interpreter", ".tflite", "litert")]
)
def test_a_missing_runtime_names_its_extra(tmp_path, monkeypatch, module, suffix, extra):
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"\x1c\x00\x00\x00TFL3" + bytes(64))
    with pytest.raises(MissingExtraError, match=rf"whet\[{extra}\]"):
        open_session(path)


def test_the_runtimes_write_nothing_to_the_terminal(onnx_int8, litert):
    """In a process of its own: LiteRT announces its kernels once per process, from native code."""
    code = """
import sys
import numpy as np
from whet.errors import RuntimeFileError
from whet.runtimes.sessions import open_session
for path, shape in zip(sys.argv[1:], ((2, 1, 8, 8), (2, 8, 8, 1))):
    session = open_session(path, threads=1)
    session.run(np.ones(shape, np.float32))
    try:
        session.run(np.ones((2, 3, 3, 3), np.float32))
    except RuntimeFileError:
        print("refused")
"""
    command = [sys.executable, "-c", code, str(onnx_int8), str(litert[1]["int8"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused", "refused"] and done.stderr == ""
