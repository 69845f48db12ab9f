"""LiteRT files of Keras models, run by LiteRT."""

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from keras import layers as L

import zoo_keras
from other_backend import run_under
from whet.data import Batches
from whet.errors import ExportError
from whet.keras import export, litert_worker, predict, quantize, simulate
from whet.keras.quantize import bias_codes, planned
from whet.keras.views import to_numpy
from whet.runtimes.sessions import open_session
from whet.specs import TARGETS, Float, Int, PerTensor, Quantize

LITERT = TARGETS["litert"]


def flat(outputs):
    return [np.asarray(item) for item in keras.tree.flatten(outputs)]


def many(inputs, count=300):
    return keras.tree.map_structure(lambda a: zoo_keras.images(*a.shape[1:], seed=7, count=count), inputs)


def exported(model, inputs, folder, spec=None, calibration=None, **options):
    plan = None
    if spec is not None:
        data = Batches([many(inputs) if calibration is None else calibration])
        plan, _ = quantize(model, spec, LITERT, calibration=data, example=inputs, progress=False)
    path = folder / f"{model.name}{len(list(folder.iterdir()))}.tflite"
    export(model, plan, LITERT, path, example=inputs, **options)
    return plan, path


class Read:
    """A .tflite file's main graph, read through the schema."""

    def __init__(self, path):
        self.model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
        self.graph = self.model.subgraphs[0]
        self.names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
        self.types = {v: k for k, v in vars(schema.TensorType).items() if isinstance(v, int)}

    def operators(self, *wanted):
        """(name, types of the tensors read, type written, operator)."""
        found = []
        for operator in self.graph.operators:
            name = self.names[self.model.operatorCodes[operator.opcodeIndex].builtinCode]
            if not wanted or name in wanted:
                read = [self.types[self.graph.tensors[i].type] for i in operator.inputs if i >= 0]
                found.append((name, read, self.types[self.graph.tensors[operator.outputs[0]].type], operator))
        return found

    def array(self, index, dtype):
        tensor = self.graph.tensors[index]
        return np.frombuffer(bytes(self.model.buffers[tensor.buffer].data), dtype).reshape(tensor.shape)


WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")
FLOAT_PARTS = {  # what the plan leaves in float, by case
    "grouped": {"MEAN", "NEG", "SUB", "SQUARE", "ADD", "RSQRT", "MUL"},
    "pixel_shuffle": {"SPLIT", "LOGISTIC", "MUL", "MEAN"},
    "fused_qkv": {"STRIDED_SLICE", "BATCH_MATMUL", "MUL", "SOFTMAX"},
    "several_outputs": {"CONCATENATION"},
}


@pytest.mark.parametrize("name", zoo_keras.CASES)
def test_the_file_computes_what_the_simulation_does_in_integers(name, tmp_path):
    model, inputs = zoo_keras.CASES[name]()
    plan, path = exported(model, inputs, tmp_path, Quantize())
    data = many(inputs)
    expected = flat(predict(simulate(model, plan), data))
    found = flat(open_session(path).run(data))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32 and one.shape == other.shape
        assert np.mean(np.abs(one - other) <= 1e-5) >= 0.95
        assert np.mean(one.argmax(-1) == other.argmax(-1)) >= 0.99
    if name in ("digits_cnn", "small_resnet", "residual_add"):
        assert np.mean(np.abs(found[0] - expected[0]) <= 1e-5) >= 0.999
    if name == "attention_layer":  # computes in float as a whole, and is listed
        return
    read = Read(path)
    for operator, types, written, _ in read.operators():
        if operator in WEIGHTED:
            assert "INT8" in types and "FLOAT32" not in types and written == "INT8"
        elif operator not in ("QUANTIZE", "DEQUANTIZE") and "FLOAT32" in types and operator != "SHAPE":
            assert operator in FLOAT_PARTS.get(name, set())


