"""Accumulated and clipped gradients, 16-bit forward passes, and processes that train together."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from torch_parts import batches, examples, run_training, same_state, state_of
from whet.data import Batches
from whet.errors import SpecError
from whet.specs import GroupLasso, Prune, RigL, Taylor, Train
from whet.torch import sharding

JOB = Path(__file__).parents[1] / "support" / "process_job.py"
SPEC = {"learning_rate": 0.01, "decay": None}


def plain():
    """No batch norm, whose statistics depend on the size of a batch."""
    torch.manual_seed(0)
    shape = examples(1)[0].shape[1:]
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 8), nn.Tanh(), nn.Linear(8, 3))


def trained(data, model=None, **fields):
    model = plain() if model is None else model
    run_training(model, Train(**SPEC, **fields), train=Batches(data), val=None)
    return state_of(model)


def test_accumulated_batches_are_one_of_their_size_also_those_that_are_left():
    x, y = examples(40)
    halves = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)]
    wholes = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 40, 16)]
    accumulated, plain = trained(halves, epochs=2, accumulate=2), trained(wholes, epochs=2)
    for name, tensor in plain.items():
        np.testing.assert_allclose(accumulated[name], tensor, atol=1e-6, err_msg=name)
    assert not same_state(accumulated, trained(halves, epochs=2))


def test_clipping_is_that_of_the_norm_of_all_gradients():
    twin = plain().train()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.0)
    norms = []
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        norm = torch.stack([p.grad.norm() for p in twin.parameters()]).norm()
        norms.append(float(norm))
        for parameter in twin.parameters():
            parameter.grad.mul_(min(1.0, 0.05 / float(norm)))
        optimizer.step()
    assert min(norms) > 0.05
    found = trained(list(batches()), epochs=1, clip=0.05)
    for name, tensor in state_of(twin).items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_forward_pass_in_16_bits_trains_weights_of_32(precision):
    seen = []

    def loss(outputs, targets):
        seen.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs.float(), targets)

    narrow = trained(list(batches()), epochs=4, precision=precision, loss=loss)
    assert set(seen) == {getattr(torch, precision)}
    assert all(tensor.dtype == torch.float32 for tensor in narrow.values() if tensor.is_floating_point())
    wide = trained(list(batches()), epochs=4, loss=loss)
    moved = max(float((wide[name] - tensor).abs().max()) for name, tensor in state_of(plain()).items())
    apart = max(float((wide[name] - tensor).abs().max()) for name, tensor in narrow.items())
    assert 0 < apart < 0.25 * moved


def test_values_that_are_not_allowed():
    for field, value in (("accumulate", 0), ("clip", 0.0), ("precision", "int8")):
        with pytest.raises(SpecError, match=rf"Train\.{field}"):
            Train(**{field: value})


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder in which one process, two, and two that shard the parameters have trained."""
    folder, environment, running = tmp_path_factory.mktemp("together"), os.environ | {"OMP_NUM_THREADS": "1"}, []
    for name, count in (("one", 1), ("two", 2), ("shard", 2)):
        (folder / name).mkdir()
        for rank in range(count):
            command = [sys.executable, JOB, str(rank), str(count), str(folder / name), *(["shard"] if name == "shard" else [])]
            running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate(timeout=250)
        assert process.returncode == 0, errors[-2000:]
    return folder


def saved(folder, name, what):
    """What one process saved alone, and both processes of the job `name`."""
    return (np.load(folder / f"{job}/{what}-{rank}.npz") for job, rank in (("one", 0), (name, 0), (name, 1)))


def told(folder, rank):
    return json.loads((folder / f"told-{rank}.json").read_text())


@pytest.mark.parametrize("name", ["two", "shard"])
def test_processes_together_give_what_one_gives_and_score_every_row_of_val_once(together, name):
    alone, first, second = saved(together, name, "weights")
    for key in alone.files:
        assert np.array_equal(first[key], second[key]), key
        np.testing.assert_allclose(first[key], alone[key], atol=2e-5, err_msg=key)
        assert np.array_equal(first[key] == 0, alone[key] == 0), key
    one, other = told(together / "one", 0), told(together / name, 1)
    rows = 3 * 36 if name == "two" else 2 * 36  # the sharded one was interrupted, and went on
    assert sum(other["rows"]) == rows and sum(one["rows"]) == 3 * 36
    for row, its in zip(one["history"], other["history"], strict=True):
        assert row["loss"] == pytest.approx(its["loss"], rel=1e-4) and row["sparsity"] == its["sparsity"]


@pytest.mark.parametrize("name", ["two", "shard"])
def test_processes_together_train_quantized_weights_as_one_does(together, name):
    alone, first, second = saved(together, name, "codes")
    for key in alone.files:
        assert np.array_equal(first[key], second[key]), key
        assert np.mean(first[key] != alone[key]) < 0.05, key


def test_a_sharded_training_goes_on_from_its_checkpoint(together):
    assert "continued from the checkpoint after epoch 1" in told(together / "shard", 1)["notes"]
    assert "continued" not in str(told(together / "one", 0)["notes"])


def test_a_single_process_has_nobody_to_share_with():
    with pytest.raises(SpecError, match="divides the parameters among processes, and this is one alone"):
        trained(list(batches()), epochs=1, shard=True)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"precision": "float16"}, "Take 'bfloat16'"),
        ({"compile": "eager"}, "leave one of them out"),
        ({"apply": GroupLasso()}, "GroupLasso reads whole weights"),
        ({"apply": Prune(0.5, criterion=Taylor())}, "Taylor asks for gradients or inputs of whole weights"),
        ({"apply": Prune(0.5, schedule=RigL(frequency=1))}, "RigL asks for"),
    ],
)
def test_what_parts_of_weights_cannot_do_is_said(monkeypatch, fields, said):
    monkeypatch.setattr(sharding, "Processes", lambda: SimpleNamespace(count=2))
    with pytest.raises(SpecError, match=said):
        sharding.check_sharded(Train(shard=True, **fields))
