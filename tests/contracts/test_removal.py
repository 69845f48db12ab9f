"""Every way of removing structures, in both frameworks, keeps every promise."""

import random

import numpy as np
import pytest

import whet
from residual_models import KERAS_BLOCKS, TORCH_BLOCKS, build, data_of
from whet import BySensitivity, Channel, Group, Layer, LossChange, Prune, Quantize, Reconstruct
from whet.runtimes.sessions import open_session

QUIET = {"progress": False}
TECHNIQUES = {
    "layers": Prune(granularity=Layer(2)),
    "loss": Prune(macs=0.7, granularity=Layer(), criterion=LossChange(greedy=True)),
    "channels": Prune(0.5, granularity=Channel(), round_to=1),
    "sensitivity": Prune(0.5, granularity=Channel(), round_to=2, allocation=BySensitivity(trials=1, batches=1)),
    "reconstructed": Prune(0.5, granularity=Channel(), round_to=1, reconstruct=Reconstruct(batches=1)),
    "group": Prune(granularity=Channel(), sparsity=0.5),  # its positions are named for each framework, see `spec_of`
}
VAIN = {
    "layers": Prune(granularity=Layer(1), keep=("*",)),
    "loss": Prune(macs=0.99, granularity=Layer(), criterion=LossChange(), include=("nothing",)),
    "channels": Prune(0.5, granularity=Channel(), keep=("*",)),
    "sensitivity": Prune(0.5, granularity=Channel(), allocation=BySensitivity(trials=1), keep=("*",)),
    "reconstructed": Prune(0.5, granularity=Channel(), keep=("*",), reconstruct=Reconstruct()),
    "group": Prune(granularity=Group({"stem.weight": {0: tuple(range(8))}, "stem/kernel": {3: tuple(range(8))}}, coupled=True)),
}
SUFFIX = {"torch": "onnx", "keras": "tflite"}


@pytest.fixture(params=("torch", "keras"))
def framework(request):
    return request.param


@pytest.fixture(params=TECHNIQUES)
def technique(request):
    return request.param


def spec_of(technique, model, framework):
    if technique != "group":
        return TECHNIQUES[technique]
    family = next(f for f in whet.groups(model, data_of(framework)[0]).families if not f.members[0].contracted)
    first = family.members[0]
    return Prune(granularity=Group({first.tensor: {first.axis: first.positions[:3].ravel().tolist()}}, coupled=True))


def run(technique, framework, model=None):
    model = build(framework) if model is None else model
    return whet.prune(model, spec_of(technique, model, framework), train=[data_of(framework)], **QUIET)


@pytest.fixture(scope="module")
def results():
    """Each technique's result in each framework, made once; nobody changes it."""
    return {}


@pytest.fixture
def result(technique, framework, results):
    key = technique, framework
    if key not in results:
        results[key] = run(technique, framework)
    return results[key]


def arrays(model, framework):
    if framework == "torch":
        return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
    return {f"{i} {v.path}": np.asarray(v) for i, v in enumerate(model.weights)}


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def outputs(compressed, framework, seed=5):
    return compressed.side.predict(compressed.model, data_of(framework, seed=seed)[0])


@pytest.mark.parametrize("technique", ["layers", "loss", "channels", "reconstructed", "group"], indirect=True)
def test_the_model_is_untouched_and_so_are_others_random_numbers(technique, framework, result):
    model = build(framework)
    before = arrays(model, framework)
    states = random.getstate(), np.random.get_state()[1].tolist()
    again = run(technique, framework, model)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    assert equal(arrays(model, framework), before)
    assert np.array_equal(outputs(again, framework), outputs(result, framework))


def test_fewer_weights_are_left_and_the_report_says_which(technique, framework, result):
    before, after = arrays(build(framework), framework), arrays(result.float_model, framework)
    assert sum(a.size for a in after.values()) < sum(a.size for a in before.values())
    (step,) = result.report.data["steps"]
    assert step["changed"] and all(row["removed"] > 0 and row["parameters"] > 0 for row in step["changed"])
    if technique in ("layers", "loss"):
        names = TORCH_BLOCKS if framework == "torch" else KERAS_BLOCKS
        told = step["control"]["layers"]
        assert [row["name"] for row in step["changed"]] == told["removed"] and set(told["importance"]) == set(names)
        assert told["after"]["macs"] < told["before"]["macs"]
        trainable = sum(row["parameters"] for row in step["changed"])
        assert told["before"]["parameters"] - told["after"]["parameters"] == trainable


@pytest.mark.parametrize("technique", ["layers", "reconstructed", "group"], indirect=True)
def test_it_saves_and_loads_the_same(technique, framework, result, tmp_path):
    folder = result.save(tmp_path / "saved")
    loaded = whet.load(folder, build(framework))
    assert np.array_equal(outputs(loaded, framework), outputs(result, framework)) and loaded.steps == result.steps


@pytest.mark.parametrize("technique", ["layers", "loss", "reconstructed", "group"], indirect=True)
def test_its_file_gives_what_it_gives(technique, framework, result, tmp_path):
    file = result.export(tmp_path / f"model.{SUFFIX[framework]}")
    found = open_session(file, threads=1).run(data_of(framework, seed=5)[0])
    assert np.abs(found - outputs(result, framework)).max() < 1e-4


@pytest.mark.parametrize("technique", ["layers", "reconstructed"], indirect=True)
def test_the_rest_can_still_be_quantized(technique, framework, result, tmp_path):
    made = whet.quantize(result, Quantize(), calibration=data_of(framework, 32)[0], **QUIET)
    signal, noise = outputs(result, framework), outputs(made, framework) - outputs(result, framework)
    assert np.sum(noise**2) < 0.02 * np.sum(signal**2)


def test_nothing_to_remove_is_an_error(technique, framework):
    with pytest.raises(whet.WhetError, match=r"nothing|no layer|no such parameter"):
        whet.prune(build(framework), VAIN[technique], train=[data_of(framework)], **QUIET)


@pytest.mark.parametrize("technique", ["layers", "sensitivity", "reconstructed"], indirect=True)
def test_half_precision_is_kept(technique, framework):
    if framework == "torch":
        model = build(framework).bfloat16()
        made = run(technique, framework, model)
        assert {str(p.dtype) for p in made.float_model.parameters()} == {"torch.bfloat16"}
        return
    import keras

    model = keras.models.clone_model(build(framework))
    half = keras.Model.from_config({**model.get_config()})
    for layer in half.layers:
        layer.dtype_policy = keras.DTypePolicy("mixed_float16")
    made = run(technique, framework, half)
    assert {layer.compute_dtype for layer in made.float_model.layers if layer.weights} == {"float16"}
