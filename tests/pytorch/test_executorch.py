"""ExecuTorch programs: written, run and read back by ExecuTorch itself."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import whet
from whet import errors
from whet.runtimes.content import check_integer, read_dtypes
from whet.runtimes.executorch_content import computed
from whet.runtimes.sessions import open_session

pytest.importorskip("executorch")
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(64, 3, 8, 8)).astype(np.float32)


class Net(nn.Module):
    """A residual sum, a strided slice that XNNPACK does not take, a global pool and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.head = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv1(x)))
        x = torch.relu(self.conv2(x) + x)[:, :, ::2, ::2]
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, *, a, b):
        h = torch.relu(self.left(a)) + b
        return {"features": h, "logits": self.head(h)}


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def answers(model, x):
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


@pytest.fixture(scope="module")
def made():
    return whet.quantize(seeded(Net), calibration=[IMAGES], target="executorch", example=IMAGES[:8], progress=False)


@pytest.fixture(scope="module")
def int8(made, tmp_path_factory):
    return made.export(tmp_path_factory.mktemp("pte") / "model.pte")


@pytest.fixture(scope="module")
def float32(tmp_path_factory):
    result = whet.prune(seeded(Net), whet.Prune(0.5), example=IMAGES[:2], progress=False)
    return result, result.export(tmp_path_factory.mktemp("pte") / "float.pte", "executorch")


@pytest.fixture(scope="module")
def linear():
    """The cheapest model to lower."""
    data = RNG.normal(size=(130, 4)).astype(np.float32)
    return whet.prune(seeded(lambda: nn.Sequential(nn.Linear(4, 3))), whet.Prune(0.25), example=data[:5], progress=False), data


def test_an_int8_file_computes_what_the_simulation_does(made, int8):
    session = open_session(int8, threads=1)
    simulated, exact = answers(made.model, IMAGES), answers(made.float_model, IMAGES)
    error = np.abs(session.run(IMAGES) - simulated)
    step = float(made.plan.values[max(made.plan.values)].scale)
    assert error.mean() < 0.5 * np.abs(exact - simulated).mean()
    assert error.max() < 6 * step + np.abs(simulated).max() / 20
    assert 0 < np.abs(exact - simulated).mean()


def test_every_layer_of_an_int8_file_is_delegated_in_integers(int8):
    assert check_integer(int8) == {"integer": 3, "float": 0}
    layers = [operation for operation in computed(int8) if operation.weight is not None]
    assert [(item.op, item.data, item.weight, item.bias, item.delegated) for item in layers] == [
        ("XNNConv2d", "int8", "int8", "int32", True),
        ("XNNConv2d", "int8", "int8", None, True),
        ("XNNFullyConnected", "int8", "int8", "int32", True),
    ]
    assert [item.channels for item in layers] == [8, 8, None]


def test_what_xnnpack_does_not_take_is_shown_as_a_portable_kernel(int8):
    types = read_dtypes(int8)
    assert types["computed"]["aten::slice_copy"] == {"float32": 2}
    assert types["computed"]["XNNAdd"] == {"int8": 1}
    assert types["computed"]["XNNGlobalAvgPooling2d"] == {"float32": 1}  # behind the slice
    portable = [item for item in computed(int8) if item.delegated is False]
    assert {item.op for item in portable} >= {"aten::slice_copy"}


def test_the_bytes_in_an_int8_file_are_those_of_the_plan(int8):
    stored = read_dtypes(int8)["stored"]
    assert stored["int8"] == 3 * 8 * 9 + 8 * 8 * 9 + 8 * 5
    assert stored["int32"] == 4 * (8 + 5)
    assert stored["float32"] == 4 * (8 + 8 + 5 + 8 + 5)  # one scale per channel of weights and of biases


def test_the_codes_in_the_file_are_the_plans(made, int8):
    """Every weight is found as bytes, in XNNPACK's channels-last order."""
    content = int8.read_bytes()
    for name, weight in made.convert().state_dict().items():
        if weight.dtype == torch.int8:
            order = weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight
            assert order.contiguous().numpy().tobytes() in content, name


def test_any_batch_size_up_to_64_runs_and_larger_data_is_cut(int8):
    session = open_session(int8, threads=1)
    assert session.largest_batch == 64 and session.fixed_batch is None
    many = np.concatenate([IMAGES] * 3)[:150]
    together = session.run(many)
    assert together.shape == (150, 5)
    np.testing.assert_array_equal(together[:64], session.run(IMAGES))
    np.testing.assert_array_equal(together[149:150], session.run(many[149:150]))
    with pytest.raises(errors.RuntimeFileError, match=r"batches of at most 64, got 150.*dynamic="):
        session.prepare(many)


