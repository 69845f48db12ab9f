"""Each layer alone: what is measured is what that layer's quantization does, in both frameworks."""

import numpy as np
import pytest

import whet
from bench import sqnr
from whet import Dynamic, Int, KMeans, Quantize, WhetError
from whet.data import Batches
from whet.errors import DataError, SpecError
from whet.graph.nodes import Graph, Node
from whet.graph.placement import Plan
from whet.graph.variants import parts_of, restricted
from whet.pipeline.compressed import start
from whet.pipeline.sensitivity import Damage, Sensitivity, classes_of, log_probabilities, stored_bytes
from whet.specs import find_target

QUIET = {"progress": False}


@pytest.fixture
def solved(b):
    """A model, its plan and a running copy of which parts can be switched on."""

    def make(spec, target=None):
        made = start(b.build(), example=b.data(16)[0])
        rules = find_target(target, b.name)
        options = {"calibration": Batches(b.data(64)[0], "calibration"), "example": made.example, "progress": False}
        plan, step = made.side.quantize(made.float_model, spec, rules, **options)
        variants = made.side.variants(made.float_model, plan, made.example)
        return made, plan, variants, [row["name"] for row in step.changed]

    return make


def test_every_part_together_is_the_simulation_and_none_is_the_float_model(b, solved):
    made, plan, variants, changed = solved(Quantize(), "onnxruntime")
    x = b.data(32, 3)[0]
    whole = made.side.predict(made.side.simulate(made.float_model, plan), x)
    variants.use(plan)
    assert sqnr(whole, variants.predict(x)) > 60
    variants.use(restricted(plan, (), changed))
    none = variants.predict(x)
    assert sqnr(made.side.predict(made.float_model, x), none) > 90
    assert sqnr(whole, none) < 50
    variants.use(plan)
    assert sqnr(whole, variants.predict(x)) > 60


def test_a_part_is_its_weights_and_what_it_reads(b, solved):
    _, plan, variants, changed = solved(Quantize())
    parts = parts_of(variants.graph, plan, changed)
    assert [part.layer for part in parts] == ["conv", "head"]
    assert sorted(name for part in parts for name in part.weights) == sorted(changed)
    first = restricted(plan, parts[:1], changed)
    assert set(first.weights) == set(parts[0].weights) and set(first.values) == {"input:0"}
    assert len(first.biases) == 1 and plan.biases.keys() > first.biases.keys()


def test_weights_alone_are_those_of_the_simulation(b):
    """One layer, weight-only: the same as `whet.quantize(include=…)`."""
    model, (x, _) = b.build(), b.data(48, 1)
    found = whet.sensitivity(model, Int(2), calibration=x, **QUIET)
    for layer in ("conv", "head"):
        made = whet.quantize(model, Quantize(Int(2), None, include=(layer,)), example=x, **QUIET)
        before, after = made.side.predict(model, x), made.side.predict(made.model, x)
        assert found.of(layer).sqnr_db == pytest.approx(sqnr(before, after), abs=0.05)


def test_dynamic_activations_are_switched_too(b, solved):
    made, plan, variants, changed = solved(Quantize(Int(8), Dynamic()), "onnxruntime")
    x = b.data(16, 2)[0]
    (conv, head) = parts_of(variants.graph, plan, changed)
    assert conv.calls or head.calls
    variants.use(plan)
    assert sqnr(made.side.predict(made.side.simulate(made.float_model, plan), x), variants.predict(x)) > 90
    both = {name for part in (conv, head) for name in part.calls}
    assert both == set(plan.dynamic)


def test_fewer_bits_cost_more_and_rank_first(b):
    specs = [Quantize(Int(bits), None) for bits in (8, 4, 2)]
    found = whet.sensitivity(b.build(), specs, calibration=b.data(64)[0], val=b.data(96, 1), **QUIET)
    assert found.measured_on == "val" and found.examples == 96 and found.metric["name"] == "accuracy"
    for layer in found.layers:
        eight, four, two = (found.of(layer, index) for index in range(3))
        assert eight.damage < four.damage < two.damage and eight.noise < four.noise < two.noise
        assert (eight.bits, four.bits, two.bits) == (8, 4, 2) and eight.bytes >= four.bytes >= two.bytes > 0
        low, high = two.drop.ci95
        assert low <= two.drop.value <= high
    worst = found.ranked(2)
    assert found.of(worst[0], 2).damage >= found.of(worst[1], 2).damage
    text = str(found)
    assert all(layer in text for layer in found.layers) and "int2" in text and "accuracy drop" in text
    plain = found.to_dict()
    assert len(plain["rows"]) == 6 and plain["rows"][0]["drop"]["ci95"] and "<table>" in found._repr_html_()


