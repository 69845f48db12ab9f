"""Prune, distill and quantize inside a LightningModule's own training, by the real Lightning."""

import logging
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

import whet  # noqa: E402
from whet import DIST, QAT, Cubic, Distill, EarlyStopping, Features, GroupLasso, Int, Prune, Quantize, SoftTargets  # noqa: E402
from whet.errors import MetricError, ModelError, SpecError  # noqa: E402
from whet.numerics.stopping import StoppingState, update  # noqa: E402
from whet.torch.lightning import WhetCallback  # noqa: E402

warnings.filterwarnings("ignore", module="lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
RAMP = Prune(0.75, schedule=Cubic(end=0.5, frequency=1))
GENERATOR = np.random.default_rng(0)
X = torch.from_numpy(GENERATOR.normal(size=(96, 8)).astype(np.float32))
Y = (X[:, :4].sum(1) > 0).long() + 2 * (X[:, 4] > 0).long()


def network(width=16, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))


class Module(lightning.LightningModule):
    def __init__(self, net=None):
        super().__init__()
        self.net = net or network()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(module, callback, tmp_path, epochs=4, ckpt_path=None, others=(), **options):
    loader = DataLoader(TensorDataset(X, Y), batch_size=32)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"enable_checkpointing": False, **quiet, **options}
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=[callback, *others], default_root_dir=tmp_path, **options)
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return trainer


