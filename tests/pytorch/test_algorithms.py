"""Post-training algorithms on PyTorch models, from the call to the exported file."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import whet
import zoo_torch
from whet.data import Batches
from whet.errors import DataError
from whet.specs import (
    AWQ,
    GPTQ,
    HQQ,
    MSE,
    NF4,
    TARGETS,
    AdaRound,
    BiasCorrection,
    CrossLayer,
    Entropy,
    Int,
    MovingAverage,
    Nearest,
    Percentile,
    PerGroup,
    PerTensor,
    Quantize,
    SmoothQuant,
)
from whet.torch import predict, quantize, simulate

ORT = TARGETS["onnxruntime"]
BEST = Quantize(Int(3), rounding=GPTQ(), weight_observer=MSE(), correct_bias=BiasCorrection())


def plan_of(model, spec, batches, target=ORT):
    batches = Batches(batches, "calibration")
    return quantize(model, spec, target, calibration=batches, example=batches.first()[0], progress=False)


def db(model, spec, batches, test):
    """Signal over error of the simulated outputs."""
    plan, _ = plan_of(model, spec, batches)
    exact = predict(model, test)
    return float(10 * np.log10(np.sum(exact**2) / np.sum((predict(simulate(model, plan), test) - exact) ** 2)))


@pytest.fixture(scope="module")
def residual():
    """A small residual network with folded batch norms, calibration batches and other data."""
    model, _ = zoo_torch.CASES["residual"]()
    return model, [zoo_torch.normal(16, 3, 8, 8, seed=seed) for seed in range(4)], zoo_torch.normal(64, 3, 8, 8, seed=9)


SPECS = {
    "gptq": Quantize(Int(3), rounding=GPTQ()),
    "gptq, scales searched, biases corrected": BEST,
    "adaround": Quantize(Int(3), rounding=AdaRound(steps=100)),
    "blocks": Quantize(Int(3), rounding=AdaRound(steps=60, blocks=True), weight_observer=MSE(), correct_bias=BiasCorrection()),
    "biases": Quantize(Int(3), correct_bias=BiasCorrection()),
    "deviations": Quantize(Int(3), correct_bias=BiasCorrection(batch_norm=True)),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_outputs_come_nearer_than_with_the_nearest_codes(residual, spec):
    gain = db(residual[0], spec, *residual[1:]) - db(residual[0], Quantize(Int(3)), *residual[1:])
    assert gain > (3 if spec is BEST else 0.5)


def test_blocks_are_learned_on_their_own_outputs(residual):
    spec = Quantize(Int(2), rounding=AdaRound(steps=150, blocks=True), correct_bias=BiasCorrection(), overrides={"fc": Int(8)})
    layers, _ = plan_of(residual[0], Quantize(Int(2), rounding=AdaRound(steps=150), correct_bias=BiasCorrection()), residual[1])
    plan, step = plan_of(residual[0], spec, residual[1])
    gains = {row["name"]: row["block_db"] for row in step.changed}
    assert all(after >= before for before, after in gains.values())
    assert gains["conv2.weight"] == gains["conv3.weight"] and gains["conv2.weight"][1] > gains["conv2.weight"][0] + 0.1
    assert not np.array_equal(plan.codes["conv2.weight"], layers.codes["conv2.weight"])
    assert plan.codes["conv2.weight"].min() >= -2 and plan.codes["conv2.weight"].max() <= 1


def test_the_model_is_left_alone_and_the_result_is_reproducible(residual):
    model, batches, test = residual
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, step = plan_of(model, BEST, batches)
    second, _ = plan_of(model, BEST, batches)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model._forward_hooks and all(not module._forward_hooks for module in model.modules())
    np.testing.assert_array_equal(predict(simulate(model, first), test), predict(simulate(model, second), test))
    for row in step.changed:
        assert row["algorithm"] == "GPTQ" and row["output_db"] > row["nearest_db"] > 0 and row["error_db"] > 0


def test_the_exported_file_and_a_saved_result_hold_the_chosen_codes_and_biases(residual, tmp_path):
    model, batches, test = residual
    made = whet.quantize(model, BEST, calibration=batches, target="onnxruntime", progress=False)
    assert made.plan.codes and made.plan.tensors
    made.export(tmp_path / "model.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: test})[0]
    simulated = predict(made.model, test)
    assert np.mean(np.argmax(outputs, 1) == np.argmax(simulated, 1)) > 0.98
    np.testing.assert_allclose(outputs, simulated, atol=np.abs(simulated).max() * 0.02)
    made.save(tmp_path / "saved")
    again = whet.load(tmp_path / "saved", model)
    np.testing.assert_array_equal(predict(again.model, test), simulated)


CALIBRATED = [case for case in zoo_torch.CASES if case not in ("tied",)]


@pytest.mark.parametrize("case", CALIBRATED)
def test_the_zoo_is_rounded_well_or_says_why_not(case):
    model, inputs = zoo_torch.CASES[case]()
    exact = np.concatenate([np.ravel(a) for a in arrays(predict(model, inputs))])
    errors = []
    for spec in (Quantize(Int(4)), Quantize(Int(4), rounding=GPTQ(), weight_observer=MSE(), correct_bias=BiasCorrection())):
        plan, step = plan_of(model, spec, [inputs])
        found = np.concatenate([np.ravel(a) for a in arrays(predict(simulate(model, plan), inputs))])
        errors.append(np.mean((found - exact) ** 2))
    refined = {row["name"] for row in step.changed if "algorithm" in row}
    assert errors[1] <= errors[0] * 1.02 and refined


def arrays(outputs):
    if isinstance(outputs, dict):
        outputs = tuple(outputs.values())
    return [a for item in outputs for a in arrays(item)] if isinstance(outputs, tuple) else [outputs]


def test_a_tied_embedding_is_rounded_for_the_products_it_is_read_in():
    model, inputs = zoo_torch.CASES["tied"]()
    plan, step = plan_of(model, Quantize(Int(4), rounding=GPTQ()), [inputs])
    assert any(row.get("algorithm") == "GPTQ" for row in step.changed) and plan.codes


@pytest.mark.parametrize("spec", [Percentile(99.0), MSE(), Entropy(), MovingAverage(0.5)], ids=repr)
def test_observers_clip_what_is_rare(residual, spec):
    model, batches, _ = residual
    wild = [batch.copy() for batch in batches]
    wild[0].flat[0] = 200.0
    widest, _ = plan_of(model, Quantize(), wild)
    found, _ = plan_of(model, Quantize(observer=spec), wild)
    least = 0.99 if isinstance(spec, MSE) else 0.9  # one value of 200 is dear where errors are squared
    assert found.values["input:0"].scale < least * widest.values["input:0"].scale
    assert found.values.keys() == widest.values.keys()


class Outliers(nn.Module):
    """A pre-norm layer pair whose norm has outlier channels that the next weights make up for."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.side, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(32, 8), nn.Linear(64, 8)
        size = torch.ones(32)
        size[[3, 17]] = 60.0
        with torch.no_grad():
            self.norm.weight.copy_(size)
            self.up.weight.div_(size)
            self.side.weight.div_(size)

    def forward(self, x):
        x = self.norm(x)
        return self.down(F.relu(self.up(x))) + self.side(x)