def test_the_models_of_the_user_are_untouched(b):
    model = b.build()
    before = b.frozen(model)[0]
    whet.sensitivity(model, [Quantize(), KMeans(2)], calibration=b.data(32)[0], **QUIET)
    after = b.frozen(model)[0]
    assert before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)


def test_labels_are_not_needed(b):
    found = whet.sensitivity(b.regressor(), Int(3), calibration=np.ones((8, 4), np.float32), **QUIET)
    assert found.metric is None and all(row.divergence is None and row.drop is None for row in found.rows)
    assert found.measured_on == "calibration" and all(row.noise > 0 for row in found.rows)


@pytest.mark.parametrize("specs", ["int8", [], whet.Adaptive(), Quantize(whet.Adaptive())])
def test_specs_that_are_none(b, specs):
    with pytest.raises(SpecError):
        whet.sensitivity(b.build(), specs, calibration=b.data(8)[0], **QUIET)


def test_data_is_needed(b):
    with pytest.raises(DataError, match="calibration="):
        whet.sensitivity(b.build(), Int(4), **QUIET)
    with pytest.raises(WhetError, match="no layer"):
        Sensitivity((Quantize(),), (), "val", 1).of("conv")


def test_divergence_by_the_textbook():
    p, q = np.array([[0.7, 0.2, 0.1]]), np.array([[0.5, 0.25, 0.25]])
    assert classes_of(p, None) == "probabilities" and classes_of(np.log(p), np.array([0])) == "logits"
    assert classes_of(np.log(p), None) is None and classes_of(np.log(p), np.array([[0.5]])) is None
    for kind, one in (("probabilities", q), ("logits", np.log(q) + 3.0), ("probabilities", q * 1.01)):
        assert np.allclose(np.exp(log_probabilities(one, kind)), q, atol=1e-12)
    from whet.pipeline.sensitivity import _divergence

    expected = float(np.sum(p * np.log(p / q)))
    assert _divergence(log_probabilities(p, "probabilities"), log_probabilities(q, "probabilities")) == pytest.approx(expected)


def test_a_shared_weight_belongs_to_its_first_reader():
    nodes = (
        Node("a", "linear", ("input:0",), "first", "w"),
        Node("b", "linear", ("a",), "second", "w"),
        Node("c", "linear", ("b",), "third", "v"),
    )
    plan = Plan(Quantize(), "onnxruntime", {}, dict.fromkeys(("input:0", "a", "b")), {})
    one, other = parts_of(Graph(nodes, ("input:0",), ("c",)), plan, ["w", "v"])
    assert (one.layer, one.weights, one.values) == ("first", ("w",), ("input:0", "a"))
    assert (other.layer, other.weights, other.values) == ("third", ("v",), ("b",))


def test_bytes_are_those_of_the_file(b):
    def bytes_of(spec, **row):
        made = whet.quantize(b.build(), Quantize(spec, None), example=b.data(8)[0], **QUIET)
        params = next(iter(made.plan.weights.values()))
        return stored_bytes(params, {"parameters": 55, "bits": params.bits} | row) - 4 * params.scale.size, params

    assert bytes_of(Int(4))[0] == 28 and bytes_of(Int(4), stored="int8")[0] == 55
    assert bytes_of(Int(4), stored="float32")[0] == 220 and bytes_of(Int(8))[0] == 55
    found, params = bytes_of(Int(4, symmetric=False))
    assert found == 28 + params.zero_point.size
    found, params = bytes_of(KMeans(2))
    assert found == 14 + 4 * params.levels.size
    assert stored_bytes(None, {"parameters": 55, "bits": 16}) == 110


def test_damage_of_nothing():
    row = Damage("a", 0, "int8", 8, 1, 1, 0.0)
    assert row.sqnr_db is None and row.damage == 0 and row.to_dict()["sqnr_db"] is None
