"""`Reconstruct()`: what stays after a removal makes up for it, in both frameworks alike."""

from dataclasses import replace

import numpy as np
import pytest

import whet
from residual_models import build, data_of
from whet import BySensitivity, Channel, Group, Head, Layer, Prune, Recipe, Reconstruct
from whet.errors import DataError, SpecError

QUIET = {"progress": False}
HALF = Prune(0.5, granularity=Channel(), round_to=1)
SOLVED = Prune(0.5, granularity=Channel(), round_to=1, reconstruct=Reconstruct())
RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.normal(size=(6, 12)), RNG.normal(size=(12, 5))
FIRST[:, 6:] = FIRST[:, :6]  # every hidden unit has a twin, so that half of them can leave without any loss
INPUTS = RNG.normal(size=(64, 6)).astype(np.float32)


@pytest.fixture(params=("torch", "keras"))
def framework(request):
    return request.param


def twins(framework):
    """Two dense layers with FIRST and SECOND."""
    if framework == "torch":
        import torch

        model = torch.nn.Sequential(torch.nn.Linear(6, 12, bias=False), torch.nn.ReLU(), torch.nn.Linear(12, 5))
        with torch.no_grad():
            model[0].weight.copy_(torch.from_numpy(FIRST.T))
            model[2].weight.copy_(torch.from_numpy(SECOND.T))
            model[2].bias.fill_(0.5)
        return model
    import keras

    layers = keras.layers
    model = keras.Sequential([keras.Input((6,)), layers.Dense(12, "relu", use_bias=False, name="a"), layers.Dense(5, name="b")])
    model.layers[0].set_weights([FIRST])
    model.layers[1].set_weights([SECOND, np.full(5, 0.5)])
    return model


def second_half(framework):
    """That the units 6 to 11 leave."""
    tensor, axis = ("0.weight", 0) if framework == "torch" else ("a/kernel", 1)
    return Group({tensor: {axis: tuple(range(6, 12))}}, coupled=True)


def lively(framework):
    """A residual network whose batch norms have statistics and factors of their own, the same in both frameworks."""
    model, rng = build(framework), np.random.default_rng(3)
    if framework == "torch":
        import torch

        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        names = ("weight", "bias", "running_mean", "running_var")
    else:
        norms = [layer for layer in model.layers if type(layer).__name__ == "BatchNormalization"]
        names = ("gamma", "beta", "moving_mean", "moving_variance")
    for norm in norms:
        for name, positive in zip(names, (True, False, False, True), strict=True):
            held = getattr(norm, name)
            size = int(held.shape[0])
            values = (rng.uniform(0.5, 1.5, size) if positive else rng.normal(0, 0.3, size)).astype(np.float32)
            held.data.copy_(torch.from_numpy(values)) if framework == "torch" else held.assign(values)
    return model


def off(made, reference, inputs):
    """The error of the outputs, of their variance."""
    found = made.side.predict(made.model, inputs)
    return float(np.mean((found - reference) ** 2) / np.var(reference))


def test_units_that_others_can_stand_in_for_leave_without_loss(framework):
    model = twins(framework)
    made = {
        rec: whet.prune(model, Prune(granularity=second_half(framework), reconstruct=rec), train=INPUTS, **QUIET)
        for rec in (None, Reconstruct(damping=0.0))
    }
    plain, solved = made.values()
    reference = plain.side.predict(model, INPUTS)
    assert off(plain, reference, INPUTS) > 0.1
    assert off(solved, reference, INPUTS) < 5e-3  # the rest is the damping, of columns over rows
    (row,) = solved.steps[0].removal["reconstructed"]["layers"]
    assert row["output_db"] > 25 > 10 > row["silenced_db"]


def test_a_network_comes_nearer_on_images_it_has_not_seen(framework):
    model, seen, other = lively(framework), data_of(framework, 64), data_of(framework, 64, seed=1)[0]
    plain, solved = (whet.prune(model, spec, train=[seen], **QUIET) for spec in (HALF, SOLVED))
    reference = plain.side.predict(model, other)
    assert off(solved, reference, other) < 0.25 * off(plain, reference, other)
    assert all(row["output_db"] > row["silenced_db"] for row in solved.steps[0].removal["reconstructed"]["layers"])
    assert solved.steps[0].removal["oracle"] < 1e-4


def test_both_frameworks_find_the_same():
    made = {}
    for framework in ("torch", "keras"):
        model = twins(framework)
        half = Prune(granularity=second_half(framework), reconstruct=Reconstruct(batches=2))
        made[framework] = whet.prune(model, half, train=[INPUTS[:32], INPUTS[32:]], **QUIET)
    one, two = (found.side.predict(found.model, INPUTS) for found in made.values())
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def test_in_training_batch_norms_give_about_what_they_give_after():
    import torch

    x = torch.from_numpy(data_of("torch", 64)[0])
    model = lively("torch")
    model.train()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.momentum = None
    model(x)  # statistics of these images, as of a trained network
    model.eval()
    made = whet.prune(model, SOLVED, train=[(x.numpy(), np.zeros(64, int))], **QUIET).model
    with torch.no_grad():
        after, during = made(x), made.train()(x)
    assert float((after - during).square().mean() / after.var()) < 0.02


