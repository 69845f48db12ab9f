"""Training on Whet's copy: masks, early stopping, best weights, and what it must never leave behind."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from torch_parts import Small, Tied, batches, examples, run_training, same_state, seeded, small, state_of
from whet import torch as side
from whet.data import Batches
from whet.errors import DataError, MetricError, ModelError, SpecError
from whet.numerics.metrics import accuracy
from whet.specs import Cubic, EarlyStopping, Global, Metric, Prune, Train

RAMP = Prune(0.75, schedule=Cubic(end=0.5, frequency=1))


def test_training_learns_and_is_recorded():
    model = small()
    before = side.predict(model, examples()[0])
    masks, step = run_training(model, Train(epochs=6, learning_rate=0.01))
    history = step.train["history"]
    assert accuracy(side.predict(model, examples()[0]), examples()[1]).mean() > 0.9 > accuracy(before, examples()[1]).mean()
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert set(history[0]) == {"epoch", "loss", "metric", "sparsity", "learning_rate", "eligible", "phase"}
    rates = [row["learning_rate"] for row in history]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * 17 / 18)))
    assert step.train["metric"] == "accuracy" and step.train["stop"]["epochs"] == 6 and masks == {} and step.changed == ()
    best = max(range(6), key=lambda i: (history[i]["metric"], -i))
    assert step.train["stop"] == {"reason": "ran all 6 epochs", "best_epoch": best + 1, "epochs": 6}


def test_one_epoch_is_adamw_with_the_cosine_rate():
    model, twin = small(), small().train()
    spec = Train(epochs=1, learning_rate=0.01, weight_decay=0.1)
    run_training(model, spec, train=Batches(list(batches())), val=None)
    optimizer = torch.optim.AdamW(twin.parameters(), weight_decay=0.1)
    for step, (x, y) in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * step / 3))
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    assert same_state(state_of(model), state_of(twin))


def test_the_seed_decides_everything_and_global_random_states_come_back():
    def train_once(seed):
        model = small(dropout=0.5)
        run_training(model, Train(epochs=2), seed=seed)
        return state_of(model)

    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    first = train_once(3)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert same_state(first, train_once(3))
    assert not same_state(first, train_once(4))


def test_arrays_are_read_in_a_new_order_every_epoch_and_batches_in_their_own():
    x, _ = examples(12)
    ids = np.arange(12.0, dtype=np.float32)

    def orders(data):
        seen = []
        loss = lambda outputs, targets: seen.append(targets.tolist()) or outputs.square().mean()  # noqa: E731
        metric = Metric(lambda outputs, targets: np.zeros(len(targets)))
        run_training(small(), Train(epochs=2, loss=loss), train=data, metric=metric)
        return seen

    first, second = orders(Batches((x, ids), "train", batch=12))
    assert sorted(first) == sorted(second) == ids.tolist() and first != second != ids.tolist() != first
    assert orders(Batches([(x, ids)], "train")) == [ids.tolist()] * 2


class Watching(Small):
    """Notes the zeros of its weights at every forward in training mode."""

    seen: list

    def forward(self, x):
        if self.training:
            self.seen.append(int((self.head.weight == 0).sum()))
        return super().forward(x)


@pytest.mark.parametrize("allocation", [{}, {"allocation": Global()}])
def test_a_ramp_rises_to_exactly_its_end_and_masks_hold_at_every_step(allocation):
    model = seeded(Watching)
    model.seen = []
    spec = Train(epochs=6, learning_rate=0.02, weight_decay=0.01, apply=[Prune(0.75, schedule=RAMP.schedule, **allocation)])
    masks, step = run_training(model, spec)
    assert model.seen == sorted(model.seen) and model.seen[0] == 0 and len(set(model.seen)) >= 6
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) == 0, torch.from_numpy(mask == 0))
    total = sum(mask.size for mask in masks.values())
    assert sum(int((mask == 0).sum()) for mask in masks.values()) == round(0.75 * total)
    sparsity = [row["sparsity"] for row in step.train["history"]]
    assert sparsity == sorted(sparsity) and sparsity[-1] == pytest.approx(0.75)
    assert [row["eligible"] for row in step.train["history"]] == [False, False, False, True, True, True]
    assert [row["phase"] for row in step.train["history"]] == ["pruning ramp"] * 3 + ["recovery"] * 3
    assert step.train["stop"]["best_epoch"] >= 4
    if not allocation:
        assert {row["name"]: row["sparsity"] for row in step.changed} == {"conv.weight": 0.75, "head.weight": 0.75}


def test_masks_from_before_are_held_without_a_prune():
    model = small()
    masks, _ = side.prune(model, Prune(0.5), masks={})
    after, step = run_training(model, Train(epochs=2, learning_rate=0.05), masks=masks)
    assert all(np.array_equal(after[name], masks[name]) for name in masks)
    assert int((model.head.weight == 0).sum()) == 96 and not torch.signbit(model.head.weight[model.head.weight == 0]).any()
    assert {row["sparsity"] for row in step.changed} == {0.5} and step.train["history"][0]["sparsity"] == 0.5


def test_a_shared_module_keeps_its_one_mask():
    ids = np.random.default_rng(0).integers(0, 11, (32, 5))
    model = seeded(Tied)
    masks, _ = run_training(model, Train(epochs=3, apply=[Prune(0.5)]), train=Batches((ids, ids), batch=8), val=None)
    assert set(masks) == {"hidden.weight"} and model.again is model.hidden
    assert torch.equal(model.hidden.weight == 0, torch.from_numpy(masks["hidden.weight"] == 0))
    assert model.out.weight is model.embed.weight


class Scripted:
    """A metric that returns given values, one for each epoch, and keeps the model's state at each."""

    def __init__(self, values, model):
        self.values, self.model, self.states = list(values), model, []

    def __call__(self, outputs, targets):
        self.states.append(state_of(self.model))
        return self.values[len(self.states) - 1]