@pytest.fixture(scope="module")
def outliers():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Outliers().eval()
    return model, [zoo_torch.normal(8, 10, 32, seed=seed) for seed in range(3)], zoo_torch.normal(16, 10, 32, seed=9)


def test_smoothquant_saves_activations_with_outliers(outliers):
    assert db(outliers[0], Quantize(equalize=SmoothQuant()), *outliers[1:]) > db(outliers[0], Quantize(), *outliers[1:]) + 6


def test_awq_saves_weights_alone(outliers):
    plain, aware = (Quantize(Int(3), None, equalize=how) for how in (None, AWQ()))
    assert db(outliers[0], aware, *outliers[1:]) > db(outliers[0], plain, *outliers[1:]) + 1


def test_equalized_parameters_are_in_the_plan_and_exported(outliers, tmp_path):
    model, batches, test = outliers
    made = whet.quantize(model, Quantize(equalize=SmoothQuant()), calibration=batches, target="onnxruntime", progress=False)
    assert {"norm.weight", "norm.bias", "up.weight", "side.weight"} <= set(made.plan.tensors)
    rows = {row["name"]: row.get("equalized") for row in made.steps[-1].changed}
    assert rows["up.weight"] == rows["side.weight"] == "SmoothQuant"
    made.export(tmp_path / "model.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    outputs, simulated = session.run(None, {session.get_inputs()[0].name: test})[0], predict(made.model, test)
    np.testing.assert_allclose(outputs, simulated, atol=np.abs(simulated).max() * 0.03)


class Unequal(nn.Module):
    """Convolutions whose channels differ in size by orders of magnitude, a depthwise one among them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
        size = torch.logspace(-1.5, 1.5, 8)
        with torch.no_grad():
            self.a.weight.mul_(size[:, None, None, None])
            self.a.bias.mul_(size)
            self.c.weight.div_(size[None, :, None, None])

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x))))).mean((2, 3))


def test_cross_layer_equalization_saves_scales_per_tensor():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Unequal().eval()
    batches, test = [zoo_torch.normal(16, 3, 10, 10)], zoo_torch.normal(32, 3, 10, 10, seed=5)
    spec = Quantize(Int(8, granularity=PerTensor()))
    equal = Quantize(Int(8, granularity=PerTensor()), equalize=CrossLayer())
    assert db(model, equal, batches, test) > db(model, spec, batches, test) + 6


@pytest.mark.parametrize("spec", [Int(4, granularity=PerGroup(8)), NF4(granularity=PerGroup(8))], ids=repr)
def test_weights_alone_in_groups_and_levels(outliers, spec):
    nearest, better = (Quantize(spec, None, rounding=rounding) for rounding in (Nearest(), GPTQ()))
    mix = np.random.default_rng(2).normal(size=(5, 32)).astype(np.float32)
    batches, test = [zoo_torch.normal(64, 4, 5, seed=s) @ mix + zoo_torch.normal(64, 4, 32, seed=s + 5) / 5 for s in (1, 2)]
    assert db(outliers[0], better, [batches], test) > db(outliers[0], nearest, [batches], test) + 0.5


def test_batch_norms_alone_correct_biases(residual):
    spec = Quantize(Int(3), correct_bias=BiasCorrection(analytic=True))
    plan, step = plan_of(residual[0], spec, residual[1])
    assert set(plan.tensors) and any("no batch norm" in row["reason"] for row in step.skipped)
    assert any(row.get("bias") == "analytic" for row in step.changed)


def test_weights_alone_need_data_only_where_an_algorithm_does(residual):
    model, batches, _ = residual
    for spec in (Quantize(Int(4, symmetric=False), None, weight_observer=HQQ()), Quantize(Int(4), None, equalize=CrossLayer())):
        quantize(model, spec, ORT, calibration=None, example=batches[0], progress=False)
    for spec in (Quantize(Int(4), None, rounding=GPTQ()), Quantize(Int(4), None, equalize=AWQ())):
        with pytest.raises(DataError, match=r"(GPTQ|AWQ) looks at what the layers compute"):
            quantize(model, spec, ORT, calibration=None, example=batches[0], progress=False)


def test_pruned_weights_stay_zero(residual):
    model, batches, _ = residual
    pruned = whet.prune(model, whet.Prune(0.6))
    made = whet.quantize(pruned, BEST, calibration=batches, target="onnxruntime", progress=False)
    own = dict(pruned.float_model.named_parameters())
    for name, codes in made.plan.codes.items():
        zeros = own[name].detach().numpy() == 0
        assert zeros.any() and np.all(codes[zeros] == 0) and np.any(codes)


def test_user_errors_in_a_forward_pass_are_told_as_such(residual):
    model, batches, _ = residual
    with pytest.raises(DataError, match="failed on inputs"):
        plan_of(model, BEST, [batches[0], np.zeros((4, 7, 8, 8), np.float32)])
