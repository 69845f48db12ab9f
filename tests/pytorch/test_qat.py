"""Quantization-aware training in PyTorch: begins at and ends in what is simulated and exported, in any training loop."""

import math

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import whet
import zoo_torch
from torch_parts import batches, examples, small, state_of
from torch_qat import ACTIVATIONS, LOW, loss_of, outputs_of, plan_of, prepared_zoo, train_a_little
from whet import torch as side
from whet.errors import DataError, ModelError, SpecError
from whet.graph.learning import into_bins
from whet.numerics.affine import QParams
from whet.specs import (
    GPTQ,
    NF4,
    QAT,
    BiasCorrection,
    CrossLayer,
    Distill,
    Dynamic,
    EarlyStopping,
    Int,
    PerGroup,
    PerTensor,
    Prune,
    Quantize,
    Train,
)
from whet.torch.fold import folded_weights
from whet.torch.interception import interceptor_of
from whet.torch.model import to_tensors


@pytest.mark.parametrize("name", sorted(zoo_torch.CASES))
def test_it_begins_at_the_simulation_learns_everything_and_ends_in_the_simulation(name):
    model, prepared, inputs = prepared_zoo(name)
    before = state_of(model)
    plan = interceptor_of(prepared).plan
    assert type(prepared) is type(model)
    assert torch.equal(outputs_of(prepared, inputs), outputs_of(side.simulate(model, plan), inputs))
    train_a_little(prepared, inputs)
    silent = [n for n, p in prepared.named_parameters() if p.requires_grad and p.grad is None and "branch" not in n]
    assert silent == [] or name in ("branching", "attention", "siamese")
    float_model, trained = side.finish(prepared)
    assert torch.equal(outputs_of(prepared, inputs), outputs_of(side.simulate(float_model, trained), inputs))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert float_model.state_dict().keys() == model.state_dict().keys() and interceptor_of(float_model) is None
    assert any(not np.array_equal(trained.weights[n].scale, plan.weights[n].scale) for n in plan.weights)
    assert {n: p.requires_grad for n, p in float_model.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("affine", [True, False])
def test_folding_the_result_again_gives_the_trained_weights_to_the_last_bit(affine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=affine), nn.BatchNorm2d(8, affine=affine), nn.ReLU()).eval()
    x = zoo_torch.normal(16, 3, 8, 8)
    prepared = side.prepare(model, LOW, calibration=[x], progress=False)
    train_a_little(prepared, torch.from_numpy(x))
    float_model, plan = side.finish(prepared)
    folded = folded_weights(float_model, dict(plan.folds))
    assert torch.equal(folded["0.weight"], prepared[0].weight) and torch.equal(folded["0.bias"], prepared[0].bias)
    stored = side.convert(prepared).state_dict()  # prepare, train, convert: without the plan in between
    codes = torch.from_numpy(plan.encode("0.weight", folded["0.weight"].detach().numpy()))
    assert stored["0.weight"].dtype == torch.int8 and torch.equal(stored["0.weight"].int(), codes)
    assert (float_model[0].bias is None) == (not affine) and prepared[0].bias.abs().min() > 0


def test_post_training_choices_are_where_it_begins():
    model, inputs = zoo_torch.CASES["residual"]()
    spec = Quantize(Int(4), ACTIVATIONS, rounding=GPTQ(), correct_bias=BiasCorrection(), equalize=CrossLayer(), qat=QAT())
    plan = plan_of(model, inputs, spec)
    assert plan.codes and plan.tensors
    prepared = side.prepare(model, spec, calibration=[inputs], progress=False)
    tensors = to_tensors(inputs, "cpu")
    assert torch.equal(outputs_of(prepared, tensors), outputs_of(side.simulate(model, plan), tensors))


def test_weights_are_moved_no_further_than_their_codes_need():
    array = np.float32([[0.04, 0.26, -3.0, 3.0]])
    params = QParams(np.float32([0.1]), np.zeros(1, np.int32), Int(4), 0)
    moved = into_bins(array, params, np.int32([[1, 3, -8, 7]]))
    np.testing.assert_allclose(moved, [[0.0501, 0.26, -3.0, 3.0]], rtol=1e-5)
    assert params.encode(moved).tolist() == [[1, 3, -8, 7]]


