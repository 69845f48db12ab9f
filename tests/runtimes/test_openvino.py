"""OpenVINO files made from ONNX files, and what can be wrong with them."""

import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import runtime_files
from whet.errors import ExportError, RuntimeFileError
from whet.runtimes.sessions import open_session

ov = pytest.importorskip("openvino")

from whet.formats.openvino import from_onnx  # noqa: E402
from whet.runtimes.content import check_integer, read_dtypes  # noqa: E402
from whet.runtimes.openvino import OpenVINOSession  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory, onnx_float, onnx_int8):
    folder = tmp_path_factory.mktemp("openvino")
    from_onnx(onnx_float[0], folder / "float.xml")
    from_onnx(onnx_float[0], folder / "half.xml", half=True)
    from_onnx(onnx_int8, folder / "int8.xml")
    return folder


def images(n, seed=0):
    return np.random.default_rng(seed).random((n, 1, 8, 8), np.float32)


def test_the_file_computes_what_the_onnx_file_does(files, onnx_float):
    session, reference = open_session(files / "float.xml", threads=1), open_session(onnx_float[0], threads=1)
    assert (session.name, session.threads, session.file) == ("openvino", 1, "float.xml")
    assert session.inputs == reference.inputs and session.outputs[0].name == reference.outputs[0].name
    for n in (1, 5, 2):
        np.testing.assert_allclose(session.run(images(n)), reference.run(images(n)), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(session.run({"x": images(3)}), session.run(images(3)))


def test_several_outputs_come_in_order(tmp_path):
    path, _ = runtime_files.onnx_file(tmp_path, outputs=2)
    from_onnx(path, tmp_path / "two.xml")
    session, reference = open_session(tmp_path / "two.xml", threads=1), open_session(path, threads=1)
    assert [slot.name for slot in session.outputs] == [slot.name for slot in reference.outputs] == ["y", "f"]
    for got, expected in zip(session.run(images(3)), reference.run(images(3)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_outputs_are_copies(files):
    session = open_session(files / "float.xml", threads=1)
    first = session.run(images(2, seed=1))
    kept = first.copy()
    session.run(images(2, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_integer_files_store_and_compute_integers(files, onnx_int8):
    dtypes = read_dtypes(files / "int8.xml")
    assert dtypes["stored"]["int8"] == 4 * 9 + 10 * 144 and "int32" not in dtypes["stored"]
    assert check_integer(files / "int8.xml") == {"integer": 2, "float": 0}
    got, expected = (open_session(path, threads=1).run(images(50)) for path in (files / "int8.xml", onnx_int8))
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_float_files_are_not_integer(files):
    assert read_dtypes(files / "float.xml")["stored"].keys() <= {"float32", "int64"}
    with pytest.raises(ExportError, match="run in float on this machine"):
        check_integer(files / "float.xml")


def test_half_stores_two_bytes_for_each_weight(files):
    stored = read_dtypes(files / "half.xml")["stored"]
    assert stored["float16"] >= 2 * (4 * 9 + 10 * 144)
    got, expected = (open_session(files / f"{name}.xml", threads=1).run(images(9)) for name in ("half", "float"))
    np.testing.assert_allclose(got, expected, atol=5e-3)


def test_the_record_says_which_type_computes(files):
    fixed = open_session(files / "float.xml", threads=1)
    assert fixed.runtime["precision"] == "float32"
    chosen = OpenVINOSession(files / "float.xml", 1, precision=None)
    capable = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert chosen.runtime["precision"] == ("bfloat16" if capable else "float32") + " (automatic)"


def test_a_file_without_its_weights(files, tmp_path):
    shutil.copy(files / "float.xml", tmp_path / "m.xml")
    with pytest.raises(RuntimeFileError, match=r"'m\.bin', which is not beside it"):
        open_session(tmp_path / "m.xml")


@pytest.mark.parametrize("cut", ["m.xml", "m.bin"])
def test_truncated_files(files, tmp_path, cut):
    for suffix in (".xml", ".bin"):
        shutil.copy(files / f"float{suffix}", tmp_path / f"m{suffix}")
    content = (tmp_path / cut).read_bytes()
    (tmp_path / cut).write_bytes(content[: len(content) // 2])
    with pytest.raises(RuntimeFileError, match="truncated"):
        open_session(tmp_path / "m.xml")


def test_foreign_files(tmp_path):
    (tmp_path / "m.xml").write_text("<svg/>")
    (tmp_path / "m.bin").write_bytes(b"")
    with pytest.raises(RuntimeFileError, match=r"m\.xml"):
        open_session(tmp_path / "m.xml")


def test_wrong_inputs(files):
    session = open_session(files / "float.xml", threads=1)
    with pytest.raises(RuntimeFileError, match=r"'x' \(any, 1, 8, 8\) float32.*pixels"):
        session.run({"pixels": images(1)})
    with pytest.raises(RuntimeFileError, match=r"\(1, 1, 7, 8\)"):
        session.run(images(1)[:, :, :7])


def test_an_operator_that_openvino_lacks(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Nonsense", ["x"], ["y"], domain="nowhere")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.zeros(3, np.float32), "w")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("nowhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(tmp_path / "m.onnx"))
    with pytest.raises(ExportError, match="Nonsense"):
        from_onnx(tmp_path / "m.onnx", tmp_path / "m.xml")
    assert [item.name for item in tmp_path.iterdir()] == ["m.onnx"]
