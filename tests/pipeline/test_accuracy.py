"""Accuracy control: as few layers in float as let the drop on the exported file hold."""

from dataclasses import replace

import numpy as np
import pytest

import whet
from whet import Int, PerTensor, Quantize, WhetError
from whet.errors import DataError
from whet.pipeline.accuracy import _order, _search, _Trial
from whet.records import Estimate, Step

QUIET = {"progress": False}
COARSE = Int(2, symmetric=False, granularity=PerTensor())  # of activations: it costs


def noisy(b, n=400):
    """Examples that are hard to tell apart, so that rounding changes answers."""
    x, y = b.data(n, 1)
    return x + np.random.default_rng(3).normal(0, 1.2, x.shape).astype(np.float32), y


def trial(reverted, worst):
    return _Trial(reverted, None, Step({}, (), (), 0.0), Estimate(worst, (worst, worst)))


@pytest.mark.parametrize("layers", [2, 3, 7, 20, 53])
@pytest.mark.parametrize("needed", [1, 2, 5, 19, 52])
def test_the_fewest_layers_are_found_in_a_bounded_number_of_files(layers, needed):
    names = tuple(f"layer{i}" for i in range(layers))
    trials = [trial((), 1.0)]
    _search(names, lambda kept: trial(kept, 0.0 if len(kept) >= needed else 0.5), 0.01, trials)
    assert len(trials) <= 1 + np.ceil(np.log2(layers))
    best = min(trials, key=lambda one: _order(one, 0.01))
    assert all(one.reverted == names[: len(one.reverted)] for one in trials)
    if needed < layers:
        assert best.reverted == names[:needed]
    else:  # none holds: the least drop
        assert best.worst == min(one.worst for one in trials)


def test_of_those_that_miss_the_least_drop_is_kept():
    trials = [trial((), 0.3), trial(("a",), 0.1), trial(("a", "b"), 0.2)]
    assert min(trials, key=lambda one: _order(one, 0.01)).reverted == ("a",)
    assert _Trial((), None, None, Estimate(0.4)).worst == 0.4


def test_layers_go_back_until_the_drop_on_the_file_holds(b, tmp_path):
    model, val = b.build(), noisy(b)
    options = {"calibration": b.data(64)[0], "val": val, "target": "onnxruntime", **QUIET}
    spec = Quantize(Int(2), COARSE)
    assert whet.quantize(model, spec, **options).steps[-1].control is None
    strict = whet.quantize(model, replace(spec, max_drop=0.01), **options).steps[-1].control["max_drop"]
    assert not strict["met"] and "layers are in float" in strict["missed"]
    ends = [one["drop"]["ci95"][1] for one in strict["trials"]]
    limit = (ends[0] + ends[1]) / 2
    assert ends[1] == strict["drop"]["ci95"][1] < ends[0]
    made = whet.quantize(model, replace(spec, max_drop=limit), **options)
    (step,) = made.steps
    record = step.control["max_drop"]
    first, *others = record["trials"]
    assert not first["held"] and others and record["met"] and len(record["reverted"]) == 1
    assert record["drop"]["ci95"][1] <= limit < first["drop"]["ci95"][1]
    assert "keep" not in step.spec["Quantize"] and made.plan.spec.keep == tuple(record["reverted"])
    (row,) = [row for row in step.skipped if row["name"] == record["reverted"][0]]
    assert "put back to float" in row["reason"]
    assert len(made.plan.weights) == 1 and all(row["sensitivity"] > 0 for row in step.changed)
    # what was recorded is what the file does
    files = [
        whet.measure(made.export(tmp_path / "m.onnx"), val, **QUIET),
        whet.measure(model, val, target="onnxruntime", **QUIET),
    ]
    assert files[1].metric["value"] - files[0].metric["value"] == pytest.approx(record["drop"]["value"])
    again = whet.quantize(model, made.plan.spec, **options)
    assert again.plan.weights.keys() == made.plan.weights.keys()


def test_a_drop_that_holds_changes_nothing(b):
    model, val = b.build(), noisy(b)
    options = {"calibration": b.data(64)[0], "val": val, "target": "onnxruntime", **QUIET}
    made = whet.quantize(model, Quantize(max_drop=0.2), **options)
    record = made.steps[-1].control["max_drop"]
    assert record["met"] and record["reverted"] == [] and len(record["trials"]) == 1 and record["missed"] is None
    plain = whet.quantize(model, Quantize(), **options)
    assert made.plan.values.keys() == plain.plan.values.keys() and made.plan.weights.keys() == plain.plan.weights.keys()


def test_what_never_holds_is_said(b):
    options = {"calibration": b.data(64)[0], "target": "onnxruntime", **QUIET}
    made = whet.quantize(b.build(), Quantize(Int(2), COARSE, max_drop=0.001), val=noisy(b, 50), **options)
    record = made.steps[-1].control["max_drop"]
    assert not record["met"] and len(record["trials"]) == 1
    assert "50 examples" in record["missed"] and "give about" in record["missed"]


def test_labelled_data_is_needed(b):
    with pytest.raises(DataError, match="val="):
        whet.quantize(b.build(), Quantize(max_drop=0.01), calibration=b.data(16)[0], **QUIET)
    with pytest.raises(WhetError, match="targets"):
        whet.quantize(b.build(), Quantize(max_drop=0.01), calibration=b.data(16)[0], val=b.data(16)[0], **QUIET)


def test_it_is_saved_and_reported(b, tmp_path):
    made = whet.quantize(
        b.build(), Quantize(max_drop=0.2), calibration=b.data(64)[0], val=b.data(96, 1), target="onnxruntime", **QUIET
    )
    again = whet.load(made.save(tmp_path / "saved"), b.build())
    assert again.steps[-1].control == made.steps[-1].control
    assert again.report.data["steps"][-1]["control"]["max_drop"]["met"]
