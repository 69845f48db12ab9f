"""An optimizer goes on after removal: its state loses the same positions as the parameters, in the same order."""

import copy

import pytest
import torch

import zoo_torch
from whet.specs import Channel, Prune
from whet.torch import remove

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}


def step(model, optimizer, x) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def kept_rows(whole, part) -> list[int]:
    """Which rows of a tensor are left in the smaller one."""
    return [i for i, row in enumerate(whole) if any(torch.equal(row, other) for other in part)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_step_is_that_of_the_silenced_original(name) -> None:
    """Remove filters of conv1 between two steps; all else goes as if the filters were still there and read with zeros."""
    model, inputs = zoo_torch.CASES["demo"]()
    x = torch.from_numpy(inputs)
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer, x)
    silent = copy.deepcopy(model)
    twin = OPTIMIZERS[name](silent.parameters())
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    remove(model, Prune(0.3, granularity=Channel(), round_to=1, include="conv1"), example=inputs, optimizer=optimizer)
    rows = kept_rows(silent.conv1.weight, model.conv1.weight)
    assert len(rows) == 7 and set(optimizer.state) == set(model.parameters())
    for key, value in twin.state[silent.conv1.weight].items():
        mine = optimizer.state[model.conv1.weight][key]
        assert torch.equal(mine, value[rows] if value.ndim else value), key
    for key, value in twin.state[silent.conv2.weight].items():
        mine = optimizer.state[model.conv2.weight][key]
        assert torch.equal(mine, value[:, rows] if value.ndim else value), key
    gone = [i for i in range(10) if i not in rows]
    with torch.no_grad():
        silent.conv2.weight[:, gone] = 0
    step(model, optimizer, x)
    step(silent, twin, x)
    torch.testing.assert_close(model.conv1.weight, silent.conv1.weight[rows], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.conv2.weight, silent.conv2.weight[:, rows], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.fc2.weight, silent.fc2.weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rebuild", [None, "graph"])
def test_groups_of_parameters_and_what_loses_nothing_stay(rebuild) -> None:
    model, inputs = zoo_torch.CASES["residual"]()
    slow, fast = list(model.conv1.parameters()), [p for n, p in model.named_parameters() if not n.startswith("conv1")]
    optimizer = torch.optim.Adam([{"params": slow, "lr": 1e-4}, {"params": fast}], lr=1e-3)
    x = torch.from_numpy(inputs)
    step(model, optimizer, x)
    spec = Prune(0.25, granularity=Channel(), round_to=1, include=("conv2",), rebuild=rebuild)
    made = remove(model, spec, example=inputs, optimizer=optimizer)[0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 10]
    assert optimizer.param_groups[0]["lr"] == 1e-4 and optimizer.param_groups[0]["params"][0] is made.conv1.weight
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in made.parameters()}
    for p in made.parameters():
        assert optimizer.state[p]["exp_avg"].shape == p.shape and int(optimizer.state[p]["step"]) == 1
    before = made.conv2.weight.detach().clone()
    step(made, optimizer, x)
    assert made.conv2.weight.shape[0] == 12 and not torch.equal(before, made.conv2.weight)


def test_a_recurrent_layers_state_goes_along() -> None:
    model = torch.nn.LSTM(4, 6, batch_first=True)
    head = torch.nn.Linear(6, 2)

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = model, head

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    both, x = Both(), zoo_torch.normal(3, 5, 4)
    optimizer = torch.optim.SGD(both.parameters(), lr=0.1, momentum=0.9)
    step(both, optimizer, torch.from_numpy(x))
    old = optimizer.state[model.weight_hh_l0]["momentum_buffer"].clone()
    weight = model.weight_hh_l0.detach().clone()
    remove(both, Prune(1 / 3, granularity=Channel(), round_to=1), example=x, optimizer=optimizer)
    new = optimizer.state[model.weight_hh_l0]["momentum_buffer"]
    units = [u for u in range(6) if torch.isin(weight[u], model.weight_hh_l0).sum() >= 4]
    assert new.shape == (16, 4) and len(units) == 4
    assert torch.equal(new, old.reshape(4, 6, 6)[:, units][:, :, units].reshape(16, 4))