def test_weights_in_front_of_batch_norms_keep_their_size():
    model = lively("torch")
    before = model.first[0].conv2.weight.detach()
    made = whet.prune(
        model, Prune(0.5, granularity=Channel(), round_to=1, include=("first.0.conv1",)), example=data_of("torch")[0], **QUIET
    )
    solved = whet.prune(
        model,
        Prune(0.5, granularity=Channel(), round_to=1, include=("first.0.conv1",), reconstruct=Reconstruct()),
        train=[data_of("torch")],
        **QUIET,
    )
    sizes = [m.model.first[0].conv2.weight.detach().flatten(1).norm(dim=1) for m in (made, solved)]
    np.testing.assert_allclose(sizes[0], sizes[1], rtol=1e-5)
    assert not np.allclose(made.model.first[0].conv2.weight.detach(), solved.model.first[0].conv2.weight.detach())
    assert before.shape[1] == 2 * solved.model.first[0].conv2.weight.shape[1]


def test_masked_weights_and_bare_batch_norms_stay_and_are_listed(framework):
    model = lively(framework)
    masked = whet.prune(model, Prune(0.3, include=("head" if framework == "torch" else "dense*",)), **QUIET)
    (name,) = masked.masks
    made = whet.prune(masked, SOLVED, train=[data_of(framework)], **QUIET)
    skipped = made.steps[-1].removal["reconstructed"]["skipped"]
    assert [row["reason"] for row in skipped] == ["it has a mask, which holds single weights at zero"]
    assert name not in [row["name"] for row in made.steps[-1].removal["reconstructed"]["layers"]]
    if framework == "torch":
        weight, mask = made.model.head.weight.detach().numpy(), made.masks[name]
        assert mask.shape == weight.shape and not weight[mask == 0].any()


def test_an_optimizer_goes_on_with_the_weights_that_were_solved():
    import torch

    model, x = lively("torch"), data_of("torch")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    from whet.data import Batches

    small, _, _ = whet.torch.remove(model, SOLVED, example=x[0], data=Batches([x]), optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in small.parameters()}
    before = [p.detach().clone() for p in small.parameters()]
    small.train()(torch.from_numpy(x[0])).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True) if b.grad.any())


def test_a_removal_that_fails_leaves_the_model_as_it_was(monkeypatch):
    from whet.data import Batches
    from whet.errors import ModelError
    from whet.torch import removal

    def fail(self, gone):
        raise ModelError("no")

    model, x = lively("torch"), data_of("torch")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(removal.Surgeon, "remove", fail)
    with pytest.raises(ModelError, match="no"):
        whet.torch.remove(model, SOLVED, example=x[0], data=Batches([x]))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_heads_are_made_up_for_too(framework):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 6, 16)).astype(np.float32)
    if framework == "torch":
        import torch

        from zoo_torch_models import FusedQkv

        torch.manual_seed(0)
        model = FusedQkv().eval()
    else:
        import keras

        keras.utils.set_random_seed(0)
        given = keras.Input((6, 16))
        y = keras.layers.Add()([given, keras.layers.MultiHeadAttention(4, 4)(given, given)])
        model = keras.Model(given, keras.layers.Dense(16)(keras.layers.Dense(32, "relu")(y)))
    kind = "graph" if framework == "torch" else None  # whose code fixes the width of its heads together
    plain, solved = (
        whet.prune(model, Prune(0.5, granularity=Head(), rebuild=kind, reconstruct=rec), train=x, **QUIET)
        for rec in (None, Reconstruct())
    )
    reference = plain.side.predict(model, x)
    assert off(solved, reference, x) < off(plain, reference, x)


def test_channels_chosen_by_sensitivity_are_made_up_for_too(framework):
    model, x = lively(framework), data_of(framework, 32)
    spec = Prune(0.5, granularity=Channel(), round_to=2, allocation=BySensitivity(trials=1, batches=1))
    plain, solved = (whet.prune(model, replace(spec, reconstruct=rec), train=[x], **QUIET) for rec in (None, Reconstruct()))
    reference = plain.side.predict(model, x[0])
    assert off(solved, reference, x[0]) < 0.25 * off(plain, reference, x[0])
    assert plain.steps[0].changed == solved.steps[0].changed and solved.steps[0].control["sensitivity"]


def test_the_rebuilt_graph_holds_the_solution():
    model, x = lively("torch"), data_of("torch", 32)
    own, graph = (whet.prune(model, replace(SOLVED, rebuild=kind), train=[x], **QUIET) for kind in (None, "graph"))
    one, two = (found.side.predict(found.model, x[0]) for found in (own, graph))
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)


def test_without_data_or_sense_it_is_refused(framework):
    model = build(framework)
    with pytest.raises(DataError, match="pass train="):
        whet.prune(model, SOLVED, example=data_of(framework)[0], **QUIET)
    with pytest.raises(SpecError, match="SparseGPT"):
        Prune(0.5, reconstruct=Reconstruct())
    with pytest.raises(SpecError, match="Layer"):
        Prune(granularity=Layer(1), reconstruct=Reconstruct())
    with pytest.raises(SpecError, match=r"batches.*0"):
        Reconstruct(batches=0)
    with pytest.raises(SpecError, match=r"Prune\.reconstruct"):
        Prune(0.5, granularity=Channel(), reconstruct=True)
    assert Recipe.from_yaml(Recipe([SOLVED]).to_yaml()) == Recipe([SOLVED])