@pytest.mark.parametrize(
    "values, higher, patience, best, ran, reason",
    [
        ([0.5, 0.7, 0.6, 0.6, 0.9], True, 2, 2, 4, "stopped: no improvement for 2 epochs"),
        ([0.5, 0.7, 0.6, 0.8, 0.6], True, 2, 4, 5, "ran all 5 epochs"),
        ([0.5, 0.7, 0.2, 0.6, 0.9], False, 3, 3, 5, "ran all 5 epochs"),
        ([0.5, 0.5, 0.5, 0.5, 0.5], True, 4, 1, 5, "stopped: no improvement for 4 epochs"),
    ],
)
def test_the_best_weights_and_buffers_come_back(values, higher, patience, best, ran, reason):
    model = small()
    fn = Scripted(values, model)
    metric = Metric(fn, higher_is_better=higher, per_example=False, name="scripted")
    spec = Train(epochs=5, learning_rate=0.02, early_stopping=EarlyStopping(patience=patience))
    _, step = run_training(model, spec, metric=metric)
    assert step.train["stop"] == {"reason": reason, "best_epoch": best, "epochs": ran}
    assert [row["metric"] for row in step.train["history"]] == values[:ran]
    assert same_state(state_of(model), fn.states[best - 1])
    assert not same_state(fn.states[best - 1], fn.states[best % ran])
    assert not torch.equal(fn.states[0]["bn.running_mean"], fn.states[1]["bn.running_mean"])


def test_patience_waits_for_the_ramp():
    model = small()
    fn = Scripted([0.9, 0.8, 0.7, 0.5, 0.6, 0.4, 0.3, 0.2], model)
    spec = Train(epochs=8, apply=[Prune(0.75, schedule=Cubic(end=0.5, frequency=1))], early_stopping=EarlyStopping(patience=2))
    masks, step = run_training(model, spec, metric=Metric(fn, per_example=False))
    assert step.train["stop"] == {"reason": "stopped: no improvement for 2 epochs", "best_epoch": 5, "epochs": 7}
    assert int((masks["head.weight"] == 0).sum()) == int((model.head.weight == 0).sum()) == 144


def test_without_val_the_train_loss_decides_and_the_record_says_so():
    _, step = run_training(small(), Train(epochs=2), val=None)
    assert step.train["metric"] == "loss on train" and "there is no val" in step.train["notes"][0]
    assert [row["metric"] for row in step.train["history"]] == [None, None]
    x, _ = examples(16)
    _, step = run_training(small(), Train(epochs=2), val=Batches(x, "val"))
    assert step.train["metric"] == "loss on train" and "no targets" in step.train["notes"][0]


def test_a_per_example_metric_is_averaged_over_examples_not_batches():
    x, y = examples(10)
    scores = iter(np.arange(10.0))
    metric = Metric(lambda outputs, targets: np.array([next(scores) for _ in targets]), name="m")
    _, step = run_training(small(), Train(epochs=1), val=Batches((x, y), "val", batch=8), metric=metric)
    assert step.train["history"][0]["metric"] == 4.5


def test_a_metric_for_all_is_called_once_with_everything():
    calls = []
    metric = Metric(lambda outputs, targets: calls.append((outputs.shape, targets.shape)) or 1.0, per_example=False)
    run_training(small(), Train(epochs=1), val=Batches(examples(10), "val", batch=4), metric=metric)
    assert calls == [((10, 3), (10,))]


