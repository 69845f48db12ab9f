"""Losses on layers inside two PyTorch models: by name, projected, over several pairs, and gone afterwards."""

import numpy as np
import pytest
import torch
from torch import nn

from torch_parts import batches, run_training, same_state, seeded, state_of
from whet import torch as side
from whet.data import Batches
from whet.errors import ModelError
from whet.numerics.losses_features import attention_transfer, hints
from whet.numerics.losses_layers import layer_loss
from whet.numerics.namespace import numpy_namespace as np_xp
from whet.specs import PKT, RKD, AttentionTransfer, Distill, Features, SimilarityPreserving, SoftTargets, Train

# Losses on layers are tested alone; that they should not be used so is tested too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Nothing but .* teaches:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* without a loss on the outputs:UserWarning"),
]


class Tower(nn.Module):
    """Two convolutions and a head: 3 classes from 1×6×6; block.0 and block.1 give `width` channels at 6×6 and 3×3."""

    def __init__(self, width):
        super().__init__()
        self.block = nn.ModuleList([nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1, stride=2)])
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        for layer in self.block:
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


def tower(width=4, seed=0):
    return seeded(lambda: Tower(width), seed)


def heard(model, name, x):
    """The output of the layer `name`, channels last."""
    found = []
    hook = model.get_submodule(name).register_forward_hook(lambda module, inputs, output: found.append(output))
    model(torch.from_numpy(x))
    hook.remove()
    return np.moveaxis(found[0].detach().numpy(), 1, -1)


def first_loss(losses, student, teacher):
    spec = Train(epochs=1, learning_rate=1e-9, apply=[Distill(losses, student_weight=0)])
    _, step = run_training(student, spec, teacher=teacher, train=batches(32, batch=32), val=None)
    return step.train["history"][0]["loss"]


def test_the_loss_is_that_of_the_named_layers():
    student, teacher = tower(4), tower(4, 1)
    x, _ = batches(32, batch=32).first()
    maps = [[heard(model, f"block.{i}", x) for model in (student, teacher)] for i in (0, 1)]
    wanted = hints(*maps[1], xp=np_xp) * 2 + sum(attention_transfer(*pair, xp=np_xp) for pair in maps)
    losses = [Features("block.1", "block.1", weight=2.0), AttentionTransfer("block.*", "block.?", weight=1.0)]
    assert first_loss(losses, student, teacher) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("spec", [RKD("block.1", "block.1"), SimilarityPreserving("block.1", "block.1"), PKT("head", "head")])
def test_relations_of_layers_and_of_outputs(spec):
    student, teacher = tower(4), tower(6, 1)
    x, _ = batches(32, batch=32).first()
    names = (spec.student, spec.teacher)
    if names[0] == "head":
        maps = [side.predict(model, x) for model in (student, teacher)]
    else:
        maps = [heard(model, name, x) for model, name in zip((student, teacher), names, strict=True)]
    assert first_loss([spec], student, teacher) == pytest.approx(spec.weight * layer_loss(spec, *maps, xp=np_xp), rel=1e-4)
    plain = type(spec)()
    outputs = [side.predict(model, x) for model in (student, teacher)]
    assert first_loss([plain], tower(4), teacher) == pytest.approx(
        plain.weight * layer_loss(plain, *outputs, xp=np_xp), rel=1e-4
    )


def test_a_projector_is_trained_and_thrown_away():
    """Only the first layer learns, through a projector from 4 to 6 channels and from 6×6 to 3×3 positions."""
    student, teacher = tower(4), tower(6, 1)
    names = set(student.state_dict())
    losses = {}
    for rate in (1e-9, 0.03):
        spec = Features("block.0", "block.1", learning_rate=rate)
        train = Train(epochs=15, learning_rate=1e-9, apply=[Distill(spec, student_weight=0)])
        _, step = run_training(student, train, teacher=teacher, val=None)
        losses[rate] = [row["loss"] for row in step.train["history"]]
    assert losses[0.03][-1] < 0.6 * losses[0.03][0]  # the projector alone
    assert losses[1e-9][-1] == pytest.approx(losses[1e-9][0], rel=1e-3)
    before = state_of(student)
    train = Train(epochs=4, learning_rate=0.01, apply=[Distill(Features("block.0", "block.1"), student_weight=0)])
    run_training(student, train, teacher=teacher, val=None)
    assert set(student.state_dict()) == names and not same_state(before, state_of(student))
    assert (student.head.weight == before["head.weight"]).all()  # which the loss does not reach


