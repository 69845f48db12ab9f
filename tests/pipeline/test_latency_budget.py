"""Pruning to a measured time, and by measured sensitivity."""

import numpy as np
import pytest

import whet
from residual_models import build, data_of
from whet import BySensitivity, Channel, Prune, Reconstruct
from whet.errors import DataError, ModelError, SpecError
from whet.pipeline.latency_table import Axis, Times
from whet.runtimes.latency import alternate
from whet.runtimes.pinned import pinned
from whet.runtimes.sessions import open_session

QUIET = {"progress": False}


def test_times_are_interpolated_between_what_was_measured():
    times = Times(np.array([8, 16]), np.array([4, 8, 16]), np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]))
    assert times.at(8, 4) == 1.0 and times.at(16, 16) == 6.0
    assert times.at(12, 8) == 3.0 and times.at(16, 12) == 5.0
    assert times.at(8, 2) == 1.0  # below what was measured the least is taken


def test_an_axis_loses_what_each_family_holds_of_it():
    axis = Axis(20, ((0, 1), (3, 2)))
    assert axis.width(lambda family: {0: 4, 3: 3}[family]) == 10


def test_a_thread_is_pinned_and_let_go():
    import os

    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system does not pin threads")
    before = os.sched_getaffinity(0)
    with pinned() as core:
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before


@pytest.fixture
def small(monkeypatch):
    """Small tables, quickly timed."""
    import whet.pipeline.latency as latency
    import whet.pipeline.latency_table as table

    monkeypatch.setattr(table, "_SECONDS", 0.01)
    monkeypatch.setattr(table, "MOST_WIDTHS", 2)
    monkeypatch.setattr(latency, "MOST_WIDTHS", 2)
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(latency, "_SECONDS", 0.2)


INNER = {"torch": ("first.0.conv1", "first.1.conv1"), "keras": ("*",)}


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_the_file_becomes_faster_and_is_measured_beside_the_original(framework, tmp_path, small):
    model, (x, _) = build(framework, 32), data_of(framework)
    options = {"round_to": 32 if framework == "keras" else 8, "include": INNER[framework]}
    spec = Prune(latency=0.9, granularity=Channel(), reconstruct=Reconstruct(batches=1), **options)
    made = whet.prune(model, spec, train=[x], target="onnxruntime", **QUIET)
    assert made.steps[0].removal["reconstructed"]["layers"]
    told = made.steps[0].control["latency"]
    assert told["target"] == told["table_target"] == "onnxruntime" and told["limit"] == pytest.approx(0.9)
    assert told["files"] >= 4 and len(told["trials"]) == 1 and all(row["ms"] > 0 for row in told["table"])
    assert (told["missed"] is None) == (told["measured"] <= 0.9 * 1.02)
    assert "asked for 0.90" in told["says"] and f"promised {told['predicted']:.2f}" in told["says"]
    assert made.steps[0].spec["Prune"]["latency"] == 0.9 and any(row["shape"] != row["left"] for row in made.steps[0].changed)
    files = [whet.prune(model, Prune(0.01), example=x, **QUIET), made]
    paths = [c.export(tmp_path / f"{i}.onnx", "onnxruntime") for i, c in enumerate(files)]
    before, after = alternate([open_session(path, threads=1) for path in paths], x[:1], budget_s=0.3)
    assert np.median(after.ms) < 0.98 * np.median(before.ms)


def test_what_no_width_can_give_is_refused_with_what_it_can(small):
    x, _ = data_of("torch")
    spec = Prune(latency=0.01, granularity=Channel(), round_to=4, include=INNER["torch"])
    with pytest.raises(ModelError, match=r"allows .* and by the table of its layers the file can come down to"):
        whet.prune(build("torch"), spec, example=x, **QUIET)
    with pytest.raises(SpecError, match="fits Prune"):
        whet.prune(build("torch"), Prune(latency="5 s", granularity=Channel()), example=x, **QUIET)


# --- by sensitivity


def error_of(made, framework):
    x, _ = data_of(framework)
    model = build(framework)
    reference = made.side.predict(model, x).astype(np.float64)
    return np.sum((made.side.predict(made.model, x) - reference) ** 2) / np.sum(reference**2)


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_masks_by_sensitivity_are_exact_and_cost_less_than_uniform_ones(framework):
    data = [data_of(framework)]
    spec = Prune(0.5, allocation=BySensitivity(trials=2))
    made, plain = (whet.prune(build(framework), s, train=data, **QUIET) for s in (spec, Prune(0.5)))
    rows = made.steps[0].control["sensitivity"]["layers"]
    sizes = [mask.size for mask in plain.masks.values()]
    removed = sum(int(np.sum(mask == 0)) for mask in made.masks.values())
    assert removed == round(0.5 * sum(sizes)) and len(rows) == len(sizes)
    assert all(len(row["tried"]) == 2 for row in rows)
    assert error_of(made, framework) < 0.7 * error_of(plain, framework)
    assert made.steps[0].spec["Prune"]["allocation"] == {"BySensitivity": {"trials": 2}}


def test_channels_by_sensitivity_cost_less_than_uniform_ones():
    data = [data_of("torch")]
    spec = Prune(0.5, granularity=Channel(), allocation=BySensitivity(trials=3), round_to=2)
    made = whet.prune(build("torch"), spec, train=data, **QUIET)
    plain = whet.prune(build("torch"), Prune(0.5, granularity=Channel(), round_to=2), train=data, **QUIET)
    assert error_of(made, "torch") < 0.7 * error_of(plain, "torch")
    rows = made.steps[0].control["sensitivity"]["layers"]
    for row in rows:
        assert row["tried"][0] == 0 and len(row["tried"]) == len(row["options"])


def test_more_than_the_layers_may_lose_is_refused():
    x, _ = data_of("torch")
    spec = Prune(0.6, allocation=BySensitivity(trials=1, most=0.5))
    with pytest.raises(ModelError, match=r"is more than BySensitivity\(most=0.5\) lets all layers lose"):
        whet.prune(build("torch"), spec, example=x, **QUIET)
    with pytest.raises(DataError, match="needs a batch"):
        whet.prune(build("torch"), spec, **QUIET)
