"""Files of Keras models other than LiteRT, each run by its runtime."""

import keras
import numpy as np
import onnx
import pytest
from keras import layers as L

import zoo_keras
from keras_parts import Block
from other_backend import run_under
from whet.data import Batches
from whet.errors import ExportError, MissingExtraError, ModelError, RuntimeFileError, TargetError
from whet.keras import export, predict, quantize, simulate
from whet.keras import onnx_export as onnx_module
from whet.keras.quantize import bias_codes, planned
from whet.keras.views import to_numpy
from whet.runtimes.content import check_integer, read_dtypes
from whet.runtimes.sessions import open_session
from whet.specs import TARGETS, Float, Int, PerTensor, Quantize
from whet.specs.target import find_target

ORT, OPENVINO = TARGETS["onnxruntime"], TARGETS["openvino"]
TRACED_APART = {"grouped", "pixel_shuffle", "fused_qkv", "attention_layer"}  # need PyTorch's exporter, in a process of seconds
ALONE = [name for name in zoo_keras.CASES if name not in TRACED_APART]
INTEGER = {
    "QLinearConv",
    "QGemm",
    "QLinearAdd",
    "QLinearMul",
    "QLinearConcat",
    "QLinearGlobalAveragePool",
    "QLinearAveragePool",
}


def flat(outputs):
    return keras.tree.flatten(outputs)


def many(inputs, count=200):
    rng = np.random.default_rng(1)
    return keras.tree.map_structure(lambda a: rng.standard_normal((count, *a.shape[1:])).astype(np.float32), inputs)


def exported(model, inputs, folder, target, spec=None, **options):
    plan = None
    if spec is not None:
        plan, _ = quantize(model, spec, target, calibration=Batches([inputs]), example=inputs, progress=False)
    path = folder / f"{model.name}{len(list(folder.iterdir()))}{target.suffix}"
    export(model, plan, target, path, example=inputs, **options)
    return plan, path


def noise(found, wanted):
    """Signal to noise in dB."""
    return 10 * np.log10(np.sum(wanted**2) / max(np.sum((found - wanted) ** 2), 1e-20))


@pytest.mark.parametrize("name", [*ALONE, "attention_layer"])
def test_float_onnx_files_equal_the_model(name, tmp_path):
    model, inputs = zoo_keras.CASES[name]()
    _, path = exported(model, inputs, tmp_path, ORT)
    onnx.checker.check_model(str(path), full_check=True)
    for found, wanted in zip(flat(open_session(path).run(many(inputs, 7))), flat(predict(model, many(inputs, 7))), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*ALONE, "grouped"])
def test_onnx_files_compute_the_simulation_in_integers(name, tmp_path):
    model, inputs = zoo_keras.CASES[name]()
    plan, path = exported(model, inputs, tmp_path, ORT, Quantize())
    data = many(inputs)
    for found, wanted in zip(flat(open_session(path).run(data)), flat(predict(simulate(model, plan), data)), strict=True):
        assert np.mean(np.abs(found - wanted) <= 1e-4) >= 0.99
        assert np.mean(found.argmax(-1) == wanted.argmax(-1)) >= 0.995
    check_integer(path, float_allowed=1 if name == "dense_reshape_transposed" else 0)
    computed = read_dtypes(path)["computed"]
    assert all("uint8" in dtype for op in INTEGER & set(computed) for dtype in computed[op])
    if name in ("residual_add", "small_resnet", "nested_functional", "concat_same"):
        assert not {"Add", "Concat", "Conv", "Gemm", "GlobalAveragePool", "Relu"} & set(computed)
        assert computed["Transpose"] == {"uint8": 1}  # of the input: all others are gone


def test_our_codes_and_scales_are_in_the_onnx_file_bit_for_bit(tmp_path):
    model, inputs = zoo_keras.depthwise()
    plan, path = exported(model, inputs, tmp_path, ORT, Quantize())
    graph = onnx.load(path).graph
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    pairs = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    program = planned(model, plan)
    assert len(plan.weights) == 6
    for name, params in plan.weights.items():
        kernel = program.kernels[name]
        array = to_numpy(kernel.variable)
        if kernel.in_axis is None:
            array = array.reshape(*array.shape[:-2], 1, -1)
        codes = params.encode(array)
        codes = codes.T if codes.ndim == 2 else codes.transpose(3, 2, 0, 1)
        np.testing.assert_array_equal(stored[name], codes)
        np.testing.assert_array_equal(stored[pairs[name].input[1]], params.scale.reshape(-1))
    for name, codes, scale in bias_codes(program, plan):
        np.testing.assert_array_equal(stored[name], codes)
        np.testing.assert_array_equal(stored[pairs[name].input[1]], np.broadcast_to(scale, codes.shape))
    written = {(float(stored[n.input[1]]), int(stored[n.input[2]])) for n in graph.node if n.op_type == "QuantizeLinear"}
    assert written <= {(float(p.scale), int(p.zero_point)) for p in plan.values.values()} and len(written) > 4


