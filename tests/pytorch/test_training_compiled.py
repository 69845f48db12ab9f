"""Forward passes under torch.compile: the same training, and never a silent return to plain PyTorch."""

import pytest
import torch
from torch import nn

from torch_parts import run_training, same_state, seeded, small, state_of
from whet import torch as side
from whet.errors import ModelError, SpecError
from whet.specs import QAT, AttentionTransfer, Cubic, Distill, Features, Int, Prune, Quantize, SoftTargets, Train
from whet.torch import compiling

RAMP = Prune(0.5, schedule=Cubic(end=0.5, frequency=1))
SPEC = {"epochs": 2, "learning_rate": 0.01}


def both(build, backend, **fields):
    """Weights and notes after training plain, and after training compiled."""
    found = []
    for compile in (False, backend):
        model = build()
        _, step = run_training(model, Train(**SPEC, compile=compile, **fields), teacher=small(seed=3))
        found.append((state_of(model), step.train["notes"]))
    return found


def test_masks_a_teacher_and_losses_on_layers_train_alike():
    losses = [SoftTargets(), Features("conv", "conv"), AttentionTransfer("bn", "bn")]
    (plain, _), (compiled, notes) = both(small, "eager", apply=[RAMP, Distill(losses)])
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert "compiled by eager in 3 graphs" in notes  # the student trains; it and the teacher look at the first batch
    assert int((compiled["head.weight"] == 0).sum()) == 96


class Broken(nn.Module):
    """Prints between two layers, where a graph has to end."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(36, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.one(x.flatten(1)))
        torch._dynamo.graph_break()
        return self.two(x)


def test_what_cannot_be_compiled_is_told():
    (plain, _), (compiled, notes) = both(lambda: seeded(Broken), "eager")
    assert same_state(plain, compiled)
    assert notes[0].startswith(
        "compiled by eager in 2 graphs, and what lies between runs as it is (1 graph breaks; the first: "
    )


def test_a_model_of_which_nothing_is_compiled_and_a_compiler_that_fails_are_errors(monkeypatch):
    model = small()
    model.forward = torch.compiler.disable(model.forward)
    with pytest.raises(ModelError, match=r"torch\.compile compiled nothing of the model.*Leave Train\.compile out"):
        run_training(model, Train(**SPEC, compile="eager"))

    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiling.Compiler, "__call__", lambda self, model: torch.compile(model, backend=broken))
    with pytest.raises(ModelError, match=r"torch\.compile failed .*no compiler here.*compile='aot_eager'"):
        run_training(small(), Train(**SPEC, compile="eager"))


def test_values_that_are_not_allowed():
    with pytest.raises(SpecError, match=r"backend 'fast', and torch\.compile knows .*inductor"):
        run_training(small(), Train(**SPEC, compile="fast"))
    with pytest.raises(SpecError, match=r"Train\.compile"):
        Train(compile=3)
    with pytest.raises(SpecError, match=r"hooks that torch\.compile does not trace"):
        side.quantize_aware(small(), Quantize(Int(4), qat=QAT()), None, Train(compile=True), None)
