"""The verbs, and how they chain."""

from pathlib import Path

import numpy as np
import pytest

import whet
from bench import same
from whet import Cubic, Distill, Float, Int, Prune, Quantize, Train
from whet.graph.summary import Summary

QUIET = {"progress": False}


def zeros(compressed):
    return sum(int((mask == 0).sum()) for mask in compressed.masks.values())


def test_verbs_chain_and_leave_what_they_were_given(b):
    model = b.build()
    pruned = whet.prune(model, Prune(0.5), **QUIET)
    before, masks, steps = b.frozen(pruned.model), dict(pruned.masks), pruned.steps
    tuned = whet.fit(pruned, Train(epochs=2), train=b.data(96), val=b.data(48, 1), **QUIET)
    taught = whet.distill(tuned, model, Distill(), fit=Train(epochs=1), train=b.data(96), **QUIET)
    made = whet.quantize(taught, calibration=b.data(64)[0], **QUIET)
    assert same(before, b.frozen(pruned.model)) and pruned.masks == masks and pruned.steps == steps
    assert [next(iter(step.spec)) for step in made.steps] == ["Prune", "Train", "Train", "Quantize"]
    assert (
        "quantized for" in repr(made) and repr(made).endswith("; Prune → Train → Train → Quantize>") and len(repr(made)) < 200
    )
    assert zeros(made) == zeros(pruned) == round(0.5 * 54) + round(0.5 * 288)
    assert (pruned.is_simulated, made.is_simulated) == (False, True)
    assert (pruned.target, made.target) == (None, b.target)
    for name, mask in made.masks.items():
        assert np.array_equal(mask, masks[name])


def test_pruning_twice_goes_on_from_the_first(b):
    once = whet.prune(b.build(), Prune(0.3), **QUIET)
    twice = whet.prune(once, Prune(0.6), **QUIET)
    for name, mask in once.masks.items():
        assert not np.any(twice.masks[name][mask == 0])
    assert zeros(twice) > zeros(once)


def test_prune_with_training_is_train_with_pruning(b):
    spec, fit, data = (
        Prune(0.5, schedule=Cubic(frequency=1)),
        Train(epochs=2),
        {"train": b.data(96), "val": b.data(48, 1), **QUIET},
    )
    one = whet.prune(b.build(), spec, fit=fit, **data)
    other = whet.fit(b.build(), Train(epochs=2, apply=spec), **data)
    assert one.steps[0].spec == other.steps[0].spec
    assert same((b.weights(one.model), 0), (b.weights(other.model), 0))


def test_training_makes_it_better(b):
    data = {"train": b.data(192, 4), "val": b.data(48, 1), **QUIET}
    ruined = whet.prune(b.build(), Prune(0.8), **QUIET)
    healed = whet.fit(ruined, Train(epochs=8, learning_rate=5e-3), **data)
    scores = [whet.measure(made.model, b.data(96, 7), **QUIET).metric["value"] for made in (ruined, healed)]
    assert scores[1] >= scores[0] and scores[1] > 0.9


def test_measure_takes_a_model_a_result_and_a_file(b, tmp_path):
    made = whet.quantize(b.build(), calibration=b.data(64)[0], **QUIET)
    path = made.export(tmp_path / f"model{b.suffix}")
    data = b.data(48, 1)
    by_file, by_result, by_model = (whet.measure(item, data, **QUIET) for item in (path, made, b.build()))
    assert by_file.metric == by_result.metric and by_file.bytes == by_result.bytes > 0
    assert by_result.placement["target"] == b.target and by_file.placement is None
    assert by_model.file == "" and by_model.runtime["name"] == b.name and by_model.metric["value"] > 0.9
    exported = whet.measure(b.build(), data, target=b.target, **QUIET)
    assert exported.bytes > by_file.bytes or exported.dtypes["stored"].get("int8") is None
    assert exported.placement is None and exported.metric["value"] == by_model.metric["value"]


def test_a_file_may_be_named_by_text(b, tmp_path):
    path = whet.prune(b.build(), Prune(0.5), train=b.data(8), **QUIET).export(str(tmp_path / f"m{b.suffix}"))
    assert isinstance(path, Path)
    assert whet.measure(str(path), b.data(8), **QUIET).metric["n"] == 8


def test_inspect(b):
    model = b.build()
    before = b.frozen(model)
    for given in (model, whet.prune(model, Prune(0.5), **QUIET)):
        summary = whet.inspect(given, b.data(4)[0])
        assert isinstance(summary, Summary) and "conv" in str(summary) and "head" in str(summary)
    assert same(before, b.frozen(model))


def test_weights_only_needs_an_example_and_no_calibration(b):
    for spec in (Quantize(Int(8), None), Quantize(Float("float16"), None)):
        made = whet.quantize(b.build(), spec, example=b.data(2)[0], **QUIET)
        assert made.is_simulated and not made.plan.values
    with pytest.raises(whet.WhetError, match="calibration= or example="):
        whet.quantize(b.build(), Quantize(Int(8), None), **QUIET)


def test_an_own_loss_an_own_metric_and_no_val(b):
    def margin(outputs, targets):
        return outputs[np.arange(len(targets)), targets] - outputs.mean(1)

    made = whet.fit(b.build(), Train(epochs=1), train=b.data(96), val=b.data(48, 1), metric=margin, **QUIET)
    assert made.steps[0].train["metric"] == "margin"
    alone = whet.fit(b.build(), Train(epochs=1), train=b.data(96), **QUIET)
    assert alone.steps[0].train["metric"] == "loss on train" and "no val" in alone.steps[0].train["notes"][0]


def test_the_frameworks_own_loader_is_data_like_any(b):
    x, y = b.data(64)
    made = [whet.quantize(b.build(), calibration=data, **QUIET) for data in ([x[:32], x[32:]], b.loader(x, y), (x, y))]
    for name, params in made[0].plan.values.items():
        assert all(other.plan.values[name].scale == params.scale for other in made)
    scores = [whet.measure(b.build(), data, **QUIET).metric for data in ((x, y), b.loader(x, y))]
    assert scores[0] == scores[1]