def test_hooks_are_gone_and_the_teacher_is_as_it_was():
    student, teacher = tower(), tower(6, 1)
    before = state_of(teacher)
    losses = [SoftTargets(), Features("block.0", "block.0"), RKD("head", "head")]
    run_training(student, Train(epochs=1, apply=[Distill(losses)]), teacher=teacher)
    assert same_state(before, state_of(teacher)) and all(p.grad is None for p in teacher.parameters())
    with pytest.raises(ModelError):
        run_training(student, Train(epochs=1, apply=[Distill([Features("block.0", "head")])]), teacher=teacher)
    for model in (student, teacher):
        assert not any(module._forward_hooks for module in model.modules())


def test_features_help_the_student():
    """Unlabelled, from the features below the head alone: the student's own come nearer to the teacher's."""
    student, teacher = tower(4), tower(4, 1)
    run_training(teacher, Train(epochs=6, learning_rate=0.02))
    train = Train(epochs=8, learning_rate=0.01, apply=[Distill(Features("block.1", "block.1"), student_weight=0)])
    _, step = run_training(student, train, teacher=teacher, val=None)
    history = [row["loss"] for row in step.train["history"]]
    assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (
            Features("conv9", "block.0"),
            r"'conv9' matches no layer of the student\. Its layers: block, block\.0, block\.1, head",
        ),
        (
            Features("block.*", "head"),
            r"'block\.\*' matches 2 layers of the student .* and 'head' 1 of the teacher .* match fewer",
        ),
        (Features("block", "block.0"), "'block' of the student was not called"),
        (AttentionTransfer("head", "head"), "'head' of the student and 'head' .* compares positions"),
        (Features("block.0", "head"), r"'block\.0' of the student and 'head' of the teacher: .*no common positions"),
    ],
)
def test_what_cannot_be_compared_is_named(loss, said):
    with pytest.raises(ModelError, match=said):
        run_training(tower(), Train(epochs=1, apply=[Distill(loss)]), teacher=tower(seed=1))


def test_a_student_much_larger_than_its_teacher_is_asked_about():
    with pytest.warns(UserWarning, match="student has 1,4.. parameters and its teacher 203. Were the two exchanged"):
        run_training(tower(12), Train(epochs=1, apply=[Distill()]), teacher=tower(4))


def test_length_and_channels():
    """Conv1d puts channels first, a transformer's layers last: both are projected by channels."""
    build = lambda width, seed: seeded(  # noqa: E731
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 36)), nn.Conv1d(1, width, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 3)
        ),
        seed,
    )
    x, y = batches(32).first()
    student, teacher = build(4, 0), build(8, 1)
    data = Batches((x.reshape(32, 36), y), "train", batch=16)
    train = Train(epochs=2, learning_rate=0.01, apply=[Distill([Features("1", "1"), PKT("3", "3")], student_weight=0)])
    _, step = run_training(student, train, teacher=teacher, train=data, val=None)
    assert np.isfinite(step.train["history"][-1]["loss"])


SPECS = [Features("a", "b"), AttentionTransfer("a", "b"), RKD(), SimilarityPreserving(), PKT()]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_the_piece_has_the_losss_gradients(spec):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, *shape, generator=generator, dtype=torch.float64) for shape in [(4, 2, 3), (2, 2, 3)])
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: side.layer_loss(spec, z, teacher.detach()), [student.requires_grad_()])
    side.layer_loss(spec, student, teacher).backward()
    assert teacher.grad is None
    for value in (0.0, 1.0, 1e4):  # where all examples are equal
        same = torch.full((3, 2, 2, 4), value, requires_grad=True)
        side.layer_loss(spec, same, torch.ones(3, 2, 2, 4)).backward()
        assert torch.isfinite(same.grad).all()
