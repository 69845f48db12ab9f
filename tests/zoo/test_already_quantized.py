"""Case 31: what other tools, or Whet itself, have quantized is named and refused, never quantized twice."""

import numpy as np
import pytest

import whet
from whet import QAT, Dynamic, Int, Quantize
from whet.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore")  # the other tools' own
QUIET = {"progress": False}
X = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)


def torch_net():
    torch = pytest.importorskip("torch")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).eval()


def ao_dynamic():
    import torch

    return torch.ao.quantization.quantize_dynamic(torch_net(), {torch.nn.Linear}, dtype=torch.qint8)


def ao_eager(*, convert=True):
    import torch
    from torch.ao import quantization as ao

    model = torch.nn.Sequential(ao.QuantStub(), torch_net(), ao.DeQuantStub())
    model.qconfig = ao.get_default_qconfig("x86")
    prepared = ao.prepare(model)
    prepared(torch.from_numpy(X))
    return ao.convert(prepared) if convert else prepared


def ao_qat():
    from torch.ao import quantization as ao

    model = torch_net().train()
    model.qconfig = ao.get_default_qat_qconfig("x86")
    return ao.prepare_qat(model)


def fx(*, reference=False):
    import torch
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    example = torch.from_numpy(X)
    prepared = quantize_fx.prepare_fx(torch_net(), get_default_qconfig_mapping("x86"), (example,))
    prepared(example)
    return (quantize_fx.convert_to_reference_fx if reference else quantize_fx.convert_fx)(prepared)


def pt2e():
    import torch

    steps = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    example = (torch.from_numpy(X),)
    prepared = steps.prepare_pt2e(torch.export.export(torch_net(), example).module(), quantizer)
    prepared(*example)
    return steps.convert_pt2e(prepared)


def torchao(config):
    quantization = pytest.importorskip("torchao.quantization")
    model = torch_net()
    quantization.quantize_(model, getattr(quantization, config)())
    return model


TORCH = {
    "quantize_dynamic": ao_dynamic,
    "eager": ao_eager,
    "eager, prepared": lambda: ao_eager(convert=False),
    "eager, prepared for training": ao_qat,
    "FX": fx,
    "FX, reference": lambda: fx(reference=True),
    "PT2E": pt2e,
    "torchao, weights": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao, dynamic": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
}


@pytest.mark.parametrize("name", TORCH)
def test_what_pytorch_tools_have_quantized(name):
    model = TORCH[name]()
    with pytest.raises(ModelError, match=r"quantized (already|or sharded already)|quantized or sharded"):
        whet.quantize(model, calibration=X, **QUIET)
    with pytest.raises(ModelError, match="float"):
        whet.sensitivity(model, Int(4), calibration=X, **QUIET)


def keras_net():
    keras = pytest.importorskip("keras")
    dense = keras.layers.Dense
    return keras.Sequential([keras.Input((32,)), dense(32, activation="relu", name="a"), dense(8, name="b")], name="net")


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
@pytest.mark.parametrize("nested", [False, True])
def test_what_keras_has_quantized(mode, nested):
    keras = pytest.importorskip("keras")
    model = keras_net()
    model.quantize(mode)
    if nested:
        model = keras.Sequential([keras.Input((32,)), model, keras.layers.Dense(3)])
    with pytest.raises(ModelError, match=f"{'net/a' if nested else 'a'}' is already quantized \\({mode}"):
        whet.quantize(model, calibration=X, **QUIET)


def test_what_keras_has_quantized_and_saved(tmp_path):
    keras = pytest.importorskip("keras")
    model = keras_net()
    model.quantize("int8")
    model.save(tmp_path / "model.keras")
    with pytest.raises(ModelError, match="already quantized"):
        whet.quantize(keras.models.load_model(tmp_path / "model.keras"), calibration=X, **QUIET)


@pytest.mark.parametrize("build", [torch_net, keras_net])
@pytest.mark.parametrize("spec", [Quantize(), Quantize(Int(8), Dynamic())])
def test_what_whet_has_quantized(build, spec):
    made = whet.quantize(build(), spec, calibration=X, target="onnxruntime", **QUIET)
    for model in (made.model, made.convert()):
        with pytest.raises(ModelError, match="quantized"):
            whet.quantize(model, spec, calibration=X, **QUIET)
    with pytest.raises(ModelError, match="quantized already"):
        whet.quantize(made, spec, calibration=X, **QUIET)


@pytest.mark.parametrize("build", [torch_net, keras_net])
def test_what_whet_has_prepared(build):
    model = build()
    side = whet.torch if build is torch_net else whet.keras
    prepared = side.prepare(model, Quantize(qat=QAT()), calibration=[X])
    with pytest.raises(ModelError, match=r"prepared.*whet\.finish"):
        whet.quantize(prepared, calibration=X, **QUIET)


def test_masks_of_pytorch_are_composed_with():
    """Pruned by torch.nn.utils.prune and made permanent: the zeros stay zeros."""
    prune = pytest.importorskip("torch.nn.utils.prune")
    model = torch_net()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.remove(model[0], "weight")
    zeros = model[0].weight.detach().numpy() == 0
    made = whet.quantize(model, calibration=X, **QUIET)
    assert zeros.mean() == 0.5 and not made.model[0].weight.detach().numpy()[zeros].any()