def test_our_codes_and_scales_are_in_the_file_bit_for_bit(tmp_path):
    model, inputs = zoo_keras.digits_cnn()
    plan, path = exported(model, inputs, tmp_path, Quantize())
    program, read = planned(model, plan), Read(path)
    biases = {name: (codes, scale) for name, codes, scale in bias_codes(program, plan)}
    operators = read.operators("CONV_2D", "FULLY_CONNECTED")
    ends = ["conv1", "conv2", "hidden", "logits"]
    for layer, (kind, _, _, operator) in zip(ends, operators, strict=True):
        params = plan.weights[f"{layer}/kernel"]
        codes = params.encode(to_numpy(program.kernels[f"{layer}/kernel"].variable))
        codes = codes.transpose(3, 0, 1, 2) if kind == "CONV_2D" else codes.T
        tensor = read.graph.tensors[operator.inputs[1]]
        np.testing.assert_array_equal(read.array(operator.inputs[1], np.int8), codes)
        np.testing.assert_array_equal(tensor.quantization.scale, params.scale)
        assert tensor.quantization.quantizedDimension == 0 and not np.any(tensor.quantization.zeroPoint)
        stored, scale = biases[f"{layer}/bias"]
        np.testing.assert_array_equal(read.array(operator.inputs[2], np.int32), stored)
        np.testing.assert_array_equal(read.graph.tensors[operator.inputs[2]].quantization.scale, scale)
    written = {
        (float(t.quantization.scale[0]), int(t.quantization.zeroPoint[0]))
        for t in read.graph.tensors
        if read.types[t.type] == "INT8" and t.quantization.scale.size == 1
    }
    assert written == {(float(p.scale), int(p.zero_point) - 128) for p in plan.values.values()}


FLOAT_CASES = ("digits_cnn", "depthwise", "several_outputs", "nested_functional", "dense_reshape_transposed")


