"""Accumulated and clipped gradients, 16-bit forward passes, and processes that train together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torch_parts import batches, examples, run_training, same_state, state_of
from whet.data import Batches
from whet.errors import SpecError
from whet.specs import Train

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


def test_two_processes_give_what_one_gives_and_score_every_row_of_val_once(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = []
    for count, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        folder.mkdir()
        for rank in range(count):
            command = [sys.executable, JOB, str(rank), str(count), str(folder)]
            running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate(timeout=250)
        assert process.returncode == 0, errors[-2000:]
    alone, first, second = (
        np.load(tmp_path / folder / f"weights-{rank}.npz") for folder, rank in (("one", 0), ("two", 0), ("two", 1))
    )
    for name in alone.files:
        assert np.array_equal(first[name], second[name]), name
        np.testing.assert_allclose(first[name], alone[name], atol=2e-5, err_msg=name)
        assert np.array_equal(first[name] == 0, alone[name] == 0), name
    told = [json.loads((tmp_path / folder / f"told-{rank}.json").read_text()) for folder, rank in (("one", 0), ("two", 1))]
    assert told[0]["rows"] == told[1]["rows"] and sum(told[0]["rows"]) == 3 * 36
    for one, other in zip(told[0]["history"], told[1]["history"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4) and one["sparsity"] == other["sparsity"]
