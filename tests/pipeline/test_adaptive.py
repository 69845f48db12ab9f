"""Adaptive: a scheme for every layer, of least measured damage within the budget, and why."""

import itertools

import numpy as np
import pytest

import whet
from whet import Adaptive, Budget, Int, KMeans, Quantize
from whet.errors import BudgetError, DataError, SpecError
from whet.pipeline.adaptive import _Table, fixed_spec
from whet.pipeline.sensitivity import Damage, Sensitivity

QUIET = {"progress": False}
THREE = (Int(8), Int(4), Int(2))


def table(damages, parameters=(100, 400, 1000), bits=(8, 4, 2)):
    """Layers with the damage of each candidate."""
    rows = [
        Damage(f"layer{i}", j, f"int{bit}", bit, n, n * bit // 8, damage, weights=(f"layer{i}.weight",))
        for i, (n, row) in enumerate(zip(parameters, damages, strict=True))
        for j, (bit, damage) in enumerate(zip(bits, row, strict=True))
    ]
    return _Table(Sensitivity((Quantize(),) * len(bits), tuple(rows), "val", 8), len(bits))


DAMAGES = ((0.001, 0.5, 3.0), (0.002, 0.02, 0.9), (0.001, 0.01, 0.4))


@pytest.mark.parametrize("bits", [2, 2.4, 3, 4, 4.5, 5, 6.7, 8])
def test_the_choice_is_the_best_of_all(bits):
    rows = table(DAMAGES)
    choice = rows.within(int(bits * 1500), "bits")
    sizes = [(n * 8, n * 4, n * 2) for n in (100, 400, 1000)]
    fits = [c for c in itertools.product(range(3), repeat=3) if sum(s[i] for s, i in zip(sizes, c, strict=True)) <= bits * 1500]
    best = min(sum(row[i] for row, i in zip(DAMAGES, c, strict=True)) for c in fits)
    assert sum(row.damage for row in rows.chosen(choice)) == pytest.approx(best)
    assert rows.average(choice) <= bits


def test_why():
    rows = table(DAMAGES)
    choice = rows.within(6000, "bits")
    why = rows.reasons(choice)["layer0.weight"]
    assert why["sensitivity"] == 0.001
    assert why["why"] == "alone it costs 0.00100; int4 would cost 0.500 and save 50 B"
    assert "int4 would cost 0.0100 and take 250 B more" in rows.reasons(choice)["layer2.weight"]["why"]


def test_a_budget_below_the_smallest_candidates():
    with pytest.raises(BudgetError, match="2 bits on average") as error:
        table(DAMAGES).within(2999, "bits")
    assert error.value.least == 2
    with pytest.raises(BudgetError, match="375 B"):
        table(DAMAGES).within(374, "bytes")


def test_overrides_name_children_before_parents_and_leave_the_users_own():
    rows = [
        Damage(layer, j, "x", bit, 10, bit, 1.0 / bit, weights=(f"{layer}.w",))
        for layer in ("a", "a.b", "odd[1]", "mine")
        for j, bit in enumerate((8, 4))
    ]
    found = _Table(Sensitivity((Quantize(),) * 2, tuple(rows), "val", 8), 2)
    spec = Quantize(Adaptive((Int(8), Int(4))), overrides={"mi*": Int(5)})
    fixed = fixed_spec(spec, found, found.within(320, "bits"))
    assert list(fixed.overrides) == ["mi*", "odd[[]1]", "a.b", "a"] and fixed.overrides["a.b"] == Int(8)
    assert fixed.weights == Int(8)


@pytest.mark.parametrize(("budget", "limit"), [(Budget(bits=4.5), 4.5), (Budget(bits=3), 3), (Budget(bits=8), 8)])
def test_average_bits_hold(b, budget, limit):
    made = whet.quantize(b.build(), Quantize(Adaptive(THREE, budget=budget)), calibration=b.data(64)[0], **QUIET)
    (step,) = made.steps
    bits = sum(row["bits"] * row["parameters"] for row in step.changed) / sum(row["parameters"] for row in step.changed)
    record = step.control["adaptive"]
    assert bits == pytest.approx(record["average_bits"]) and bits <= limit
    for row in step.changed:
        assert row["sensitivity"] > 0 and "alone it costs" in row["why"]
        assert made.plan.weights[row["name"]].bits == row["bits"]
    assert "Adaptive" in step.spec["Quantize"]["weights"]  # the recipe as it was given
    assert len(made.plan.spec.overrides) == 2
    if limit == 3:
        assert {row["bits"] for row in step.changed} == {2, 8}  # 54 weights and 288: what is left pays for 8 bits of the first


def test_bytes_hold_on_weights_alone_and_without_data(b):
    spec = Quantize(Adaptive((Int(8), Int(4), Int(2), KMeans(3)), budget=Budget(size="250 B")), None)
    made = whet.quantize(b.build(), spec, example=b.data(16)[0], target="onnxruntime", **QUIET)
    record = made.steps[-1].control["adaptive"]
    assert record["bytes"] <= 250 and record["float_bytes"] == 4 * 342 and record["measured_on"] == "example"
    x = b.data(32, 1)[0]
    assert np.isfinite(np.asarray(made.side.predict(made.model, x))).all()


def test_the_smallest_that_keeps_the_metric(b):
    x, y = b.data(300, 1)
    val = x + np.random.default_rng(3).normal(0, 1.2, x.shape).astype(np.float32), y
    options = {"calibration": b.data(64)[0], "val": val, **QUIET}
    trials = {}
    for limit in (0.0, 0.5):
        made = whet.quantize(b.build(), Quantize(Adaptive(THREE, budget=Budget(limit))), **options)
        record = made.steps[-1].control["adaptive"]
        trials[limit] = record
        held = [t["average_bits"] for t in record["trials"] if t["held"]]
        assert not held or record["average_bits"] == min(held)
        assert record["met"] == bool(held)
    assert trials[0.5]["average_bits"] == 2 and len(trials[0.5]["trials"]) == 1
    assert trials[0.0]["average_bits"] > 2 and len(trials[0.0]["trials"]) <= 8


def test_adaptive_and_max_drop_together(b):
    spec = Quantize(Adaptive(THREE, budget=Budget(bits=8)), max_drop=0.2)
    options = {"calibration": b.data(64)[0], "val": b.data(96, 1), "target": "onnxruntime", **QUIET}
    made = whet.quantize(b.build(), spec, **options)
    assert set(made.steps[-1].control) == {"adaptive", "max_drop"}


def test_what_adaptive_cannot_do(b):
    options = {"calibration": b.data(16)[0], **QUIET}
    with pytest.raises(DataError, match="val="):
        whet.quantize(b.build(), Quantize(Adaptive(THREE, budget=Budget(0.01))), **options)
    with pytest.raises(SpecError, match="both"):
        whet.quantize(b.build(), Quantize(Adaptive(THREE, budget=Budget(bits=4, size=0.5))), **options)
    with pytest.raises(SpecError, match="latency"):
        whet.quantize(b.build(), Quantize(Adaptive(THREE, budget=Budget(bits=4, latency=0.5))), **options)
    with pytest.raises(BudgetError):
        whet.quantize(b.build(), Quantize(Adaptive(THREE, budget=Budget(bits=1.5))), **options)


def test_it_runs_in_a_recipe(b):
    recipe = [Quantize(Adaptive(THREE, budget=Budget(bits=6)))]
    made = whet.compress(
        b.build(), train=b.data(64), val=b.data(64, 1), target="onnxruntime", recipe=recipe, budget=Budget(0.5), **QUIET
    )
    assert made.report.data["steps"][0]["control"]["adaptive"]["average_bits"] <= 6
    assert made.report.data["recipe"]["recipe"][0]["Quantize"]["weights"]["Adaptive"]["budget"]["Budget"]["bits"] == 6