@pytest.mark.parametrize("name", [*FLOAT_CASES, "one_dimensional", "padded_and_dilated", "attention_layer"])
def test_float_files_equal_the_model(name, tmp_path):
    model, inputs = zoo_keras.CASES[name]()
    _, path = exported(model, inputs, tmp_path)
    for found, wanted in zip(flat(open_session(path).run(inputs)), flat(predict(model, inputs)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
    assert not any("INT8" in types for _, types, _, _ in Read(path).operators())


def test_a_second_bias_is_not_taken_for_the_first(tmp_path):
    i = keras.Input((6,))
    x = L.Reshape((1, 5))(L.Dense(5, name="biased")(i)) + np.arange(5, dtype=np.float32)
    model = zoo_keras.randomize(keras.Model(i, keras.ops.relu(x), name="biases"))
    inputs = zoo_keras.images(6)
    for spec in (None, Quantize(), Quantize(Int(8), None)):
        plan, path = exported(model, inputs, tmp_path, spec)
        wanted = predict(model if plan is None else simulate(model, plan), inputs)
        np.testing.assert_allclose(open_session(path).run(inputs), wanted, atol=1e-5)


def test_a_file_takes_any_batch_and_bears_the_models_names(tmp_path):
    model, inputs = zoo_keras.several_outputs()
    _, path = exported(model, inputs, tmp_path, Quantize())
    session = open_session(path)
    assert {slot.name for slot in session.inputs} == {"image", "extra"}
    assert [slot.name for slot in session.outputs] == ["features", "probability", "score"]
    assert all(slot.shape[0] is None and slot.dtype == "float32" for slot in (*session.inputs, *session.outputs))
    whole = session.run(inputs)
    alone = session.run({name: array[1:2] for name, array in inputs.items()})
    for one, all_rows in zip(flat(alone), flat(whole), strict=True):
        np.testing.assert_array_equal(one, all_rows[1:2])


def test_fixed_and_further_dynamic_axes(tmp_path):
    i = keras.Input((None, None, 3), name="image")
    model = zoo_keras.randomize(keras.Model(i, L.GlobalAveragePooling2D()(L.Conv2D(4, 3)(i)), name="open"))
    inputs = zoo_keras.images()

    def shape(**options):
        return open_session(exported(model, inputs, tmp_path, Quantize(), **options)[1]).inputs[0].shape

    assert shape() == (None, 8, 8, 3)
    assert shape(dynamic=False) == (5, 8, 8, 3)
    options = {"dynamic": {"image": {1: "height", 2: "width"}}}
    assert shape(**options) == (None, None, None, 3)
    plan, path = exported(model, inputs, tmp_path, Quantize(), **options)
    larger = zoo_keras.images(11, 9, 3)
    np.testing.assert_allclose(open_session(path).run(larger), predict(simulate(model, plan), larger), atol=1e-5)
    with pytest.raises(ExportError, match=r"dynamic must be.*image"):
        shape(dynamic={"picture": {1: "height"}})
    with pytest.raises(ExportError, match=r"axis 3.*fixes"):
        shape(dynamic={"image": {3: "channels"}})


def test_sixteen_bit_floats_and_weight_only_integers_are_stored_small(tmp_path):
    model, inputs = zoo_keras.digits_cnn()
    sizes = {}
    for name, spec, kind in (
        ("float", None, "FLOAT32"),
        ("half", Quantize(Float("float16"), None), "FLOAT16"),
        ("int8", Quantize(Int(8), None), "INT8"),
    ):
        plan, path = exported(model, inputs, tmp_path, spec)
        reference = model if plan is None else simulate(model, plan)
        np.testing.assert_allclose(open_session(path).run(inputs), predict(reference, inputs), atol=1e-4)
        sizes[name] = path.stat().st_size
        constants = [types[0] for operator, types, _, _ in Read(path).operators("DEQUANTIZE")]
        assert constants == ([] if plan is None else [kind] * 4)
    assert sizes["half"] < 0.55 * sizes["float"] and sizes["int8"] < 0.32 * sizes["float"]


def test_few_bits_are_stored_in_int8_and_per_tensor_scales_are_single(tmp_path):
    model, inputs = zoo_keras.digits_cnn()
    spec = Quantize(Int(4, granularity=PerTensor()))
    plan, path = exported(model, inputs, tmp_path, spec)
    read = Read(path)
    for _, _, _, operator in read.operators(*WEIGHTED):
        assert np.abs(read.array(operator.inputs[1], np.int8)).max() <= 8
        assert read.graph.tensors[operator.inputs[1]].quantization.scale.size == 1
    np.testing.assert_allclose(open_session(path).run(inputs), predict(simulate(model, plan), inputs), atol=1e-5)


def test_kept_layers_stay_float_between_integers(tmp_path):
    model, inputs = zoo_keras.digits_cnn()
    plan, path = exported(model, inputs, tmp_path, Quantize(keep=("conv2",)))
    types = [types[:2] for _, types, _, _ in Read(path).operators(*WEIGHTED)]
    assert types == [["INT8", "INT8"], ["FLOAT32", "FLOAT32"], ["INT8", "INT8"], ["INT8", "INT8"]]
    np.testing.assert_allclose(open_session(path).run(inputs), predict(simulate(model, plan), inputs), atol=1e-5)


def test_symmetric_activations_are_exported_with_zero_points_of_zero(tmp_path):
    model, inputs = zoo_keras.digits_cnn()
    plan, path = exported(model, inputs, tmp_path, Quantize(activations=Int(8, granularity=PerTensor())))
    written = [
        t.quantization for t in Read(path).graph.tensors if t.quantization is not None and t.quantization.zeroPoint is not None
    ]
    assert written and not any(np.any(item.zeroPoint) for item in written)
    np.testing.assert_allclose(open_session(path).run(inputs), predict(simulate(model, plan), inputs), atol=1e-5)


def test_files_are_small_aligned_and_without_metadata(tmp_path):
    model, inputs = zoo_keras.digits_cnn()
    _, original = exported(model, inputs, tmp_path)
    _, path = exported(model, inputs, tmp_path, Quantize())
    weights = sum(int(np.prod(v.shape)) for v in model.weights if len(v.shape) > 1)
    assert path.stat().st_size < weights + 4_200 and path.stat().st_size < 0.31 * original.stat().st_size
    content = path.read_bytes()
    root = schema.Model.GetRootAs(content, 0)
    assert root.MetadataLength() == 0 and root.Description() is None
    for index in range(root.BuffersLength()):
        buffer = root.Buffers(index)
        if buffer.DataLength():
            assert buffer._tab.Vector(buffer._tab.Offset(4)) % 16 == 0


def test_identical_weights_with_different_fates_are_refused(tmp_path):
    i = keras.Input((4,))
    a, b = L.Dense(4, name="a"), L.Dense(4, name="b")
    model = keras.Model(i, b(L.ReLU()(a(i))), name="twins")
    b.set_weights(a.get_weights())
    with pytest.raises(ExportError, match="same weights"):
        exported(model, zoo_keras.images(4), tmp_path, Quantize(keep=("b",)))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (Quantize(Int(12)), "at most 8 bits.*conv1/kernel.*12"),
        (Quantize(activations=Int(16, granularity=PerTensor())), "8-bit activations.*16 bits"),
        (Quantize(Float("bfloat16"), None), "float16, not of bfloat16"),
    ],
)
def test_what_litert_cannot_hold_is_refused_before_anything_runs(spec, words, tmp_path):
    model, inputs = zoo_keras.digits_cnn()
    with pytest.raises(ExportError, match=words):
        exported(model, inputs, tmp_path, spec)
    assert not list(tmp_path.iterdir())