def test_a_float_file_is_exact_and_says_how_it_runs(float32):
    result, path = float32
    session = open_session(path, threads=1)
    np.testing.assert_allclose(session.run(IMAGES), answers(result.model, IMAGES), atol=1e-5)
    assert session.runtime["name"] == "executorch" and "XnnpackBackend" in session.runtime["kernels"]
    assert "not settable" in session.runtime["threads"]
    assert set(read_dtypes(path)["stored"]) == {"float32"}
    with pytest.raises(errors.ExportError, match="should compute in integers"):
        check_integer(path)


def test_named_inputs_and_outputs_keep_their_names(tmp_path):
    data = [{"a": RNG.normal(size=(16, 4)).astype(np.float32), "b": RNG.normal(size=(16, 8)).astype(np.float32)}]
    model = seeded(Named)
    made = whet.quantize(model, calibration=data, target="executorch", example=data[0], progress=False)
    session = open_session(made.export(tmp_path / "named.pte"), threads=1)
    assert [slot.name for slot in session.inputs] == ["a", "b"] and [slot.name for slot in session.outputs] == [
        "features",
        "logits",
    ]
    features, logits = session.run({"b": data[0]["b"], "a": data[0]["a"]})
    with torch.no_grad():
        expected = made.model(**{key: torch.from_numpy(value) for key, value in data[0].items()})
    assert features.shape == (16, 8) and np.abs(logits - expected["logits"].numpy()).max() < 0.1
    with pytest.raises(errors.RuntimeFileError, match=r"takes the inputs 'a' .*'b'"):
        session.run({"a": data[0]["a"], "c": data[0]["b"]})


def test_fixed_shapes_and_a_larger_batch_by_request(linear, tmp_path):
    result, data = linear
    fixed = open_session(result.export(tmp_path / "fixed.pte", "executorch", dynamic=False), threads=1)
    assert fixed.fixed_batch == 5
    np.testing.assert_allclose(fixed.run(data), answers(result.model, data), atol=1e-5)
    path = result.export(tmp_path / "large.pte", "executorch", dynamic={"input:0": {0: ("batch", 130)}})
    large = open_session(path, threads=1)
    assert large.largest_batch == 130
    large.prepare(data)
    np.testing.assert_allclose(large.run(data), answers(result.model, data), atol=1e-5)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "garbage", "header"])
def test_a_file_that_is_none_is_one_clear_error(int8, tmp_path, damage):
    content = int8.read_bytes()
    bad = {
        "truncated": content[:3000],
        "foreign": b"PK\x03\x04 not a program",
        "garbage": content[:8] + bytes(range(256)) * 40,
        "header": content[:8],
    }[damage]
    path = tmp_path / "bad.pte"
    path.write_bytes(bad)
    for use in (lambda: open_session(path), lambda: read_dtypes(path)):
        with pytest.raises(errors.RuntimeFileError, match=r"bad\.pte"):
            use()


def test_native_chatter_stays_away(linear, tmp_path, capfd):
    result, data = linear
    open_session(result.export(tmp_path / "quiet.pte", "executorch"), threads=1).run(data)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_an_operator_without_a_kernel_is_named_and_nothing_is_left(tmp_path):
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.linalg.svdvals(x @ x.transpose(1, 2)))

    x = RNG.normal(size=(6, 4, 4)).astype(np.float32)
    result = whet.prune(seeded(Spectrum), whet.Prune(0.25), example=x, progress=False)
    with pytest.raises(errors.ExportError, match=r"lacks .*aten::linalg_svd|aten::.*svd"):
        result.export(tmp_path / "none.pte", "executorch")
    assert list(tmp_path.iterdir()) == []


def test_weights_alone_are_refused_as_integers_and_taken_in_16_bits(tmp_path):
    data = RNG.normal(size=(16, 4)).astype(np.float32)
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3)))
    given = {"target": "executorch", "example": data, "progress": False}
    alone = whet.quantize(model, whet.Quantize(whet.Int(8), activations=None), **given)
    with pytest.raises(errors.ExportError, match="integer weights only beside integer activations"):
        alone.export(tmp_path / "alone.pte")
    half = whet.quantize(model, whet.Quantize(whet.Float("float16"), None), **given)
    path = half.export(tmp_path / "half.pte")
    assert read_dtypes(path)["stored"]["float16"] == 2 * 4 * 3
    np.testing.assert_allclose(open_session(path, threads=1).run(data), answers(half.model, data), atol=1e-4)


def test_the_original_is_untouched(made):
    model = seeded(Net)
    before = copy.deepcopy(model.state_dict())
    whet.quantize(model, calibration=[IMAGES], target="executorch", example=IMAGES[:8], progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