def test_inputs_outputs_and_open_axes_bear_names(tmp_path):
    model, inputs = zoo_keras.several_outputs()
    _, path = exported(model, inputs, tmp_path, ORT, Quantize())
    session = open_session(path)
    assert {slot.name for slot in session.inputs} == {"image", "extra"}
    assert [slot.name for slot in session.outputs] == ["features", "probability", "score"]
    i = keras.Input((None, None, 3), name="image")
    model = zoo_keras.randomize(keras.Model(i, L.GlobalAveragePooling2D()(L.Conv2D(4, 3, padding="same")(i)), name="open"))
    plan, path = exported(model, zoo_keras.images(), tmp_path, ORT, Quantize(), dynamic={"image": {1: "height", 2: "width"}})
    assert open_session(path).inputs[0].shape == (None, None, None, 3)
    larger = zoo_keras.images(11, 9, 3)
    np.testing.assert_allclose(open_session(path).run(larger), predict(simulate(model, plan), larger), atol=1e-4)
    _, path = exported(model, zoo_keras.images(), tmp_path, ORT, dynamic=False)
    assert open_session(path).inputs[0].shape == (5, 8, 8, 3)


@pytest.mark.parametrize("target", [ORT, OPENVINO], ids=["onnx", "openvino"])
def test_weights_alone_are_stored_small(target, tmp_path):
    model, inputs = zoo_keras.digits_cnn()
    for spec, kind in ((Quantize(Float("float16"), None), "float16"), (Quantize(Int(8), None), "int8")):
        plan, path = exported(model, inputs, tmp_path, target, spec)
        # Both runtimes round what dense layers with integer weights read to 8 bits, on their own; OpenVINO in 16-bit ones too.
        bar = 80 if target is ORT and kind == "float16" else 35
        assert noise(open_session(path).run(inputs), predict(simulate(model, plan), inputs)) > bar
        stored = read_dtypes(path)["stored"]
        size = 2 if kind == "float16" else 1
        assert stored[kind] >= size * sum(int(np.prod(v.shape)) for v in model.weights if len(v.shape) > 1)


@pytest.mark.parametrize(
    "spec",
    [
        Quantize(Int(4)),
        Quantize(Int(8, granularity=PerTensor())),
        Quantize(activations=Int(8, granularity=PerTensor())),
        Quantize(activations=Int(6, symmetric=False, granularity=PerTensor())),
        Quantize(Int(12), Int(16, symmetric=False, granularity=PerTensor())),
        Quantize(keep=("conv2",)),
    ],
    ids=["weights of 4 bits", "per tensor", "symmetric activations", "activations of 6 bits", "16 bits", "kept"],
)
def test_other_codes_are_computed_as_simulated(spec, tmp_path):
    model, inputs = zoo_keras.digits_cnn()
    plan, path = exported(model, inputs, tmp_path, ORT, spec)
    data = many(inputs)
    assert noise(open_session(path).run(data), predict(simulate(model, plan), data)) > 45


def test_a_kept_layer_between_integers_stays_float(tmp_path):
    model, inputs = zoo_keras.digits_cnn()
    _, path = exported(model, inputs, tmp_path, ORT, Quantize(keep=("conv2",)))
    computed = read_dtypes(path)["computed"]
    assert computed["QLinearConv"] == {"uint8/int8": 1}
    assert (
        sum(count for op, kinds in computed.items() if "Conv" in op for kind, count in kinds.items() if kind == "float32") == 1
    )


