"""A removal works on a copy that shares the original's memory: the original is never written, and nothing stays shared."""

import numpy as np
import pytest
import torch
from torch import nn

import whet
from whet import Channel, Prune
from whet.torch.borrowing import Silence, borrow, own, zeroed
from whet.torch.groups import read_model
from whet.torch.surgery import Surgeon, equal

HALF = Prune(0.5, granularity=Channel(), round_to=1)


def memory_of(model) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


class Watching(nn.Module):
    """Compares weights outside of it with what they were, on every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.same: list[bool] = []

    def __deepcopy__(self, memo):
        return self

    def watch(self, model) -> None:
        self.pairs = [(p, p.detach().clone()) for p in model.parameters()]

    def forward(self, x):
        if not torch.compiler.is_compiling() and not isinstance(x, torch._subclasses.FakeTensor):
            self.same.append(all(torch.equal(p.data, was) for p, was in self.pairs))
        return x


def network(*between) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), *between, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_the_original_is_never_written_and_nothing_stays_shared() -> None:
    watching = Watching()
    model = network(watching)
    watching.watch(model)
    versions = [p._version for p in model.parameters()]
    made = whet.prune(model, HALF, example=np.ones((2, 6), np.float32), progress=False)
    assert len(watching.same) >= 4 and all(watching.same)  # the original's outputs, silenced, smaller, compared again
    assert [p._version for p in model.parameters()] == versions
    assert not memory_of(made.model) & memory_of(model)
    with torch.no_grad():
        for p in made.model.parameters():
            p.zero_()
    assert all(torch.equal(p.data, was) for p, was in watching.pairs)


@pytest.mark.parametrize("rebuild", [None, "graph"])
def test_a_result_that_is_pruned_again_shares_nothing_either(rebuild) -> None:
    model = network()
    once = whet.prune(
        model, Prune(0.5, granularity=Channel(), round_to=1, include=("0",), rebuild=rebuild), example=np.eye(6, dtype="f")
    )
    before = [p.detach().clone() for p in once.model.parameters()]
    twice = whet.prune(once, Prune(0.5, granularity=Channel(), round_to=1, include=("3", "2")), progress=False)
    assert not memory_of(twice.model) & (memory_of(once.model) | memory_of(model))
    assert all(torch.equal(p, was) for p, was in zip(once.model.parameters(), before, strict=True))
    assert sum(p.numel() for p in twice.model.parameters()) < sum(p.numel() for p in once.model.parameters())


def test_what_a_forward_pass_writes_is_copied() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.1), nn.Linear(4, 3))
    model[1].tied = model[1].weight
    lent = borrow(model)
    assert not memory_of(lent[0]) & memory_of(model) and memory_of(lent[1]) <= memory_of(model)
    assert lent[1].tied is lent[1].weight is not model[1].weight
    own(lent, model)
    assert not memory_of(lent) & memory_of(model) and torch.equal(lent[1].weight, model[1].weight)


def test_silence_by_hand() -> None:
    weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    zeros = {id(weight): (weight, [(1, torch.tensor([0, 2]))])}
    with Silence(zeros):
        assert weight.shape == (2, 3)
        assert torch.equal(nn.functional.linear(torch.ones(3), weight), torch.tensor([1.0, 4.0]))
        assert torch.equal(torch.cat([weight, weight]), torch.tensor([[0.0, 1, 0], [0, 4, 0]] * 2))
        assert torch.equal(weight.T, torch.tensor([[0.0, 0], [1, 4], [0, 0]]))
    assert torch.equal(weight, torch.arange(6.0).reshape(2, 3))
    assert torch.equal(zeroed(weight, [(0, torch.tensor([1]))]), torch.tensor([[0.0, 1, 2], [0, 0, 0]]))


class Unseen(nn.Module):
    """Multiplies where torch's function modes do not look."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.weight = nn.Linear(6, 8), nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        y = torch.relu(self.first(x))
        if torch.compiler.is_compiling():
            return nn.functional.linear(y, self.weight)
        with torch._C.DisableTorchFunction():
            return nn.functional.linear(y, self.weight)


def test_code_that_modes_do_not_see_is_compared_with_exchanged_weights() -> None:
    model, x = Unseen().eval(), np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    reading = read_model(model, x)
    gone = reading.groups.gone([reading.groups.named("first.weight").roots[:4]])
    surgeon = Surgeon(model, reading, x)
    first, second = surgeon.references(gone)
    assert equal(first, surgeon.outputs()) and not equal(second, first)
    made = whet.prune(model, HALF, example=x, progress=False)
    assert made.steps[0].removal["oracle"] < 1e-6 and made.model.weight.shape == (3, 4)