@pytest.mark.parametrize(
    "fn, said",
    [
        (lambda outputs, targets: np.full(len(targets), np.nan), "'bad' returned nan"),
        (lambda outputs, targets: 0.5, "one score per example, shape .32"),
        (lambda outputs, targets: "good", "must return numbers, got str"),
    ],
)
def test_a_metric_that_is_no_metric(fn, said):
    with pytest.raises(MetricError, match=said):
        run_training(small(), Train(epochs=1), metric=Metric(fn, name="bad"))


class Bomb:
    """A loss that is NaN from its `at`-th call on."""

    def __init__(self, at):
        self.at = at

    def __call__(self, outputs, targets):
        self.at -= 1
        return nn.functional.cross_entropy(outputs, targets) * (math.nan if self.at < 0 else 1)


def test_a_loss_that_is_not_finite_gives_the_best_weights_back():
    model, twin = small(), small()
    with pytest.raises(ModelError, match=r"loss is nan in epoch 2, batch 1.*learning_rate \(now 0.02\)"):
        run_training(model, Train(epochs=3, learning_rate=0.02, decay=None, loss=Bomb(4)))
    run_training(twin, Train(epochs=1, learning_rate=0.02, decay=None))
    assert same_state(state_of(model), state_of(twin)) and not model.training


def test_a_loss_that_is_never_finite_gives_the_first_weights_back():
    model = small()
    before = state_of(model)
    with pytest.raises(ModelError, match="loss is nan in epoch 1, batch 0"):
        run_training(model, Train(epochs=3, loss=Bomb(0)))
    assert same_state(state_of(model), before)


def test_outputs_that_are_never_finite_are_never_best():
    class Exploding(Small):
        def forward(self, x):
            return super().forward(x) / (1.0 if self.training else 0.0)

    model = seeded(Exploding)
    before = state_of(model)
    with pytest.raises(ModelError, match="In no epoch was 'accuracy' a finite number"):
        run_training(model, Train(epochs=2))
    assert same_state(state_of(model), before)


def test_a_last_batch_of_one_with_batch_norm_is_left_out_and_noted():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x):
            return self.layers(x)

    _, step = run_training(seeded(Flat), Train(epochs=2), train=batches(33, 8))
    assert step.train["notes"] == ["2 batches of one example were left out: batch norm cannot train on them"]
    with pytest.raises(DataError, match="Every batch of train has one example"):
        run_training(seeded(Flat), Train(epochs=2), train=batches(4, 1))
    _, step = run_training(small(), Train(epochs=1), train=batches(33, 8))  # 4×4 values per channel are enough
    assert step.train["notes"] == []


def test_modes_come_back_and_parts_in_inference_mode_stay_so():
    model = small()
    run_training(model, Train(epochs=1))
    assert not any(module.training for module in model.modules())
    model.train()
    model.bn.eval()
    mean = model.bn.running_mean.clone()
    run_training(model, Train(epochs=1))
    assert torch.equal(model.bn.running_mean, mean) and model.training and not model.bn.training


def test_frozen_parameters_are_not_trained_but_pruned():
    model = small()
    model.conv.requires_grad_(False)
    before = model.conv.weight.detach().clone()
    masks, _ = run_training(model, Train(epochs=2, apply=[Prune(0.5)]))
    assert torch.equal(model.conv.weight, before * torch.from_numpy(masks["conv.weight"]))
    assert not model.conv.weight.requires_grad
    with pytest.raises(ModelError, match="nothing to train"):
        run_training(small().requires_grad_(False), Train(epochs=1))


def test_errors_before_the_first_step():
    model = small()
    before = state_of(model)
    for spec, error, said in [
        (Train(epochs=1, apply=[Prune(0.5, schedule=Cubic(frequency=10))]), SpecError, "cannot ramp"),
        (Train(epochs=1, apply=[Prune(0.0)]), ModelError, "change nothing"),
    ]:
        with pytest.raises(error, match=said):
            run_training(model, spec)
    for device in ("nowhere", "meta"):
        with pytest.raises(ModelError, match=f"device '{device}' cannot be used"):
            run_training(model, Train(epochs=1), device=device)
    assert same_state(state_of(model), before)


def test_a_length_that_is_not_true_is_named():
    class Short(list):
        def __len__(self):
            return 30

    data = Short(batches())
    with pytest.raises(DataError, match="said it had 30 batches and gave 6 in 2 epochs"):
        run_training(small(), Train(epochs=2, apply=[RAMP]), train=Batches(data, "train"))


def test_progress_names_epoch_loss_metric_and_sparsity(capsys):
    run_training(small(), Train(epochs=3, apply=[Prune(0.5)]), progress=True)
    shown = capsys.readouterr().err
    assert "Training" in shown and "epoch 3/3, recovery, loss" in shown and "sparsity 0.50" in shown
    run_training(small(), Train(epochs=1))
    assert capsys.readouterr().err == ""
