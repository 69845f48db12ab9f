"""What a report says, before it is drawn."""

from __future__ import annotations

import pytest

from report_samples import EVIL, sample_report
from whet.errors import RuntimeFileError
from whet.records import Report
from whet.report.view import Layer, view_of


def row(view, label):
    return next(row for row in view.rows if row.label.startswith(label))


def test_before_and_after() -> None:
    view = view_of(Report(sample_report()))
    assert row(view, "accuracy").original == "97.5 % [95.5, 98.5]"
    assert row(view, "accuracy").change == "drop 0.28 points [-0.83, 1.39]"
    assert row(view, "accuracy").tone == ""  # the interval holds zero: neither good nor bad is sure
    assert (row(view, "file").compressed, row(view, "file").change) == ("27.1 kB", "0.303 ×")
    assert row(view, "latency p50").change == "1.29 × [1.21, 1.33] SLOWER"
    assert row(view, "latency p50").tone == "bad"
    assert row(view, "stored").compressed == "int8 20.9 kB, int32 320 B, float32 96 B"
    assert row(view, "computed").compressed.startswith("QLinearConv uint8 ×2")
    assert "SLOWER" in view.headline


def test_a_sure_drop_is_bad_and_a_larger_file_is_said_to_be() -> None:
    data = sample_report()
    data["change"]["metric_drop"] = {"value": 0.05, "ci95": [0.02, 0.08]}
    data["change"]["size_ratio"] = 1.5
    view = view_of(Report(data))
    assert row(view, "accuracy").tone == "bad"
    assert row(view, "file").change == "1.50 × LARGER"
    assert row(view, "file").tone == "bad"


def test_files_that_were_not_timed_say_so() -> None:
    data = sample_report()
    data["original"]["latency_ms"] = data["compressed"]["latency_ms"] = None
    data["change"]["latency_ratio"] = {"value": None, "ci95": None, "reason": "the files were not timed"}
    view = view_of(Report(data))
    assert row(view, "latency").compressed == "not measured"
    assert "latency" not in view.headline
    assert "No interval for the latency: the files were not timed" in view.notes


def test_layers_gather_what_all_steps_said() -> None:
    view = view_of(Report(sample_report()))
    drawn = {number: step["changed"][0]["histogram"] for number, step in enumerate(sample_report()["steps"], 1)}
    assert view.layers[0] == Layer("conv1.weight", 90, None, None, 0.8, 8, "symmetric per channel", 38.1, histograms=drawn)
    assert [layer.name for layer in view.layers] == ["conv1.weight", "conv2.weight", f"{EVIL}.weight", "fc2.weight"]


def test_steps_tell_how_training_ended_and_what_matched_nothing() -> None:
    train, quantize = view_of(Report(sample_report())).steps
    assert train.stop == "stopped: no improvement for 5 epochs; weights of epoch 18 kept, 24 epochs run"
    assert (quantize.stop, quantize.unmatched) == (None, ("classifier*",))


def test_a_missed_budget() -> None:
    budget = {"spec": {"Budget": {}}, "met": False, "missed": ["size is 3 bytes"], "decided_on": "val", "reported_on": "val"}
    view = view_of(Report(sample_report(budget=budget)))
    assert view.met is False
    assert view.verdict == "Budget MISSED: Budget(), decided on val."
    assert view.missed == ("size is 3 bytes",)
    assert any("optimistic" in note for note in view.notes)


def test_warnings_come_once_and_say_whose_they_are() -> None:
    data = sample_report(warnings=["same"])
    data["compressed"]["warnings"] = ["same", "new"]
    data["original"]["warnings"] = ["busy"]
    assert view_of(Report(data)).warnings == ("same", "new", "the original: busy")


@pytest.mark.parametrize("path", ["original.bytes", "change.metric_drop.value", "compressed.metric.name", "steps"])
def test_a_missing_entry_is_named(path) -> None:
    data = sample_report()
    *parents, last = path.split(".")
    inner = data
    for parent in parents:
        inner = inner[parent]
    del inner[last]
    with pytest.raises(RuntimeFileError, match=f"no entry '{path}'"):
        view_of(Report(data))


def removal(parameters: int, shape: list[int], left: list[int], **known) -> dict:
    """A step whose removal made one weight smaller."""
    lost = 1 - left[0] / shape[0]
    row = {"name": "conv1.weight", "parameters": parameters, "removed": lost, "shape": shape, "left": left}
    return {"spec": {"Prune": {}}, "changed": [row], "skipped": [], "seconds": 1.0, "train": None, "removal": known}


def test_what_left_is_told_apart_from_zeros() -> None:
    data, solved = sample_report(), [{"name": "conv2.weight", "silenced_db": 3.0, "output_db": 9.5}]
    first = removal(90, [10, 9], [5, 9], oracle=2e-7, change=0.25, reconstructed={"layers": solved, "skipped": []})
    data["steps"] = [first, removal(45, [5, 9], [4, 9], oracle=0.0, change=0.1)]
    view = view_of(Report(data))
    (layer,) = view.layers
    assert (layer.removed, layer.shapes, layer.parameters, layer.sparsity) == (0.6, ((10, 9), (4, 9)), 36, None)
    said = "90 → 45 parameters in the weights that lost some; checked: within 2.00e-07 of the same model with those at zero; "
    assert view.steps[0].removal == f"{said}outputs moved by 0.250 of the largest; 1 weight solved anew"
    assert view.steps[0].solved == tuple(solved) and view.steps[1].solved == ()
    assert "45 → 36 parameters" in view.steps[1].removal and "solved" not in view.steps[1].removal


def test_a_step_without_removal_says_nothing_of_one() -> None:
    assert {step.removal for step in view_of(Report(sample_report())).steps} == {None}
