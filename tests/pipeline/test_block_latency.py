"""Whole layers removed to a measured time."""

import numpy as np
import pytest

import whet
from residual_models import build, data_of
from whet import Layer, OutputChange, Prune
from whet.errors import BudgetError, ModelError, SpecError
from whet.pipeline import block_latency
from whet.runtimes.latency import alternate
from whet.runtimes.sessions import open_session


def test_the_choice_saves_enough_and_costs_least():
    importance, saved = {"a": 3.0, "b": 1.0, "c": 1.5, "d": 9.0}, {"a": 0.4, "b": 0.2, "c": 0.2, "d": 0.0}
    assert block_latency._least(importance, saved, 0.2) == ["b"]
    assert block_latency._least(importance, saved, 0.4) == ["b", "c"]  # 2.5 for what `a` saves for 3
    assert block_latency._least(importance, saved, 0.6) == ["a", "b"]
    assert block_latency._least(importance, saved, 0.8) == ["a", "b", "c"]
    with pytest.raises(BudgetError, match=r"save 0\.8 ms of 0\.9"):
        block_latency._least(importance, saved, 0.9)


@pytest.fixture
def quick(monkeypatch):
    import whet.pipeline.latency as latency

    monkeypatch.setattr(latency, "_SECONDS", 0.2)
    monkeypatch.setattr(latency, "ROUNDS", 1)


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_layers_leave_until_the_file_is_as_fast_as_asked(framework, tmp_path, quick):
    model, (x, _) = build(framework, 32), data_of(framework)
    made = whet.prune(model, Prune(latency=0.9, granularity=Layer()), example=x, target="onnxruntime", progress=False)
    step = made.steps[0]
    told, layers = step.control["latency"], step.control["layers"]
    assert told["target"] == told["table_target"] == "onnxruntime" and told["files"] == 2 and len(told["table"]) == 3
    assert (told["missed"] is None) == (told["measured"] <= 0.9 * 1.02) and "asked for 0.90" in told["says"]
    assert layers["removed"] == [row["name"] for row in step.changed] and 1 <= len(layers["removed"]) <= 3
    assert whet.inspect(made.model, x).macs == layers["after"]["macs"] < layers["before"]["macs"]
    first, second = (row["saved_ms"] for row in told["table"][:2])
    assert first == second  # two blocks that are alike
    files = [whet.prune(model, Prune(0.01), example=x, progress=False), made]
    paths = [c.export(tmp_path / f"{i}.onnx", "onnxruntime") for i, c in enumerate(files)]
    before, after = alternate([open_session(path, threads=1) for path in paths], x[:1], budget_s=0.3)
    assert np.median(after.ms) < 0.98 * np.median(before.ms)


def test_what_all_layers_together_cannot_give_is_refused(quick):
    model, (x, _) = build("torch"), data_of("torch")
    with pytest.raises(ModelError, match=r"allows .* the file can come down to .* ms\. Allow more, or loosen keep="):
        whet.prune(model, Prune(latency=0.01, granularity=Layer()), example=x, progress=False)
    with pytest.raises(SpecError, match="fits Prune"):
        whet.prune(model, Prune(latency="5 s", granularity=Layer()), example=x, progress=False)
    with pytest.raises(SpecError, match="leave greedy= out"):
        Prune(latency=0.5, granularity=Layer(), criterion=OutputChange(greedy=True))
