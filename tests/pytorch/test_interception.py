"""Interception: sites are named, nothing is left behind, and copies, pickles, threads and errors are safe."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet.data import Batches
from whet.specs import TARGETS, Quantize
from whet.torch import interception as under_test
from whet.torch import predict, quantize, simulate
from whet.torch.interception import Interceptor, interceptor_of
from whet.torch.model import to_tensors
from zoo_torch import CASES, Demo, Residual, normal

ORT = TARGETS["onnxruntime"]


class Recorder(Interceptor):
    """Notes every site."""

    def __init__(self, model):
        super().__init__(model)
        self.sites = []

    def after(self, session, call, site, result):
        self.sites.append(site)
        return result


def simulated(name="demo"):
    model, inputs = CASES[name]()
    plan, _ = quantize(model, Quantize(), ORT, calibration=Batches(inputs), example=inputs, progress=False)
    return simulate(model, plan), inputs


def no_session_is_open():
    return not getattr(under_test._local, "sessions", {})


def test_sites_bear_module_path_function_and_index():
    model = Demo().eval()
    recorder = Recorder(model)
    model(torch.zeros(2, 1, 8, 8))
    assert recorder.sites == [
        "conv1/conv2d:0",
        "/relu:0",
        "conv2/conv2d:0",
        "/relu:1",
        "/flatten:0",
        "fc1/linear:0",
        "/relu:2",
        "fc2/linear:0",
    ]


def test_the_second_call_of_a_module_is_another_site():
    model, inputs = CASES["twice"]()
    recorder = Recorder(model)
    model(to_tensors(inputs, "cpu"))
    assert [site for site in recorder.sites if site.startswith("shared")] == ["shared/conv2d:0", "shared@1/conv2d:0"]


def test_integer_operations_are_no_sites():
    class Masked(nn.Module):
        def forward(self, x, ids):
            mask = (ids + 1) * 2 > 4
            return torch.add(x, 1.0) * mask

    model = Masked()
    recorder = Recorder(model)
    model(torch.ones(3), torch.arange(3))
    assert recorder.sites == ["/add:0", "/mul:0"]


def test_hooks_add_no_module_parameter_or_key():
    model = Demo()
    keys, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    Recorder(model)
    assert list(model.state_dict()) == keys and [name for name, _ in model.named_modules()] == modules


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_rounds_by_itself(duplicate):
    model, inputs = simulated()
    twin = duplicate(model)
    assert np.array_equal(predict(twin, inputs), predict(model, inputs))
    assert interceptor_of(twin) is not interceptor_of(model) and interceptor_of(twin).model is twin
    twin.fc2.weight.data.zero_()
    assert not np.array_equal(predict(twin, inputs), predict(model, inputs))


def test_an_error_in_forward_closes_the_session():
    model, inputs = simulated()
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 3, 8, 8))
    assert no_session_is_open()
    assert np.isfinite(predict(model, inputs)).all()


def test_an_error_caught_by_the_model_leaves_its_sites_right():
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad, self.good = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, x):
            try:
                return self.bad(x)
            except RuntimeError:
                return self.good(x)

    model = Tries()
    recorder = Recorder(model)
    model(torch.zeros(2, 4))
    assert recorder.sites[-1] == "good/linear:0" and no_session_is_open()


def test_threads_do_not_meet():
    model, _ = simulated("residual")
    batches = [to_tensors(normal(4, 3, 8, 8, seed=seed), "cpu") for seed in range(6)]
    with torch.no_grad():
        alone = [model(batch) for batch in batches]
    found: dict[int, torch.Tensor] = {}

    def work(index):
        with torch.no_grad():
            for _ in range(5):
                found[index] = model(batches[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(found[index], alone[index]) for index in range(6))


def test_gradients_under_reentrant_checkpointing_are_exact():
    model, inputs = simulated("residual")
    x = to_tensors(inputs, "cpu")

    def gradients(forward):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        forward(leaf).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients(model)
    again = gradients(lambda leaf: torch.utils.checkpoint.checkpoint(model, leaf, use_reentrant=True))
    assert len(plain) > 4 and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_in_place_operations_hand_on_the_rounded_value():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x):
            x = self.conv1(x)
            F.relu_(x)  # the result is not used: x itself must be the rounded value from here on
            return self.conv2(x)

    torch.manual_seed(0)
    model, inputs = InPlace().eval(), normal(8, 1, 8, 8)
    plan, _ = quantize(model, Quantize(), ORT, calibration=Batches(inputs), example=inputs, progress=False)
    rounded = simulate(model, plan)
    seen = []
    rounded.conv2.register_forward_pre_hook(lambda module, args: None)
    weight = rounded.conv2.weight.detach()
    bias = rounded.conv2.bias.detach()
    with torch.no_grad():
        x = simulate(model, plan)
        hidden = torch.relu(
            F.conv2d(_on_lattice(to_tensors(inputs, "cpu"), plan.values["input:0"]), x.conv1.weight, x.conv1.bias)
        )
        hidden = _on_lattice(hidden, plan.values["/relu_:0"])
        expected = _on_lattice(F.conv2d(hidden, weight, bias), plan.values["conv2/conv2d:0"])
        seen.append(rounded(to_tensors(inputs, "cpu")))
    assert torch.equal(seen[0], expected)


def _on_lattice(x, params):
    scale, zero_point = float(params.scale), float(params.zero_point)
    return (torch.clamp(torch.round(x / scale) + zero_point, 0, 255) - zero_point) * scale


def test_any_batch_size():
    model, inputs = simulated("residual")
    whole = predict(model, inputs)
    parts = np.concatenate([predict(model, inputs[:1]), predict(model, inputs[1:6]), predict(model, inputs[6:])])
    assert np.allclose(whole, parts, atol=float(np.abs(whole).max()) / 100)


def test_a_model_is_its_own_forward_hook_host():
    model = Residual().eval()
    calls = []
    model.conv1.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    Recorder(model)
    model(torch.zeros(2, 3, 8, 8))
    assert calls == [(2, 8, 8, 8)]


def test_a_compiled_simulation_gives_the_same_numbers():
    model, inputs = simulated("residual")
    x = to_tensors(inputs, "cpu")
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(torch.compile(model, backend="eager")(x), expected)