def test_the_exported_file_computes_what_the_prepared_model_does(tmp_path):
    _, prepared, inputs = prepared_zoo("residual")
    train_a_little(prepared, inputs, 3)
    made = whet.finish(prepared, example=inputs.numpy())
    assert made.is_simulated and made.target == "onnxruntime"
    file = made.export(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    np.testing.assert_allclose(found, outputs_of(prepared, inputs), atol=1e-5)
    made.save(tmp_path / "saved")
    again = whet.load(tmp_path / "saved", model=lambda: zoo_torch.CASES["residual"]()[0])
    assert torch.equal(outputs_of(again.model, inputs), outputs_of(made.model, inputs))


@pytest.mark.parametrize("scheme", [Int(4, granularity=PerGroup(4)), Int(4, symmetric=False), Int(8, granularity=PerTensor())])
def test_weights_alone_in_every_uniform_scheme(scheme):
    _, prepared, inputs = prepared_zoo("residual", Quantize(scheme, None, qat=QAT()))
    plan = interceptor_of(prepared).plan
    train_a_little(prepared, inputs)
    float_model, trained = side.finish(prepared)
    assert torch.equal(outputs_of(prepared, inputs), outputs_of(side.simulate(float_model, trained), inputs))
    assert all(trained.weights[n].scale.shape == plan.weights[n].scale.shape for n in plan.weights)


def test_sixteen_bit_models_train_in_float32():
    model, inputs = zoo_torch.CASES["residual"]()
    prepared = side.prepare(model.to(torch.bfloat16), LOW, calibration=[inputs], progress=False)
    assert all(p.dtype == torch.float32 for p in prepared.parameters())


def test_batches_of_any_size_and_layout():
    _, prepared, inputs = prepared_zoo("residual")
    prepared.train()
    whole = prepared(inputs)
    torch.testing.assert_close(torch.cat([prepared(inputs[i : i + 1]) for i in range(len(inputs))]), whole)
    loss_of(prepared(inputs[:1])).backward()
    grads = {n: p.grad.clone() for n, p in prepared.named_parameters() if p.requires_grad}
    prepared.zero_grad()
    loss_of(prepared.to(memory_format=torch.channels_last)(inputs[:1].to(memory_format=torch.channels_last))).backward()
    for name, p in prepared.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-5)


def test_batch_norms_that_cannot_be_folded_keep_their_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = zoo_torch.normal(16, 3, 8, 8)
    prepared = side.prepare(model, LOW, calibration=[x], progress=False)
    train_a_little(prepared, torch.from_numpy(x))
    assert torch.equal(prepared[0].running_mean, model[0].running_mean)
    assert prepared[0].weight.grad is not None and len(list(prepared.children())) == 5


def test_ranges_are_moving_averages_until_they_are_frozen():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    x = zoo_torch.normal(64, 4)
    spec = Quantize(Int(8), ACTIVATIONS, qat=QAT(observe=0.5))
    prepared = side.prepare(model, spec, calibration=[x], steps=4, progress=False).train()
    begin = float(prepared.quantize_input_0_low), float(prepared.quantize_input_0_high)
    plan = interceptor_of(prepared).plan
    assert begin[1] - begin[0] == pytest.approx(15 * float(plan.values["input:0"].scale))
    factor = prepared.quantize_input_0_factor
    for step, wide in enumerate((2.0, 3.0, 5.0, 7.0)):
        prepared.zero_grad()
        prepared(torch.from_numpy(x * wide)).square().sum().backward()
        assert (float(factor.grad) == 0) == (step < 2)
    low = 0.9 * (0.9 * begin[0] + 0.1 * 2 * x.min()) + 0.1 * 3 * x.min()
    assert float(prepared.quantize_input_0_low) == pytest.approx(low, rel=1e-5)
    assert float(prepared.quantize_input_0_seen) == 2
    prepared.eval()(torch.from_numpy(x * 9))
    assert float(prepared.quantize_input_0_low) == pytest.approx(low, rel=1e-5)
    _, trained = side.finish(prepared)
    ends = low, float(prepared.quantize_input_0_high)
    assert float(trained.values["input:0"].scale) == pytest.approx((ends[1] - ends[0]) / 15, rel=1e-5)


def test_without_learned_scales_the_plan_keeps_its_own():
    spec = Quantize(Int(3), ACTIVATIONS, qat=QAT(learn_scale=False))
    _, prepared, inputs = prepared_zoo("residual", spec)
    plan = interceptor_of(prepared).plan
    train_a_little(prepared, inputs)
    _, trained = side.finish(prepared)
    assert not any("factor" in name for name, _ in prepared.named_parameters())
    assert all(trained.values[v].scale == plan.values[v].scale for v in plan.values)