def test_the_converter_runs_in_its_own_process_and_its_end_is_an_error(its_own_process, tmp_path, monkeypatch, capfd):
    model, inputs = zoo_keras.digits_cnn()
    before = [np.asarray(v).copy() for v in model.get_weights()]
    _, path = exported(model, inputs, tmp_path)
    assert capfd.readouterr() == ("", "")
    np.testing.assert_allclose(open_session(path).run(inputs), predict(model, inputs), atol=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    for code, words in (
        ("import os; os.abort()", "signal 6"),
        ("raise ValueError('no such operator')", "ValueError: no such operator"),
    ):
        broken = tmp_path / "broken.py"
        broken.write_text(code)
        monkeypatch.setattr(litert_worker, "__file__", str(broken))
        with pytest.raises(ExportError, match=f"converter failed on the model 'digits_cnn'.*{words}"):
            export(model, None, LITERT, tmp_path / "never.tflite", example=inputs)
        assert not (tmp_path / "never.tflite").exists()


TORCH = """
import sys
from pathlib import Path
import keras, numpy as np, zoo_keras
from whet.data import Batches
from whet.keras import export, predict, quantize, simulate
from whet.specs import TARGETS, Quantize
assert keras.backend.backend() == "torch"
model, x = zoo_keras.small_resnet()
plan, _ = quantize(model, Quantize(), TARGETS["litert"], calibration=Batches([x]), example=x, progress=False)
export(model, plan, TARGETS["litert"], Path(sys.argv[1]) / "t.tflite", example=x)
np.savez(Path(sys.argv[1]) / "t.npz", x=x, y=predict(simulate(model, plan), x))
"""


def test_a_model_under_the_torch_backend_is_exported_through_tensorflow(tmp_path):
    pytest.importorskip("torch")
    run_under("torch", TORCH, tmp_path)
    data = np.load(tmp_path / "t.npz")
    found = open_session(tmp_path / "t.tflite").run(data["x"])
    assert np.mean(np.abs(found - data["y"]) <= 1e-5) >= 0.95


def test_the_interpreter_agrees_on_the_types(tmp_path):
    model, inputs = zoo_keras.small_resnet()
    _, path = exported(model, inputs, tmp_path, Quantize())
    interpreter = Interpreter(str(path), experimental_preserve_all_tensors=True)
    types = {details["index"]: np.dtype(details["dtype"]).name for details in interpreter.get_tensor_details()}
    integer = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "CONCATENATION", "MAX_POOL_2D", "MEAN", "SOFTMAX")
    seen = set()
    for details in interpreter._get_ops_details():
        if details["op_name"] in integer:
            seen.add(details["op_name"])
            assert types[details["inputs"][0]] == "int8" and types[details["outputs"][0]] == "int8"
    assert seen == set(integer)
