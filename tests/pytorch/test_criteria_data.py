"""Criteria that look at data: what they see of a PyTorch model, and what they choose."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import whet
from torch_parts import batches, seeded, small, state_of
from whet import NM, OBS, SNIP, Activation, Channel, Fisher, Global, Movement, Prune, SparseGPT, Taylor, UserCriterion, Wanda
from whet.data import Batches
from whet.errors import SpecError
from whet.numerics.criteria import weight_importance
from whet.numerics.namespace import numpy_namespace as xp
from whet.torch.importance import statistics_for
from whet.torch.inputs import InputReader

QUIET = {"progress": False}


def rows(n=64, width=8, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32) * np.float32(np.arange(1, width + 1))


def test_the_inputs_of_every_kind_of_layer_make_its_output() -> None:
    """`E|W x|²` by the sums must be the mean square of what the layer computes: columns, groups and layout agree."""
    layers = {
        "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), (3, 4, 7, 7)),
        "depthwise": (nn.Conv1d(4, 8, 3, groups=4, bias=False), (3, 4, 9)),
        "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), (3, 4, 5, 5)),
        "linear": (nn.Linear(8, 5, bias=False), (3, 2, 8)),
    }
    for name, (layer, shape) in layers.items():
        x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        found = InputReader(nn.Sequential(layer), Batches([x]), 8).sums(["0.weight"], True)["0.weight"]
        matrices = found.layout.matrices(layer.weight.detach().double().numpy())
        second = found.hessians() / 2
        mean = np.einsum("grc,gcd,grd->gr", matrices, second, matrices).ravel()
        out = layer(torch.from_numpy(x)).detach().double().numpy()
        axes = (0, 1) if name == "linear" else (0, *range(2, out.ndim))
        np.testing.assert_allclose(mean, np.mean(out**2, axes), rtol=1e-5, err_msg=name)
        assert found.norms().shape == tuple(layer.weight.shape)


def test_wanda_by_hand() -> None:
    model, x = nn.Sequential(nn.Linear(8, 3, bias=False)), rows()
    made = whet.prune(model, Prune(0.5, criterion=Wanda()), train=x, **QUIET)
    scores = np.abs(model[0].weight.detach().numpy()) * np.sqrt(np.mean(x.astype(np.float64) ** 2, 0))
    expected = np.argsort(np.argsort(scores, axis=1), axis=1) >= 4
    np.testing.assert_array_equal(made.masks["0.weight"], expected)
    plain = whet.prune(model, Prune(0.5), **QUIET)
    assert (made.masks["0.weight"] != plain.masks["0.weight"]).any()


def test_snip_is_taylor_of_one_batch_and_fisher_squares() -> None:
    model, data = small(), list(batches())
    options = {"allocation": Global()}
    snip = whet.prune(model, Prune(0.5, criterion=SNIP(), **options), train=data, **QUIET)
    taylor = whet.prune(model, Prune(0.5, criterion=Taylor(batches=1), **options), train=data, **QUIET)
    fisher = whet.prune(model, Prune(0.5, criterion=Fisher(batches=1), **options), train=data, **QUIET)
    assert all(np.array_equal(snip.masks[name], taylor.masks[name]) for name in snip.masks)
    assert all(np.array_equal(snip.masks[name], fisher.masks[name]) for name in snip.masks)  # ½(wg)² ranks as |wg|
    more = whet.prune(model, Prune(0.5, criterion=Fisher(), **options), train=data, **QUIET)
    assert any((more.masks[name] != fisher.masks[name]).any() for name in more.masks)  # E[g²] is not E[g]²


def signed(weight, gradient):
    return -weight * gradient


def test_movement_at_once_is_one_step_of_sgd() -> None:
    model, data = small(), list(batches())
    made = whet.prune(model, Prune(0.4, criterion=Movement()), train=data, **QUIET)
    other = whet.prune(model, Prune(0.4, criterion=UserCriterion(signed)), train=data, **QUIET)
    assert all(np.array_equal(made.masks[name], other.masks[name]) for name in made.masks)


def test_the_users_loss_is_not_needed_for_inputs_and_targets_are_not() -> None:
    unlabelled = [x for x, _ in batches()]
    for criterion in (Wanda(), Activation(), OBS(), SparseGPT()):
        made = whet.prune(small(), Prune(0.5, criterion=criterion), train=unlabelled, **QUIET)
        assert all((mask == 0).mean() == 0.5 for mask in made.masks.values())


def test_activation_removes_the_channels_that_are_nearly_silent() -> None:
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    )
    with torch.no_grad():
        model[0].bias[[1, 4, 6]] = -50.0  # never on
        model[0].weight[[1, 4, 6]] *= 5  # but with large weights
    spec = Prune(3 / 8, granularity=Channel(), round_to=1, criterion=Activation(), include="0")
    made = whet.prune(model, spec, train=[x for x, _ in batches()], **QUIET)
    np.testing.assert_array_equal(made.model[0].weight.detach(), model[0].weight.detach()[[0, 2, 3, 5, 7]])


@pytest.mark.parametrize(
    "criterion", [Taylor(), SNIP(), Fisher(), Movement(), Wanda(), OBS(), Activation()], ids=lambda c: type(c).__name__
)
def test_every_criterion_removes_the_neurons_of_least_score(criterion) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)))
    data = (rows(), np.random.default_rng(3).integers(0, 3, 64))
    found = {n: t.numpy() for n, t in statistics_for(model, criterion, Batches(data)).items()}
    scores = {
        n: weight_importance(criterion, model.get_parameter(n).detach().numpy(), found[n], xp=xp)
        for n in ("0.weight", "2.weight")
    }
    if isinstance(criterion, Activation):
        total = (found["2.weight"] ** 2).mean(0)
    else:
        total = scores["0.weight"].sum(1) + scores["2.weight"].sum(0)
    left = np.sort(np.argsort(total, kind="stable")[3:])
    made = whet.prune(model, Prune(0.5, granularity=Channel(), round_to=1, criterion=criterion), train=data, **QUIET)
    np.testing.assert_array_equal(made.model[0].weight.detach(), model[0].weight.detach()[left])


def output_error(model, made, x):
    with torch.no_grad():
        return float(((model(x) - made.model(x)) ** 2).mean())


def correlated(n=512, seed=0):
    mix = np.random.default_rng(9).normal(size=(12, 8 * 36)).astype(np.float32)
    return (np.random.default_rng(seed).normal(size=(n, 12)).astype(np.float32) @ mix).reshape(n, 8, 6, 6)


@pytest.mark.parametrize("pattern", [{"sparsity": 0.6}, {"granularity": NM(2, 4)}])
def test_sparsegpt_loses_less_than_magnitude_and_changes_what_remains(pattern) -> None:
    def build():
        return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

    model, x = seeded(build).eval(), correlated()
    before = state_of(model)
    made = whet.prune(model, Prune(criterion=SparseGPT(), **pattern), train=x, **QUIET)
    plain = whet.prune(model, Prune(**pattern), train=x, **QUIET)
    obs = whet.prune(model, Prune(criterion=OBS(), **pattern), train=x, **QUIET)
    fresh = torch.from_numpy(correlated(seed=1))
    assert output_error(model, made, fresh) < 0.7 * output_error(model, plain, fresh)  # 0.63 and 0.48
    assert output_error(model, made, fresh) < output_error(model, obs, fresh)
    for name, mask in made.masks.items():
        weight = made.model.get_parameter(name).detach().numpy()
        assert (
            not weight[mask == 0].any() and (weight[mask == 1] != model.get_parameter(name).detach().numpy()[mask == 1]).any()
        )
        if "sparsity" in pattern:
            assert (mask == 0).sum() == round(0.6 * mask.size)
        else:
            assert (np.moveaxis(mask, 1, -1).reshape(-1, 4).sum(1) == 2).all()  # along the inputs, not along the kernel
    assert all(torch.equal(before[name], value) for name, value in state_of(model).items())


def test_sparsegpt_keeps_what_was_removed_before() -> None:
    x = [x for x, _ in batches()]
    first = whet.prune(small(), Prune(0.3), train=x, **QUIET)
    made = whet.prune(first, Prune(0.5, criterion=SparseGPT()), train=x, **QUIET)
    for name, mask in made.masks.items():
        assert not mask[first.masks[name] == 0].any() and (mask == 0).sum() == round(0.5 * mask.size)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(0, 100))
def test_sums_over_many_calls_are_those_over_all_rows(parts, seed) -> None:
    x = rows(n=8 * parts, seed=seed)
    model = nn.Sequential(nn.Linear(8, 2))
    one = InputReader(model, Batches([x]), 8).sums(["0.weight"], True)["0.weight"]
    many = InputReader(model, Batches(list(np.split(x, parts))), 8).sums(["0.weight"], True)["0.weight"]
    assert one.count == many.count == len(x)
    np.testing.assert_allclose(one.hessians(), many.hessians(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.diag(one.hessians()[0]) / 2, one.norms()[0] ** 2, rtol=1e-5)


def test_what_cannot_be_seen_or_is_missing_is_named() -> None:
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    x = np.zeros((4, 3, 8), np.float32) + 1
    with pytest.raises(SpecError, match="Wanda looks at the inputs of convolutions and linear layers"):
        whet.prune(Recurrent(), Prune(0.5, criterion=Wanda()), train=x, **QUIET)
    with pytest.raises(SpecError, match=r"SparseGPT sees no input of 'lstm.weight_ih_l0'"):
        whet.prune(Recurrent(), Prune(0.5, criterion=SparseGPT()), train=x, **QUIET)
    made = whet.prune(Recurrent(), Prune(0.5, criterion=Wanda(), keep="lstm"), train=x, **QUIET)
    assert set(made.masks) == {"head.weight"}
    with pytest.raises(SpecError, match="SparseGPT looks at the inputs of layers: pass batches as train="):
        whet.prune(small(), Prune(0.5, criterion=SparseGPT()), **QUIET)