def test_the_verb_trains_what_is_exported_and_keeps_masks(tmp_path):
    x, y = examples(96)
    pruned = whet.prune(small(), Prune(0.5))
    spec = Quantize(Int(3), ACTIVATIONS, qat=QAT(epochs=6, learning_rate=0.01))
    before = whet.quantize(pruned, Quantize(Int(3), ACTIVATIONS), calibration=[x], progress=False)
    options = {"calibration": [x], "train": batches(), "val": batches(48, seed=1), "progress": False}
    made = whet.quantize(pruned, spec, fit=Train(weight_decay=0.01), **options)
    loss = {m: float(F.cross_entropy(outputs_of(m.model, torch.from_numpy(x)), torch.from_numpy(y))) for m in (before, made)}
    assert loss[made] < 0.8 * loss[before]
    assert len(made.steps) == 2 and len(made.steps[-1].train["history"]) == 6
    assert {row["algorithm"] for row in made.steps[-1].changed} == {"QAT"}
    assert made.steps[-1].train["history"][0]["sparsity"] == pytest.approx(0.5, abs=0.01)
    for name, mask in made.masks.items():
        weight = dict(made.float_model.named_parameters())[name].detach().numpy()
        assert not weight[mask == 0].any() and not made.plan.encode(name, weight)[mask == 0].any()
    session = onnxruntime.InferenceSession(str(made.export(tmp_path / "model.onnx")))
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(found, outputs_of(made.model, torch.from_numpy(x)), atol=1e-4)


def test_a_recipe_trains_with_the_original_as_teacher_and_waits_for_frozen_ranges():
    spec = Quantize(Int(4), qat=QAT(epochs=4, learning_rate=1e-3, teacher=True, observe=0.6))
    made = whet.compress(
        small(), train=batches(), val=batches(48, seed=1), recipe=[spec], budget=whet.Budget(max_drop=1.0), progress=False
    )
    (step,) = made.steps
    assert [row["eligible"] for row in step.train["history"]] == [False, False, True, True]
    assert step.train["stop"]["best_epoch"] > 2
    assert made.report.data["compressed"]["placement"]["quantized_weights"] == 2
    stopped = Train(early_stopping=EarlyStopping(patience=1), apply=[Distill()])
    again = whet.quantize(small(), spec, fit=stopped, calibration=[examples()[0]], train=batches(), progress=False)
    assert again.steps[-1].train["stop"]["epochs"] >= 3


def test_what_cannot_be_trained_is_said():
    x = examples()[0]
    with pytest.raises(DataError, match="needs train="):
        whet.quantize(small(), LOW, calibration=[x], progress=False)
    with pytest.raises(SpecError, match="qat=QAT"):
        whet.quantize(small(), Quantize(), fit=Train(), calibration=[x], progress=False)
    with pytest.raises(SpecError, match="Prune before"):
        whet.quantize(small(), LOW, fit=Train(apply=[Prune(0.5)]), calibration=[x], train=batches(), progress=False)
    with pytest.raises(SpecError, match=r"NF4.*Int"):
        side.prepare(small(), Quantize(NF4(), None, qat=QAT()), calibration=[x], progress=False)
    with pytest.raises(SpecError, match="Dynamic"):
        side.prepare(small(), Quantize(Int(8), Dynamic(), qat=QAT()), calibration=[x], progress=False)
    with pytest.raises(SpecError, match="steps="):
        side.prepare(small(), Quantize(qat=QAT(observe=0.5)), calibration=[x], progress=False)
    with pytest.raises(DataError, match="calibration= or example="):
        side.prepare(small(), LOW, progress=False)
    with pytest.raises(ModelError, match=r"whet\.torch\.prepare"):
        side.finish(small())
    with pytest.raises(ModelError, match="A mask is for"):
        side.prepare(small(), LOW, calibration=[x], masks={"nothing": np.ones(3)}, progress=False)


def test_a_model_that_diverged_is_refused():
    prepared = side.prepare(small(), LOW, calibration=[examples()[0]], progress=False)
    with torch.no_grad():
        prepared.head.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match=r"head\.weight.*Lower the learning rate"):
        side.finish(prepared)


def test_layers_with_more_bits_read_finer_values():
    spec = Quantize(Int(4), ACTIVATIONS, overrides={"conv": Int(8), "head": Int(6)})
    plan = plan_of(small(), examples()[0], spec)
    bits = {name: params.bits for name, params in plan.values.items()}
    read = {plan.biases[f"{layer}.bias"][0]: bits[plan.biases[f"{layer}.bias"][0]] for layer in ("conv", "head")}
    assert sorted(read.values()) == [6, 8] and bits["input:0"] == 8
    assert {params.bits for params in plan_of(small(), examples()[0], Quantize(Int(4), ACTIVATIONS)).values.values()} == {4}
