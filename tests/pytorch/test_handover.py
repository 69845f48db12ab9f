"""Masks from torch.nn.utils.prune and back; distributed, mixed-precision, compiled and copied training."""

import copy
import socket

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import whet
from torch_parts import batches, examples, seeded, small
from whet import Cubic, Distill, Prune, Quantize, Taylor, Train
from whet import torch as side
from whet.errors import ModelError
from whet.torch.prune import inside

QUIET = {"progress": False}
RAMP = Prune(0.75, schedule=Cubic(end=0.7, frequency=2))


def pruned_by_torch():
    model = small()
    torch_prune.l1_unstructured(model.conv, "weight", 0.5)
    torch_prune.random_unstructured(model.head, "weight", 0.25)
    torch_prune.l1_unstructured(model.head, "bias", 1)
    return model


def test_masks_are_taken_over_and_the_weights_are_ordinary_again() -> None:
    model, x = pruned_by_torch(), torch.from_numpy(examples(8)[0])
    before, parameter = model(x).detach(), model.conv.weight_orig
    expected = {"conv.weight": model.conv.weight_mask.numpy(), "head.weight": model.head.weight_mask.numpy()}
    masks = side.from_torch_prune_(model)
    assert set(masks) == set(expected) and all(np.array_equal(masks[name], mask) for name, mask in expected.items())
    assert all(mask.dtype == np.uint8 for mask in masks.values())
    assert set(dict(model.named_parameters())) == set(dict(small().named_parameters())) and model.conv.weight is parameter
    assert not model.conv._forward_pre_hooks and int((model.head.bias == 0).sum()) == 1
    assert torch.equal(model(x), before)
    assert side.from_torch_prune_(model) == {}


def test_masks_go_there_and_come_back() -> None:
    made = whet.prune(small(), Prune(0.6), **QUIET)
    model, x = made.model, torch.from_numpy(examples(8)[0])
    before = model(x).detach()
    side.to_torch_prune_(model, made.masks)
    assert torch_prune.is_pruned(model) and torch.equal(model(x), before)
    with torch.no_grad():
        model.conv.weight_orig.add_(1)  # training moves what lies under the mask
    model(x)
    np.testing.assert_array_equal(model.conv.weight.detach() != 0, made.masks["conv.weight"])
    torch_prune.l1_unstructured(model.conv, "weight", 0.5)  # and torch prunes on
    back = side.from_torch_prune_(model)
    assert np.array_equal(back["head.weight"], made.masks["head.weight"])
    assert not (back["conv.weight"] & ~made.masks["conv.weight"] & 1).any()
    with pytest.raises(ModelError, match=r"mask of shape \(2, 2\) for 'conv.weight', but the parameter has shape"):
        side.to_torch_prune_(small(), {"conv.weight": np.ones((2, 2))})


def test_every_verb_takes_the_masks_over_on_its_copy() -> None:
    model = pruned_by_torch()
    head = model.head.weight_mask.numpy().copy()
    made = whet.prune(model, Prune(0.5), **QUIET)
    assert torch_prune.is_pruned(model)
    assert (made.masks["head.weight"] == 0).sum() == 96 and not made.masks["head.weight"][head == 0].any()
    trained = whet.fit(model, Train(epochs=1), train=examples(), **QUIET)
    assert not trained.model.head.weight.detach().numpy()[head == 0].any() and trained.model.head.weight.any()
    quantized = whet.quantize(model, Quantize(), calibration=examples()[0], **QUIET)
    assert not quantized.model.head.weight.detach().numpy()[head == 0].any()


def train(model, pruner, steps, first=0, cast=False, optimizer=None):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=0.02)
    data = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in batches()]
    for step in range(first, first + steps):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        pruner.step()
        for name, mask in pruner.masks.items():
            assert not inside(model).get_parameter(name).detach().numpy()[mask == 0].any()


def test_under_autocast_to_bfloat16_counts_are_exact_and_weights_stay_float32() -> None:
    model = seeded(small).train()
    pruner = side.Pruner(model, RAMP, steps=20)
    train(model, pruner, 20, cast=True)
    assert pruner.is_done and model.conv.weight.dtype == torch.float32
    assert [int((mask == 0).sum()) for mask in pruner.masks.values()] == [27, 144]


def test_a_copy_made_on_the_way_goes_on_as_the_original() -> None:
    model = small()
    pruner, optimizer = side.Pruner(model, RAMP, steps=20), torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, pruner, 9, optimizer=optimizer)
    twin, other, second = copy.deepcopy((model, pruner, optimizer))
    train(model, pruner, 11, 9, optimizer=optimizer)
    assert 0 < other.sparsity < 0.75 and other.sparsity != pruner.sparsity
    train(twin, other, 11, 9, optimizer=second)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_names_of_a_wrapped_model_are_those_inside() -> None:
    class Compiled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

        def forward(self, x):
            return self._orig_mod(x)

    pruner = side.Pruner(Compiled(small()), Prune(0.5), steps=4)
    assert set(pruner.masks) == {"conv.weight", "head.weight"}


def distributed(rank, port, folder):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    own = [batch for i, batch in enumerate(batches()) if i % 2 == rank]  # every process sees other data
    for name, spec, options in (
        ("plain", RAMP, {}),
        ("data", Prune(0.5, criterion=Taylor(batches=1), schedule=Cubic(end=0.7, frequency=2)), {"data": own}),
    ):
        model = nn.parallel.DistributedDataParallel(small().train())
        pruner, optimizer = side.Pruner(model, spec, steps=8, **options), torch.optim.Adam(model.parameters(), lr=0.02)
        for step in range(8):
            x, y = (torch.from_numpy(a) for a in own[step % len(own)])
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            pruner.step()
        torch.save((pruner.masks, [p.detach() for p in model.parameters()]), folder / f"{name}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_that_train_together_hold_one_mask(tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(distributed, (port, tmp_path), nprocs=2)
    for name, sparsity in (("plain", 0.75), ("data", 0.5)):
        (masks, weights), (others, twins) = (torch.load(tmp_path / f"{name}{i}.pt", weights_only=False) for i in range(2))
        assert set(masks) == {"conv.weight", "head.weight"}
        assert all(np.array_equal(masks[key], others[key]) and (masks[key] == 0).mean() == sparsity for key in masks)
        assert all(torch.equal(a, b) for a, b in zip(weights, twins, strict=True))


def test_masks_live_through_distillation() -> None:
    teacher = small()
    pruned = whet.prune(small(seed=1), Prune(0.6), **QUIET)
    made = whet.distill(pruned, teacher, Distill(), fit=Train(epochs=2), train=examples(), **QUIET)
    for name, mask in pruned.masks.items():
        assert np.array_equal(made.masks[name], mask)
        assert not made.model.get_parameter(name).detach().numpy()[mask == 0].any()
