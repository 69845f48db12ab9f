"""What training minimises: the user's own loss, the default one, and the targets that fit it."""

import numpy as np
import pytest
import torch
from torch import nn

from torch_parts import Small, batches, examples, run_training, seeded, small
from whet.data import Batches
from whet.errors import DataError, ModelError
from whet.numerics.metrics import ACCURACY
from whet.specs import Train
from whet.torch.objective import default_loss


def half_loss(outputs, targets):
    return 0.5 * nn.functional.cross_entropy(outputs, targets)


def test_a_loss_of_the_users_own_is_used_and_recorded():
    _, step = run_training(small(), Train(epochs=1, loss=half_loss, decay=None), train=Batches(list(batches())))
    _, plain = run_training(small(), Train(epochs=1, decay=None), train=Batches(list(batches())))
    assert step.train["history"][0]["loss"] == pytest.approx(plain.train["history"][0]["loss"] / 2, rel=0.02)
    assert step.spec["Train"]["loss"]["function"].endswith(":half_loss")
    _, step = run_training(small(), Train(epochs=1, loss=lambda o, t: half_loss(o, t)))
    assert "<lambda>" in step.spec["Train"]["loss"]["function"]
    for loss, said in [
        (lambda o, t: o, r"must return a scalar tensor, got a tensor of shape \(32, 3\)"),
        (lambda o, t: 1.0, "got a float"),
        (lambda o, t: o.detach().sum(), "does not depend on any trainable weight"),
    ]:
        with pytest.raises(ModelError, match=said):
            run_training(small(), Train(epochs=1, loss=loss))


def test_the_default_loss_against_the_textbook():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 5, 3)), rng.integers(0, 3, (4, 5))
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, labels[..., None], -1).mean()
    last = default_loss(torch.from_numpy(logits), torch.from_numpy(labels))
    second = default_loss(torch.from_numpy(logits).movedim(-1, 1), torch.from_numpy(labels))
    assert float(last) == pytest.approx(expected) == float(second)
    padded = labels.copy()
    padded[:, 3:] = -100
    kept = -np.take_along_axis(log_p, labels[..., None], -1)[:, :3].mean()
    assert float(default_loss(torch.from_numpy(logits), torch.from_numpy(padded))) == pytest.approx(kept)
    assert float(default_loss(torch.zeros(2, 3), torch.full((2,), -100))) == 0
    values = rng.normal(size=4)
    squared = default_loss(torch.zeros(4, 1, dtype=torch.float64), torch.from_numpy(values))
    assert float(squared) == pytest.approx((values**2).mean())


@pytest.mark.parametrize(
    "outputs, targets, said",
    [
        ((4, 1), torch.tensor([0, 1, 0, 1]), "at least two classes"),
        ((4, 3), torch.tensor([0, 1, 3, 1]), "from 0 to 2 .*got 0 to 3"),
        ((4, 3), torch.tensor([0, 1, -1, 1]), "got -1 to 1"),
        ((4, 3), torch.tensor([0, 1]), r"shape \(2,\)"),
        ((4, 3), torch.zeros(4, 2), "do not fit"),
        ((4, 3), None, "no targets"),
    ],
)
def test_targets_that_do_not_fit_are_named(outputs, targets, said):
    with pytest.raises(DataError, match=said):
        default_loss(torch.zeros(outputs), targets)


def test_a_softmax_at_the_models_end_is_named():
    model = nn.Sequential(small(), nn.Softmax(-1))
    with pytest.raises(ModelError, match=r"outputs are probabilities.*default loss takes logits"):
        run_training(model, Train(epochs=1))


class Named(nn.Module):
    """As Hugging Face models: inputs by name, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.body = Small()

    def forward(self, *, pixels, offset=None):
        logits = self.body(pixels if offset is None else pixels + offset)
        return {"hidden": logits * 2, "logits": logits}


def test_dict_batches_and_dict_outputs():
    x, y = examples()
    data = Batches({"pixels": x, "labels": y}, "train", batch=32)
    model = seeded(Named)
    _, step = run_training(model, Train(epochs=6, learning_rate=0.01), train=data, val=data)
    assert step.train["metric"] == "accuracy" and step.train["history"][-1]["metric"] > 0.9
    _, step = run_training(model, Train(epochs=1), train=data, val=data, metric=ACCURACY)
    assert step.train["history"][-1]["metric"] > 0.9


def test_regression_uses_the_squared_error():
    x, _ = examples()
    y = x.reshape(len(x), -1).mean(1)
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 1)))
    data = Batches((x, y), "train", batch=16)
    _, step = run_training(model, Train(epochs=20, learning_rate=0.02), train=data, val=data)
    assert step.train["metric"] == "mean_squared_error"
    assert step.train["history"][-1]["metric"] < 0.05 * step.train["history"][0]["metric"]