def test_a_shared_convolution_before_a_relu_with_negative_codes_runs_in_integers(tmp_path):
    model, inputs = zoo_keras.shared_layer()
    _, path = exported(model, inputs, tmp_path, ORT, Quantize())
    computed = read_dtypes(path)["computed"]
    assert computed["Clip"] == {"uint8": 1} and computed["QLinearConv"] == {"uint8/int8": 2}


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 2, 8), (2, 3, 7), (5, 2, 7), (4, 1, 8)])
def test_padding_is_keras_own(padding, kernel, stride, size, tmp_path):
    i = keras.Input((size, size + 1, 3))
    x = L.Conv2D(4, kernel, strides=stride, padding=padding)(i)
    up = L.Conv2DTranspose(5, kernel, strides=stride, padding=padding)(i)
    pooled = L.AveragePooling2D(kernel, stride, padding=padding)(i)
    peak = L.MaxPooling2D(kernel, stride, padding=padding)(i)
    depth = L.DepthwiseConv2D(kernel, strides=stride, padding=padding, depth_multiplier=2)(i)
    row = L.Conv1D(4, kernel, padding="causal", dilation_rate=2)(L.Reshape((-1, 3))(i))
    model = zoo_keras.randomize(keras.Model(i, [x, up, pooled, peak, depth, row], name="padded"))
    inputs = zoo_keras.images(size, size + 1, 3)
    _, path = exported(model, inputs, tmp_path, ORT)
    for found, wanted in zip(flat(open_session(path).run(inputs)), flat(predict(model, inputs)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_recurrent_layers_and_tokens_are_written_by_pytorch(tmp_path):
    i = keras.Input((6,), dtype="int32", name="tokens")
    x = L.LSTM(5, return_sequences=True)(L.Embedding(11, 4)(i))
    model = zoo_keras.randomize(keras.Model(i, L.Dense(3)(L.GRU(4)(x)), name="recurrent"))
    tokens = np.random.default_rng(0).integers(0, 11, (4, 6)).astype(np.int32)
    plan, path = exported(model, tokens, tmp_path, ORT, Quantize())
    np.testing.assert_allclose(open_session(path).run(tokens), predict(simulate(model, plan), tokens), atol=1e-4)
    assert read_dtypes(path)["computed"]["QGemm"] == {"uint8/int8": 1}


def test_what_onnx_cannot_hold_is_an_error_with_the_layers_name(tmp_path, monkeypatch):
    i = keras.Input((4,))
    model = keras.Model(i, L.Dense(3)(Block(4, name="mine")(i)), name="custom")
    with pytest.raises(ExportError, match=r"'mine'.*class of your own \(Block\)"):
        exported(model, zoo_keras.images(4), tmp_path, ORT)
    model = keras.Model(i, L.LayerNormalization(name="norm")(i), name="apart")
    broken = tmp_path / "broken.py"
    broken.write_text("import os; os.abort()")
    monkeypatch.setattr(onnx_module.onnx_worker, "__file__", str(broken))
    with pytest.raises(ExportError, match=r"'apart'.*signal 6"):
        export(model, None, ORT, tmp_path / "never.onnx", example=zoo_keras.images(4))
    monkeypatch.setattr(onnx_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"'norm' \(LayerNormalization\).*whet\[torch,onnx\]"):
        export(model, None, ORT, tmp_path / "never.onnx", example=zoo_keras.images(4))
    assert not (tmp_path / "never.onnx").exists()


def test_a_file_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    model, inputs = zoo_keras.digits_cnn()
    monkeypatch.setitem(onnx_module.RULES, "linear", onnx_module.RULES["relu"])
    with pytest.raises(ExportError, match="shape"):
        exported(model, inputs, tmp_path, ORT)
    monkeypatch.undo()
    monkeypatch.setitem(onnx_module.RULES, "mul", onnx_module.RULES["add"])
    model, inputs = zoo_keras.padded_and_dilated()
    with pytest.raises(ExportError, match="differs from the model"):
        exported(model, inputs, tmp_path, ORT)


@pytest.mark.parametrize("name", ["digits_cnn", "residual_add", "depthwise", "several_outputs"])
def test_openvino_files_compute_the_simulation(name, tmp_path):
    model, inputs = zoo_keras.CASES[name]()
    _, path = exported(model, inputs, tmp_path, OPENVINO)
    data = many(inputs)
    for found, wanted in zip(flat(open_session(path).run(data)), flat(predict(model, data)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    plan, path = exported(model, inputs, tmp_path, OPENVINO, Quantize())
    floats = flat(predict(model, data))
    for found, wanted, exact in zip(
        flat(open_session(path).run(data)), flat(predict(simulate(model, plan), data)), floats, strict=True
    ):
        assert noise(found, wanted) > noise(wanted, exact) + 3
    assert path.with_suffix(".bin").is_file()


def test_keras_and_savedmodel_files_are_the_float_model(tmp_path):
    model, inputs = zoo_keras.several_outputs()
    for name in ("keras", "tensorflow"):
        _, path = exported(model, inputs, tmp_path, TARGETS[name])
        session = open_session(path)
        assert {slot.name for slot in session.inputs} == {"image", "extra"}
        for rows in (1, 5):
            batch = {key: array[:rows] for key, array in inputs.items()}
            for found, wanted in zip(flat(session.run(batch)), flat(predict(model, batch)), strict=True):
                np.testing.assert_allclose(found, wanted, atol=1e-5)
        content = read_dtypes(path)
        assert content["stored"]["float32"] == 4 * sum(int(np.prod(v.shape)) for v in model.weights)
        assert any("float32" in kinds for kinds in content["computed"].values())


def test_inputs_of_a_savedmodel_keep_their_order(tmp_path):
    b, a = keras.Input((3,), name="b"), keras.Input((3,), name="a")
    model = zoo_keras.randomize(keras.Model([b, a], L.Dense(2)(b) - 2 * L.Dense(2)(a), name="ordered"))
    inputs = (zoo_keras.images(3), zoo_keras.images(3, seed=1))
    _, path = exported(model, inputs, tmp_path, TARGETS["tensorflow"])
    np.testing.assert_allclose(open_session(path).run(inputs), predict(model, inputs), atol=1e-6)


def test_float_formats_take_no_quantized_model(tmp_path):
    model, inputs = zoo_keras.digits_cnn()
    plan, _ = quantize(model, Quantize(), ORT, calibration=Batches([inputs]), example=inputs, progress=False)
    for name in ("keras", "tensorflow"):
        with pytest.raises(ExportError, match="hold floats"):
            export(model, plan, TARGETS[name], tmp_path / "never", example=inputs)
        with pytest.raises(ModelError, match=f"not quantized on {name}"):
            quantize(model, Quantize(), TARGETS[name], calibration=Batches([inputs]), example=inputs, progress=False)
    with pytest.raises(ExportError, match="dynamic must be None"):
        export(model, None, TARGETS["keras"], tmp_path / "never.keras", example=inputs, dynamic=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_savedmodel_is_said_to_be_none(tmp_path):
    (tmp_path / "empty.savedmodel").mkdir()
    with pytest.raises(RuntimeFileError, match=r"must be a folder that holds 'saved_model\.pb'"):
        open_session(tmp_path / "empty.savedmodel")
    (tmp_path / "empty.savedmodel" / "saved_model.pb").write_bytes(b"damaged")
    with pytest.raises(RuntimeFileError, match=r"cannot load .empty\.savedmodel"):
        open_session(tmp_path / "empty.savedmodel")


def test_litert_is_what_a_keras_model_is_exported_to_without_a_target():
    assert find_target(None, "keras").name == "litert" and find_target("openvino", "keras").name == "openvino"
    with pytest.raises(TargetError, match="litert"):
        find_target("executorch", "keras")


TORCH = """
import sys
from pathlib import Path
import keras, numpy as np, zoo_keras
from whet.data import Batches
from whet.keras import export, predict, quantize, simulate
from whet.specs import TARGETS, Quantize
assert keras.backend.backend() == "torch"
model, x = zoo_keras.small_resnet()
place = Path(sys.argv[1])
target = TARGETS["onnxruntime"]
plan, _ = quantize(model, Quantize(), target, calibration=Batches([x]), example=x, progress=False)
export(model, plan, target, place / "t.onnx", example=x)
export(model, None, TARGETS["tensorflow"], place / "t.savedmodel", example=x)
np.savez(place / "t.npz", x=x, y=predict(simulate(model, plan), x), float=predict(model, x))
"""


def test_a_model_under_the_torch_backend_is_exported_too(tmp_path):
    run_under("torch", TORCH, tmp_path)
    data = np.load(tmp_path / "t.npz")
    assert np.mean(np.abs(open_session(tmp_path / "t.onnx").run(data["x"]) - data["y"]) <= 1e-5) >= 0.95
    np.testing.assert_allclose(open_session(tmp_path / "t.savedmodel").run(data["x"]), data["float"], atol=1e-5)