def by_hand(net, teacher=None, weight=0.5, epochs=4, spec=None):
    """The same training, as it is written without Lightning."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    pruner = None if spec is None else whet.torch.Pruner(net, spec, steps=3 * epochs)
    for _ in range(epochs):
        for x, y in zip(X.split(32), Y.split(32), strict=True):
            outputs = net(x)
            loss = functional.cross_entropy(outputs, y)
            if teacher is not None:
                with torch.no_grad():
                    taught = teacher(x)
                loss = weight * loss + (1 - weight) * whet.torch.soft_targets(outputs, taught, temperature=4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if pruner is not None:
                pruner.step()
    return net


def test_prune_and_distill_are_what_is_written_by_hand(tmp_path):
    teacher = network(32, seed=5)
    module = Module()
    apply = [RAMP, Distill([SoftTargets(temperature=4.0)], student_weight=0.5)]
    callback = WhetCallback(apply, teacher=teacher)
    fit(module, callback, tmp_path)
    expected = by_hand(network(), teacher, spec=RAMP)
    for name, tensor in expected.state_dict().items():
        np.testing.assert_allclose(module.net.state_dict()[name], tensor, atol=1e-6, err_msg=name)
    assert callback.sparsity == pytest.approx(0.75, abs=0.02) and callback.is_done
    assert all(
        (module.net.get_parameter(name)[torch.from_numpy(mask) == 0] == 0).all() for name, mask in callback.masks.items()
    )
    assert "training_step" not in vars(module) and not module.net._forward_hooks and not module.net._forward_pre_hooks


def test_steps_are_optimizer_steps_when_gradients_accumulate(tmp_path):
    callback = WhetCallback([RAMP])
    trainer = fit(Module(), callback, tmp_path, accumulate_grad_batches=3, gradient_clip_val=1.0)
    assert trainer.global_step == 4 and callback.sparsity == pytest.approx(0.75, abs=0.02)


def test_a_resumed_training_ends_as_an_undisturbed_one(tmp_path):
    teacher = network(32, seed=5)
    apply = [RAMP, Distill([Features("0", "0"), SoftTargets()])]
    whole = Module()
    fit(whole, WhetCallback(apply, teacher=teacher), tmp_path, epochs=4)

    class Saves(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    fit(Module(), WhetCallback(apply, teacher=teacher), tmp_path, others=[Saves()])
    resumed = Module(network(seed=9))
    callback = WhetCallback(apply, teacher=teacher)
    fit(resumed, callback, tmp_path, ckpt_path=tmp_path / "half.ckpt")
    assert len(resumed.losses) == 6 and callback.sparsity == pytest.approx(0.75, abs=0.02)
    for name, tensor in whole.net.state_dict().items():
        np.testing.assert_allclose(resumed.net.state_dict()[name], tensor, atol=1e-6, err_msg=name)


def test_quantization_aware_training_of_the_pruned_network_runs_as_an_onnx_file(tmp_path):
    teacher = by_hand(network(32, seed=5), epochs=20)
    module = Module(by_hand(network(), epochs=20))
    ramp = Prune(0.5, schedule=Cubic(end=0.5, frequency=1))
    callback = WhetCallback([ramp, Distill([SoftTargets()])], teacher=teacher)
    fit(module, callback, tmp_path, epochs=6)
    spec = Quantize(Int(8), qat=QAT(observe=0.25))
    module.net = whet.torch.prepare(module.net, spec, calibration=X.numpy(), masks=callback.masks, steps=12)
    second = WhetCallback([Distill([DIST(), SoftTargets()])], teacher=teacher, early_stopping=EarlyStopping(patience=9))
    fit(module, second, tmp_path)
    assert second.is_done
    made = whet.finish(module.net, example=X.numpy()[:1], masks=callback.masks)
    file = made.export(tmp_path / "model.onnx")
    evidence = whet.measure(file, (X.numpy(), Y.numpy()), progress=False)
    assert evidence.metric["value"] > 0.8
    zeros = np.mean(made.float_model[0].weight.detach().numpy() == 0)
    assert zeros >= 0.45


def test_the_best_is_at_the_final_sparsity_and_comes_back(tmp_path):
    module = Module(by_hand(network(), epochs=10))  # already good: every epoch of the ramp would be best
    callback = WhetCallback(
        [Prune(0.9, schedule=Cubic(end=0.6, frequency=1))], early_stopping=EarlyStopping(patience=2, min_delta=0.5)
    )
    seen = []

    class Watched(lightning.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                seen.append((float(trainer.callback_metrics["val_loss"]), callback.is_done))

    trainer = fit(module, callback, tmp_path, epochs=30, others=[Watched()])
    assert trainer.current_epoch < 25
    best = next(value for value, is_done in seen if is_done)  # nothing after it is better by half
    with torch.no_grad():
        after = np.mean(
            [float(functional.cross_entropy(module.net(x), y)) for x, y in zip(X.split(32), Y.split(32), strict=True)]
        )
    assert after == pytest.approx(best, abs=1e-5)
    assert seen[0][0] < best and callback.sparsity == pytest.approx(0.9, abs=0.02)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(-16, 16).map(lambda i: i / 8), min_size=1, max_size=12),
    patience=st.integers(1, 4),
    min_delta=st.sampled_from([0.0, 0.125, 0.5]),
    higher=st.booleans(),
)
def test_early_stopping_decides_as_lightnings(values, patience, min_delta, higher):
    theirs = lightning.callbacks.EarlyStopping("v", min_delta=min_delta, patience=patience, mode="max" if higher else "min")
    state, stopped = StoppingState(), [None, None]
    spec = EarlyStopping(patience=patience, min_delta=min_delta)
    for epoch, value in enumerate(values):
        state, decision = update(state, value, spec, higher_is_better=higher)
        should_stop, _ = theirs._evaluate_stopping_criteria(torch.tensor(value))
        stopped = [
            epoch if ends and was is None else was for was, ends in zip(stopped, (decision.stop, should_stop), strict=True)
        ]
        assert stopped[0] == stopped[1] and float(theirs.best_score) == state.best
        if stopped[0] is not None:
            break


def test_group_lasso_joins_the_loss(tmp_path):
    module, twin = Module(), Module()
    fit(module, WhetCallback([GroupLasso(1.0)]), tmp_path)
    fit(twin, WhetCallback(), tmp_path)
    assert float(module.net[0].weight.detach().abs().sum()) < 0.8 * float(twin.net[0].weight.detach().abs().sum())


def test_what_cannot_be_is_said(tmp_path):
    class Two(Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4)

    with pytest.raises(ModelError, match=r"holds parameters in 'net', 'head': say which"):
        fit(Two(), WhetCallback([RAMP]), tmp_path)

    class Manual(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            return loss

    module = Manual()
    with pytest.raises(ModelError, match="nothing of the teacher's loss was in it"):
        fit(module, WhetCallback([Distill([SoftTargets()])], teacher=network(32, seed=5)), tmp_path)
    assert "training_step" not in vars(module) and not module.net._forward_hooks  # nothing is left behind by an error either
    with pytest.raises(MetricError, match="monitor='val_acc' is not among what this training tells: val_loss"):
        fit(Module(), WhetCallback(early_stopping=EarlyStopping(), monitor="val_acc"), tmp_path)
    with pytest.raises(SpecError, match="at most one Prune"):
        WhetCallback([RAMP, RAMP])
