"""What files store and compute in: read from the file, never from its name."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import runtime_files
from whet.errors import ExportError, RuntimeFileError
from whet.runtimes.content import Operation, check_integer, read_dtypes


def save(path, nodes, inputs, outputs, weights):
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(a, n) for n, a in weights.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def test_a_float_onnx_file(onnx_float):
    found = read_dtypes(onnx_float[0])
    assert found["stored"] == {"float32": 4 * (36 + 4 + 1440 + 10)}
    assert set(found["computed"]["Gemm"]) == {"float32"}
    convolutions = {op: counts for op, counts in found["computed"].items() if "Conv" in op}
    assert [list(counts) for counts in convolutions.values()] == [["float32"]]
    with pytest.raises(ExportError, match=r"2 of its 2 operators with weights run in float.*Gemm"):
        check_integer(onnx_float[0])


def test_an_int8_onnx_file_computes_in_integers(onnx_int8):
    found = read_dtypes(onnx_int8)
    assert found["stored"]["int8"] >= 36 + 1440
    assert found["stored"]["int32"] >= 4 * (4 + 10)
    assert found["stored"].get("float32", 0) < 400  # scales only
    assert found["computed"]["QLinearConv"] == {"uint8/int8": 1}
    assert found["computed"]["QGemm"] == {"uint8/int8": 1}
    assert found["computed"]["QuantizeLinear"] == {"float32": 1}
    assert check_integer(onnx_int8) == {"integer": 2, "float": 0}


@pytest.mark.parametrize(("kept", "named"), [("gemm", "Gemm"), ("conv", "Conv")])
def test_a_layer_that_fell_back_to_float_is_named(tmp_path, kept, named):
    path = runtime_files.quantized_onnx(runtime_files.onnx_file(tmp_path)[0], keep=(kept,))
    with pytest.raises(ExportError, match=rf"1 of its 2 operators with weights run in float.*{named}"):
        check_integer(path)
    assert check_integer(path, float_allowed=1) == {"integer": 1, "float": 1}


def test_float_weights_behind_quantizers_are_found(tmp_path):
    """A simulation exported as it is: every operator looks quantized, and the file stores float weights."""
    rng = np.random.default_rng(0)
    scale, zero = np.array(0.01, np.float32), np.array(0, np.int8)
    weights = {"w": rng.normal(size=(8, 8)).astype(np.float32), "s": scale, "z": zero, "u": np.array(128, np.uint8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "u"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "u"], ["xd"]),
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["wq"]),
        helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["m"], name="product"),
        helper.make_node("QuantizeLinear", ["m", "s", "u"], ["mq"]),
        helper.make_node("DequantizeLinear", ["mq", "s", "u"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in ("x", "y")]
    path = save(tmp_path / "simulated.onnx", nodes, values[:1], values[1:], weights)
    assert read_dtypes(path)["stored"]["float32"] >= 256
    with pytest.raises(ExportError, match=r"store integer weights.*MatMul 'product'.*float32"):
        check_integer(path)


def test_stored_integers_that_are_unpacked_for_float_arithmetic_do_not_pass(tmp_path):
    """Weight-only quantization: int8 stored, float computed."""
    weights = {"w": np.ones((8, 8), np.int8), "s": np.array(0.01, np.float32), "z": np.array(0, np.int8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"]),
        helper.make_node("Softmax", ["x"], ["p"]),
        helper.make_node("MatMul", ["p", "wd"], ["y"], name="product"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in ("x", "y")]
    path = save(tmp_path / "weights.onnx", nodes, values[:1], values[1:], weights)
    found = read_dtypes(path)
    assert found["stored"]["int8"] == 65
    assert found["computed"]["Softmax"] == {"float32": 1}
    with pytest.raises(ExportError, match=r"1 of its 1 operators with weights run in float"):
        check_integer(path)
    with pytest.raises(ExportError, match="none of its operators"):
        check_integer(path, float_allowed=1)


def test_float_biases_of_integer_operators_are_found(tmp_path):
    """ONNX Runtime quantizes such a bias itself while loading: it computes in integers, and the file stores a float."""
    weights = {
        "s": np.array(0.01, np.float32),
        "u": np.array(128, np.uint8),
        "w": np.ones((4, 1, 3, 3), np.int8),
        "z": np.array(0, np.int8),
        "b": np.linspace(-1, 1, 4, dtype=np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "u"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "u"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"]),
        helper.make_node("Conv", ["xd", "wd", "b"], ["c"], name="conv"),
        helper.make_node("QuantizeLinear", ["c", "s", "u"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "s", "u"], ["y"]),
    ]
    shapes = (("x", ["n", 1, 8, 8]), ("y", ["n", 4, 6, 6]))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes]
    path = save(tmp_path / "bias.onnx", nodes, values[:1], values[1:], weights)
    assert read_dtypes(path)["computed"]["QLinearConv"] == {"uint8/int8": 1}
    with pytest.raises(ExportError, match=r"biases.*int32.*'conv'.*float32 bias"):
        check_integer(path)


def test_products_of_two_activations_have_no_weight(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "t"], ["y"]), helper.make_node("Transpose", ["x"], ["t"])]
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "n"]),
    ]
    path = save(tmp_path / "attention.onnx", nodes[::-1], values[:1], values[1:], {})
    with pytest.raises(ExportError, match="none"):
        check_integer(path, float_allowed=0)
    assert read_dtypes(path)["stored"] == {}


def test_half_precision_is_stored_and_float_computed(tmp_path):
    weights = {"w": np.ones((8, 8), np.float16)}
    nodes = [helper.make_node("Cast", ["w"], ["wf"], to=TensorProto.FLOAT), helper.make_node("MatMul", ["x", "wf"], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in ("x", "y")]
    path = save(tmp_path / "half.onnx", nodes, values[:1], values[1:], weights)
    assert read_dtypes(path)["stored"] == {"float16": 128}
    assert read_dtypes(path)["computed"]["MatMul"].keys() <= {"float32", "float32/float16"}


def test_operators_inside_branches_are_seen(tmp_path):
    w = numpy_helper.from_array(np.ones((8, 8), np.float32), "w")
    out = [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)]
    branch = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["b"])], "then", [], out, [w])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["b"])], "else", [], out)
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other)
    inputs = [
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8]),
    ]
    path = save(tmp_path / "if.onnx", [node], inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])], {})
    found = read_dtypes(path)
    assert found["stored"] == {"float32": 256}
    assert found["computed"]["MatMul"] == {"float32": 1} and "Neg" in found["computed"]


def test_litert_files_by_kind(litert):
    _, files = litert
    floats = 4 * (72 + 8 + 2304 + 32)
    found = {kind: read_dtypes(path) for kind, path in files.items()}
    assert found["float"]["stored"]["float32"] == floats and "int8" not in found["float"]["stored"]
    assert found["float16"]["stored"]["float16"] == floats // 2
    assert found["int8"]["stored"]["int8"] == 72 + 2304
    assert found["int8"]["stored"]["int32"] >= 4 * (8 + 32)
    assert "float32" not in found["int8"]["stored"]
    assert found["dynamic"]["stored"]["int8"] == 2304
    assert found["int8"]["computed"]["CONV_2D"] == {"int8": 1} == found["int8"]["computed"]["FULLY_CONNECTED"]
    assert found["dynamic"]["computed"]["FULLY_CONNECTED"] == {"float32/int8": 1}
    assert found["float16"]["computed"]["CONV_2D"] == {"float32/float16": 1}


@pytest.mark.parametrize("kind", ["int8", "int8_io"])
def test_int8_litert_files_pass(litert, kind):
    assert check_integer(litert[1][kind]) == {"integer": 2, "float": 0}


@pytest.mark.parametrize("kind", ["float", "float16", "dynamic"])
def test_other_litert_files_fail_with_names(litert, kind):
    with pytest.raises(ExportError, match=rf"'{kind}.tflite' should compute in integers.*CONV_2D.*FULLY_CONNECTED"):
        check_integer(litert[1][kind])


def test_what_cannot_be_read(tmp_path):
    for name in ("x.onnx", "x.tflite"):
        (tmp_path / name).write_bytes(b"junk that is not a model")
        with pytest.raises(RuntimeFileError, match=name):
            read_dtypes(tmp_path / name)
        with pytest.raises(RuntimeFileError, match=name):
            check_integer(tmp_path / name)


def test_a_buffer_that_two_tensors_share_counts_once(tmp_path, litert):
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    path = litert[1]["float"]
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
    tensors = model.subgraphs[0].tensors
    kernel = next(tensor for tensor in tensors if list(tensor.shape) == [8, 3, 3, 1])
    tensors.append(kernel)
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    (tmp_path / "shared.tflite").write_bytes(builder.Output())
    assert read_dtypes(tmp_path / "shared.tflite")["stored"] == read_dtypes(path)["stored"]


def test_labels_of_operations():
    assert Operation("QLinearConv", "c", "uint8", "int8", "int32").dtype == "uint8/int8"
    assert Operation("Conv", "c", "float32", "float32").dtype == "float32"
    assert Operation("Relu", "r", "int8").is_integer and not Operation("Gemm", "g", "float32", "int8").is_integer
