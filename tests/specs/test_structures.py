"""Specs of whole layers, of groups that a user names, of measured latency and of sensitivity."""

import pytest

from whet.errors import SpecError
from whet.specs import (
    ERK,
    BlockInfluence,
    BySensitivity,
    Channel,
    Cubic,
    Global,
    Group,
    Layer,
    LossChange,
    Magnitude,
    OutputChange,
    Prune,
    Recipe,
    from_dict,
    to_dict,
)
from whet.specs.budget import latency_limit

REFUSED = {
    "magnitude of layers": (
        lambda: Prune(0.3, granularity=Layer(), criterion=Magnitude()),
        "Magnitude does not rank what Layer",
    ),
    "change of weights": (lambda: Prune(0.3, criterion=OutputChange()), "OutputChange does not rank what Weight removes"),
    "count and sparsity": (
        lambda: Prune(0.3, granularity=Layer(2)),
        r"Layer\(2\) says how much is removed; leave out sparsity=",
    ),
    "no count": (lambda: Prune(granularity=Layer()), "needs a value for 'sparsity'"),
    "count of none": (lambda: Layer(0), "Layer.count must be an integer of at least 1, got 0"),
    "layers as a graph": (lambda: Prune(0.3, granularity=Layer(), rebuild="graph"), "rebuild is for"),
    "group and sparsity": (lambda: Prune(0.3, granularity=Group({"a": {0: (1,)}})), "leave out sparsity="),
    "empty group": (lambda: Group({}), "must map parameters"),
    "group of no axes": (lambda: Group({"a": (1, 2)}), r"must map axes to positions, as \{0: \(1, 5\)\}"),
    "group of no positions": (lambda: Group({"a": {0: ()}}), "must be a tuple of positions"),
    "negative position": (lambda: Group({"a": {0: (-1,)}}), "must be an integer of at least 0, got -1"),
    "latency of masks": (lambda: Prune(latency=0.5), r"real removal: write granularity=Channel\(\)"),
    "latency in per cent": (lambda: Prune(latency=50, granularity=Channel()), "written as text: '2 ms'"),
    "latency in bytes": (lambda: Prune(latency="2 kB", granularity=Channel()), "one of the units us, ms, s"),
    "sensitivity with a budget": (
        lambda: Prune(macs=0.5, granularity=Channel(), allocation=BySensitivity()),
        "distributes a sparsity",
    ),
    "sensitivity on a ramp": (lambda: Prune(0.5, allocation=BySensitivity(), schedule=Cubic()), "measured once"),
    "sensitivity of layers": (lambda: Prune(0.5, granularity=Layer(), allocation=BySensitivity()), "leaves no choice"),
    "densities of layers": (lambda: Prune(0.5, granularity=Layer(), allocation=ERK()), "ERK distributes masks"),
    "trials": (lambda: BySensitivity(trials=0), "BySensitivity.trials"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_is_allowed(case) -> None:
    make, message = REFUSED[case]
    with pytest.raises(SpecError, match=message):
        make()


def test_layers_are_ranked_by_their_influence_unless_another_is_named() -> None:
    assert Prune(0.3, granularity=Layer()).criterion == BlockInfluence()
    assert Prune(0.3, granularity=Layer(), criterion=OutputChange()).criterion == OutputChange()
    assert Prune(0.3).criterion == Magnitude()


@pytest.mark.parametrize(
    "spec",
    [
        Prune(granularity=Layer(2)),
        Prune(macs=0.5, granularity=Layer(), criterion=LossChange(greedy=True)),
        Prune(granularity=Group({"conv.weight": {0: (3, 1, 1)}, "Layer": {1: [0]}}, coupled=True)),
        Prune(latency="2 ms", granularity=Channel(), allocation=Global()),
        Prune(0.5, allocation=BySensitivity(trials=8)),
    ],
)
def test_they_survive_yaml(spec) -> None:
    assert from_dict(to_dict(spec)) == spec
    again = Recipe.from_yaml(Recipe([spec]).to_yaml())
    assert again == Recipe([spec]) and hash(again.steps[0]) == hash(spec)


def test_positions_are_sorted_and_named_once() -> None:
    assert Group({"a": {"1": [5, 2, 5]}}).positions == {"a": {1: (2, 5)}}


def test_a_latency_is_a_fraction_of_the_original_or_a_time() -> None:
    assert latency_limit(0.5, 3.0) == 1.5
    assert latency_limit("500 us", 3.0) == 0.5
