"""ONNX files from PyTorch models: executed by ONNX Runtime, read back byte by byte."""

import dataclasses
import logging
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from torch_files import Exports
from whet.data import Batches
from whet.errors import ExportError
from whet.specs import TARGETS, Float, Int, PerTensor, Quantize
from whet.torch import convert, export, predict, quantize, simulate
from zoo_torch import CASES, Branching, normal

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

ORT = TARGETS["onnxruntime"]
INTEGER = {"QLinearConv", "QGemm", "QLinearMatMul", "QLinearAdd", "QLinearConcat", "QLinearAveragePool"}
FLOAT = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Relu", "Clip", "Add"}
EXPORTED = [name for name in CASES if name != "branching"]
FILES = Exports(ORT, "onnx")
write = FILES.write


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return FILES.once(tmp_path_factory)


def run(path, inputs):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    arrays = inputs if isinstance(inputs, dict) else {session.get_inputs()[0].name: inputs}
    return session.run(None, arrays)


def operators(path):
    """The operators that ONNX Runtime really runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path) + ".optimized"
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def leaves(value):
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, tuple) else [value]


def sqnr(reference, got):
    return 10 * np.log10(np.sum(reference**2) / max(np.sum((reference - got) ** 2), 1e-30))


@pytest.mark.parametrize("name", EXPORTED)
def test_the_file_computes_what_the_simulation_says(written, name):
    model, inputs, plan, path = written(name, Quantize())
    expected = leaves(predict(simulate(model, plan), inputs))
    for mine, its in zip(expected, run(path, inputs), strict=True):
        assert mine.shape == its.shape
        assert sqnr(mine, its) > 40
    stored = {item.name: item for item in onnx.load(str(path)).graph.initializer}
    for weight in plan.weights:
        assert stored[weight].data_type == onnx.TensorProto.INT8
    for bias in plan.biases:
        assert stored[bias].data_type == onnx.TensorProto.INT32


def test_the_demo_runs_in_integers_only(written, tmp_path):
    model, inputs, _, path = written("demo", Quantize())
    found = operators(path)
    assert sorted(op for op in found if op in INTEGER) == ["QGemm", "QGemm", "QLinearConv", "QLinearConv"]
    assert not FLOAT & set(found)
    assert found.count("QuantizeLinear") == found.count("DequantizeLinear") == 1
    other = tmp_path / "float.onnx"
    export(model, None, ORT, other, example=inputs)
    codes = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert path.stat().st_size < codes + 4000
    assert path.stat().st_size < 0.3 * other.stat().st_size


@pytest.mark.parametrize(
    ("name", "expected", "floats"),
    [
        ("residual", {"QLinearConv": 3, "QLinearAdd": 1, "QLinearAveragePool": 1, "QGemm": 1}, set()),
        ("concat", {"QLinearConv": 3, "QLinearConcat": 1, "QLinearAveragePool": 1, "QGemm": 1}, set()),
        ("depthwise", {"QLinearConv": 4, "QLinearAveragePool": 1, "QGemm": 1}, set()),
        ("shuffle", {"QLinearConv": 2, "QLinearAveragePool": 1, "QGemm": 1}, set()),
        ("permute", {"QLinearConv": 1, "QGemm": 1}, set()),
        ("sequential", {"QLinearConv": 1, "QGemm": 2}, set()),
        ("siamese", {"QGemm": 5, "QLinearAdd": 1}, set()),
        ("twice", {"QLinearConv": 3, "QLinearAveragePool": 1, "QGemm": 1}, set()),
        ("functional", {"QLinearConv": 1, "QLinearAveragePool": 1, "QGemm": 1, "QLinearMatMul": 1}, set()),
        ("tied", {"QGemm": 2}, set()),
        ("fused_qkv", {"QGemm": 3, "QLinearAdd": 1}, {"MatMul", "FusedMatMul"}),
        ("grouped_query", {"QGemm": 4}, {"MatMul", "FusedMatMul"}),
    ],
)
def test_layers_run_in_integers(written, name, expected, floats):
    *_, path = written(name, Quantize())
    found = operators(path)
    assert {op: found.count(op) for op in INTEGER if op in found} == expected
    assert FLOAT & set(found) == floats


def test_a_kept_layer_stays_float(written):
    """ONNX Runtime would round its weights by itself, were nothing put in its way."""
    model, inputs, plan, path = written("demo", Quantize(keep=("conv2",)))
    assert "conv2.weight" not in plan.weights
    found = operators(path)
    assert found.count("QLinearConv") == 1 and found.count("Conv") + found.count("FusedConv") == 1
    assert sqnr(predict(simulate(model, plan), inputs), run(path, inputs)[0]) > 60


@pytest.mark.parametrize("name", ["demo", "residual", "siamese", "recurrent", "attention", "tied"])
def test_float_files_equal_the_model(written, name):
    model, inputs, _, path = written(name)
    for mine, its in zip(leaves(predict(model, inputs)), run(path, inputs), strict=True):
        assert np.allclose(mine, its, atol=1e-5)


@pytest.mark.parametrize("spec", [None, Quantize()])
def test_any_batch_size_from_an_example_of_one(tmp_path, spec):
    model, inputs = CASES["residual"]()
    plan = None
    if spec is not None:
        plan, _ = quantize(model, spec, ORT, calibration=Batches(inputs), example=inputs[:1], progress=False)
    path = tmp_path / "m.onnx"
    export(model, plan, ORT, path, example=inputs[:1])
    for rows in (1, 2, 5, 16):
        assert run(path, inputs[:rows])[0].shape == (rows, 5)
    proto = onnx.load(str(path))
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_shapes_stay_fixed_when_asked(written):
    *_, path = written("demo", Quantize(), dynamic=False)
    assert onnx.load(str(path)).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 16


def test_named_dynamic_axes(written):
    *_, path = written("grouped_query", None, dynamic={"input:0": {0: "batch", 1: "time"}})
    assert run(path, normal(3, 11, 16))[0].shape == (3, 11, 5)
    with pytest.raises(ExportError, match="inputs: input:0"):
        written("demo", dynamic={"images": {0: "batch"}})


def test_a_fixed_batch_size_in_the_code_is_named(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x.reshape(8, 4))

    model = Fixed().eval()
    with pytest.raises(ExportError, match="dynamic=False"):
        export(model, None, ORT, tmp_path / "m.onnx", example=normal(8, 4))
    export(model, None, ORT, tmp_path / "m.onnx", example=normal(8, 4), dynamic=False)


def test_control_flow_by_values_is_a_named_error(tmp_path):
    model = Branching().eval()
    with pytest.raises(ExportError, match="depend on the values of tensors"):
        export(model, None, ORT, tmp_path / "m.onnx", example=normal(4, 6))
    assert not (tmp_path / "m.onnx").exists()


def test_the_file_holds_nothing_of_the_machine(written):
    *_, path = written("residual", Quantize())
    proto = onnx.load(str(path))
    assert proto.producer_name == "whet" and not proto.metadata_props and not proto.graph.value_info
    for node in proto.graph.node:
        assert not node.metadata_props and not node.doc_string
    data = path.read_bytes()
    assert b".py" not in data and b"stack_trace" not in data
    used = {name for node in proto.graph.node for name in node.input}
    assert {item.name for item in proto.graph.initializer} <= used


def test_scales_are_named_after_what_they_belong_to(written):
    *_, path = written("demo", Quantize())
    names = {item.name for item in onnx.load(str(path)).graph.initializer}
    assert {"conv1.weight", "conv1.weight_scale", "conv1.bias", "conv1.bias_scale"} <= names


def test_inputs_and_outputs_have_names_that_help(written):
    *_, path = written("siamese", Quantize())
    graph = onnx.load(str(path)).graph
    assert [item.name for item in graph.input] == ["left", "right"]
    assert [item.name for item in graph.output] == ["logits", "embeddings_0", "embeddings_1"]


@dataclasses.dataclass
class Answer:
    """What a model returns; one field is not set."""

    logits: torch.Tensor
    hidden: torch.Tensor
    loss: torch.Tensor | None = None


def test_dataclass_outputs(tmp_path):
    class Answers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            hidden = self.a(x)
            hidden.relu_()
            return Answer(self.b(hidden), hidden)

    torch.manual_seed(0)
    model, inputs = Answers().eval(), normal(16, 4)
    plan, _ = quantize(model, Quantize(), ORT, calibration=Batches(inputs), example=inputs, progress=False)
    simulated = simulate(model, plan)
    assert isinstance(simulated(torch.from_numpy(inputs)), Answer)
    for number, given in enumerate((None, plan)):
        path = tmp_path / f"{number}.onnx"
        export(model, given, ORT, path, example=inputs)
        assert [item.name for item in onnx.load(str(path)).graph.output] == ["logits", "hidden"]
        for mine, its in zip(leaves(predict(simulated, inputs)), run(path, inputs), strict=True):
            assert sqnr(mine, its) > (40 if given is not None else 25)


def test_activations_beside_relu_run_in_integers(tmp_path):
    class Various(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x):
            x = torch.clamp(self.a(x), min=0)
            x = torch.nn.functional.hardtanh(self.b(x), 0, 1)
            x = torch.nn.functional.hardtanh(self.c(x), -1, 1)
            return torch.nn.functional.relu6(self.d(x))

    torch.manual_seed(0)
    model, inputs = Various().eval(), normal(16, 3, 4, 4)
    plan, _ = quantize(model, Quantize(), ORT, calibration=Batches(inputs), example=inputs, progress=False)
    export(model, plan, ORT, tmp_path / "m.onnx", example=inputs)
    found = operators(tmp_path / "m.onnx")
    assert found.count("QLinearConv") == 4 and not {"Conv", "FusedConv"} & set(found)
    assert sqnr(predict(simulate(model, plan), inputs), run(tmp_path / "m.onnx", inputs)[0]) > 40


def test_weights_only(written):
    model, inputs, plan, path = written("demo", Quantize(activations=None))
    stored = {item.name: item.data_type for item in onnx.load(str(path)).graph.initializer}
    assert all(stored[name] == onnx.TensorProto.INT8 for name in plan.weights)
    assert stored["conv1.bias"] == onnx.TensorProto.FLOAT
    assert not [node for node in onnx.load(str(path)).graph.node if node.op_type == "QuantizeLinear"]
    assert sqnr(predict(simulate(model, plan), inputs), run(path, inputs)[0]) > 40  # MatMulNBits rounds what it reads to 8 bits


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_weights(written, tmp_path, dtype):
    model, inputs, plan, path = written("demo", Quantize(Float(dtype), None))
    stored = {item.name: item.data_type for item in onnx.load(str(path)).graph.initializer}
    assert all(stored[name] == getattr(onnx.TensorProto, dtype.upper()) for name in plan.casts)
    assert np.allclose(predict(simulate(model, plan), inputs), run(path, inputs)[0], atol=1e-5)
    export(model, None, ORT, tmp_path / "float.onnx", example=inputs)
    assert path.stat().st_size < 0.6 * (tmp_path / "float.onnx").stat().st_size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models_are_stored_in_16_bits_and_run(tmp_path, dtype):
    model, inputs = CASES["demo"]()
    half = model.to(dtype)
    export(half, None, ORT, tmp_path / "half.onnx", example=inputs)
    got = run(tmp_path / "half.onnx", inputs)[0]
    assert sqnr(predict(half, inputs), got) > 25
    assert (tmp_path / "half.onnx").stat().st_size < 45_000
    plan, _ = quantize(half, Quantize(), ORT, calibration=Batches(inputs), example=inputs, progress=False)
    export(half, plan, ORT, tmp_path / "int8.onnx", example=inputs)
    assert sqnr(predict(half, inputs), run(tmp_path / "int8.onnx", inputs)[0]) > 25
    assert next(half.parameters()).dtype == dtype


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_fewer_bits_are_stored_in_bytes(written, bits):
    model, inputs, plan, path = written("demo", Quantize(Int(bits)))
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(str(path)).graph.initializer}
    assert stored["fc1.weight"].dtype == np.int8
    assert len(np.unique(stored["fc1.weight"])) <= 2**bits
    assert sqnr(predict(simulate(model, plan), inputs), run(path, inputs)[0]) > 40


def test_symmetric_and_low_bit_activations(written):
    for bits, symmetric in ((8, True), (6, False), (5, True)):
        spec = Quantize(activations=Int(bits, symmetric=symmetric, granularity=PerTensor()))
        model, inputs, plan, path = written("demo", spec)
        assert sqnr(predict(simulate(model, plan), inputs), run(path, inputs)[0]) > 40
        assert operators(path).count("QLinearConv") == 2


@pytest.mark.parametrize("spec", [Quantize(Int(9)), Quantize(activations=Int(16, symmetric=False, granularity=PerTensor()))])
def test_more_than_8_bits_cannot_be_exported(tmp_path, spec):
    model, inputs = CASES["demo"]()
    plan, _ = quantize(model, spec, ORT, calibration=Batches(inputs), example=inputs, progress=False)
    assert np.isfinite(predict(simulate(model, plan), inputs)).all()
    with pytest.raises(ExportError, match="at most 8"):
        export(model, plan, ORT, tmp_path / "m.onnx", example=inputs)


def test_a_plan_for_another_target_is_refused(tmp_path):
    model, inputs = CASES["demo"]()
    plan, _ = quantize(model, Quantize(), TARGETS["litert"], calibration=Batches(inputs), example=inputs, progress=False)
    with pytest.raises(ExportError, match="places quantizers for 'litert'"):
        export(model, plan, ORT, tmp_path / "m.onnx", example=inputs)
    with pytest.raises(ExportError, match=r"written to \.onnx"):
        export(model, plan, TARGETS["keras"], tmp_path / "m.onnx", example=inputs)


def test_a_way_not_calibrated_is_an_error_when_tracing(tmp_path):
    class Modes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
            self.short = False

        def forward(self, x):
            return self.b(x if self.short else torch.relu(self.a(x)))

    model, inputs = Modes().eval(), normal(8, 4)
    plan, _ = quantize(model, Quantize(), ORT, calibration=Batches(inputs), example=inputs, progress=False)
    model.short = True
    with pytest.raises(ExportError, match="did not run"):
        export(model, plan, ORT, tmp_path / "m.onnx", example=inputs)


def test_the_exporters_chatter_is_not_heard(tmp_path, capfd, caplog):
    with warnings.catch_warnings(record=True) as heard, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        write(tmp_path, "recurrent", Quantize())
    out, err = capfd.readouterr()
    assert out == "" and err == ""
    assert [str(item.message) for item in heard] == []
    assert not [record for record in caplog.records if record.levelno >= logging.INFO]


def test_every_use_of_a_weight_has_its_own_dequantize():
    model, inputs = CASES["twice"]()
    plan, _ = quantize(model, Quantize(), ORT, calibration=Batches(inputs), example=inputs, progress=False)
    program = torch.export.export(convert(model, plan), (torch.from_numpy(inputs),), strict=False)
    operand = [node.args[0].name for node in program.graph.nodes if "dequantize_per_channel" in str(node.target)]
    assert operand.count("b_shared_weight") == operand.count("b_shared_bias") == 2
    assert not [
        node for node in program.graph.nodes if "quantize_per_channel" in str(node.target) and "de" not in str(node.target)
    ]


def test_the_model_is_untouched(tmp_path):
    model, inputs = CASES["residual"]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    plan, _ = quantize(model, Quantize(), ORT, calibration=Batches(inputs), example=inputs, progress=False)
    convert(model, plan)
    export(model, plan, ORT, tmp_path / "m.onnx", example=inputs)
    assert model.training and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
