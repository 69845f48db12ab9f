"""Schemes of weights in Keras models: which layers, what their files hold."""

import keras
import numpy as np
import onnx
import pytest

import whet
from bench import sqnr
from whet import Dynamic, Float, Int, PerGroup, Quantize
from whet.runtimes.content import read_dtypes
from whet.runtimes.sessions import open_session

L = keras.layers
IDS = np.random.default_rng(0).integers(0, 20, (4, 6)).astype("int32")


def mixed(recurrent=True, attention=True):
    i = keras.Input((6,), dtype="int32")
    x = L.Embedding(20, 32, name="embed")(i)
    x = L.Add()([x, L.MultiHeadAttention(4, 8, name="attention")(x, x)]) if attention else x
    x = L.LSTM(32, return_sequences=True, name="lstm")(x) if recurrent else x
    x = L.EinsumDense("abc,cd->abd", output_shape=(None, 32), bias_axes="d", name="einsum")(x)
    x = L.Conv1D(32, 3, padding="same", groups=4, activation="relu", name="conv")(x)
    x = L.DepthwiseConv1D(3, padding="same", name="depthwise")(L.Conv1DTranspose(32, 3, padding="same", name="up")(x))
    return keras.Model(i, L.Dense(5, name="fc")(x))


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return mixed()


STORED = {f"{n}/kernel" for n in ("einsum", "conv", "up", "depthwise", "fc")} | {"embed/embeddings"}
INNER = {f"attention/{n}/kernel" for n in ("query", "key", "value", "attention_output")}
INNER |= {"lstm/lstm_cell/kernel", "lstm/lstm_cell/recurrent_kernel"}


def quantized(model, weights, activations=None, example=IDS, target="onnxruntime", **more):
    return whet.quantize(model, Quantize(weights, activations, **more), example=example, target=target, progress=False)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_every_layer_is_stored_in_4_bits(model, target):
    result = quantized(model, Int(4), target=target)
    assert set(result.plan.weights) == STORED | INNER and not result.plan.tensors
    rows = {row["name"]: row for row in result.steps[-1].changed}
    assert set(rows) == STORED | INNER and all(row.get("stored", "int4") == "int4" for row in rows.values())


def test_what_litert_has_no_codes_for_is_rounded_and_listed_as_float(model):
    result = quantized(model, Int(4), target="litert")
    assert set(result.plan.tensors) == INNER | {"einsum/kernel", "embed/embeddings"}
    rows = {row["name"]: row for row in result.steps[-1].changed}
    assert all(rows[name]["stored"] == "float32" for name in result.plan.tensors)
    levels = np.asarray(result.plan.tensors["lstm/lstm_cell/kernel"])
    assert all(len(np.unique(column)) <= 16 for column in levels.T)


def test_attention_and_recurrent_layers_leave_as_codes(tmp_path):
    """Layers that PyTorch's exporter writes, whose kernels it may turn and reshape; one in 16 bits."""
    keras.utils.set_random_seed(0)
    i = keras.Input((2, 16))
    x = L.LSTM(8, go_backwards=True, name="lstm")(L.MultiHeadAttention(2, 8, name="attention")(i, i))
    x = L.Conv3D(4, (2, 2, 1), name="wide")(L.Reshape((4, 2, 1, 1))(x))
    model = keras.Model(i, L.Dense(5, name="out")(L.Flatten()(x)))
    x = np.random.default_rng(0).normal(size=(8, 2, 16)).astype(np.float32)
    result = quantized(model, Int(4), example=x, overrides={"lstm": Float("float16")}, keep=("out",))
    path = result.export(tmp_path / "m.onnx")
    assert sqnr(result.side.predict(result.model, x), np.asarray(open_session(path).run(x))) > 60
    assert sqnr(result.side.predict(result.model, x), result.side.predict(result.convert(), x)) > 100
    sizes = {row["name"]: row["parameters"] for row in result.steps[-1].changed}
    half = sum(size for name, size in sizes.items() if name.startswith("lstm/"))
    stored = read_dtypes(path)["stored"]
    assert len(sizes) == 7 and stored["int4"] == (sum(sizes.values()) - half) // 2 and stored["float16"] == 2 * half


def test_embeddings_einsums_and_convolutions_are_stored_in_4_bits(tmp_path):
    keras.utils.set_random_seed(0)
    result = quantized(mixed(recurrent=False, attention=False), Int(4))
    path = result.export(tmp_path / "m.onnx")
    assert sqnr(result.side.predict(result.model, IDS), np.asarray(open_session(path).run(IDS))) > 35
    assert read_dtypes(path)["stored"]["int4"] == sum(row["parameters"] for row in result.steps[-1].changed) // 2


def test_litert_holds_the_rounded_floats_of_other_layers(tmp_path):
    keras.utils.set_random_seed(0)
    result = quantized(mixed(recurrent=False), Int(8), target="litert")
    assert set(result.plan.weights) == {f"{n}/kernel" for n in ("conv", "up", "depthwise", "fc")}
    path = result.export(tmp_path / "m.tflite")
    assert sqnr(result.side.predict(result.model, IDS), np.asarray(open_session(path).run(IDS))) > 60


def test_kept_classes_stay_float(model):
    result = quantized(model, Int(4), keep=(L.Embedding, L.LSTM, "attention"))
    assert set(result.plan.weights) == STORED - {"embed/embeddings"} and not result.plan.tensors


def test_16_bit_embeddings_and_einsums_are_stored_in_16_bits(model):
    result = quantized(model, Float("float16"))
    assert set(result.plan.casts) == STORED | INNER and not result.steps[-1].skipped


@pytest.mark.parametrize("spec", [Int(4, granularity=PerGroup(32)), Int(4, symmetric=False)])
def test_int4_dense_is_a_product_of_codes(spec, tmp_path):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((64,)), L.Dense(48, name="fc")])
    x = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    result = quantized(model, spec, example=x)
    path = result.export(tmp_path / "m.onnx")
    proto = onnx.load(str(path))
    onnx.checker.check_model(proto, full_check=True)
    (node,) = [n for n in proto.graph.node if n.op_type == "DequantizeLinear"]
    held = {t.name: t for t in proto.graph.initializer}
    expected = result.plan.encode("fc/kernel", np.asarray(model.layers[0].kernel))
    assert np.array_equal(onnx.numpy_helper.to_array(held[node.input[0]]).astype(np.int32), expected)
    assert read_dtypes(path)["computed"] == {"MatMulNBits": {"float32/uint8": 1}}
    assert sqnr(result.side.predict(result.model, x), np.asarray(open_session(path).run(x))) > 40


def test_dynamic_dense_runs_in_integers(tmp_path):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((32,)), L.Dense(32, activation="relu", name="a"), L.Dense(8, name="b")])
    x = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    result = quantized(model, Int(8), Dynamic(), example=x)
    assert set(result.plan.dynamic) == {"a/linear:0", "b/linear:0"}
    path = result.export(tmp_path / "m.onnx")
    assert sqnr(result.side.predict(result.model, x), np.asarray(open_session(path).run(x))) > 80
    assert read_dtypes(path)["computed"]["DynamicQuantizeMatMul"] == {"float32/int8": 2}
