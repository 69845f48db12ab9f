"""The exact multiple-choice knapsack, against every choice there is and against dynamic programming over weights."""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.errors import BudgetError, SpecError
from whet.numerics import knapsack
from whet.numerics.knapsack import cheapest_within

options = st.tuples(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 1.5, 7.0, 1e-9]) | st.floats(-10, 10), st.integers(0, 12))
items = st.lists(st.lists(options, min_size=1, max_size=4), max_size=5)


def split(table):
    return [[c for c, _ in row] for row in table], [[w for _, w in row] for row in table]


def least_cost(costs, weights, budget) -> float:
    choices = itertools.product(*(range(len(row)) for row in costs))
    return min(
        (
            sum(row[o] for row, o in zip(costs, choice, strict=True))
            for choice in choices
            if sum(row[o] for row, o in zip(weights, choice, strict=True)) <= budget
        ),
        default=math.inf,
    )


@given(table=items, budget=st.integers(0, 40))
@settings(deadline=None, max_examples=200)
def test_no_choice_costs_less(table, budget) -> None:
    costs, weights = split(table)
    wanted = least_cost(costs, weights, budget)
    if math.isinf(wanted):
        with pytest.raises(BudgetError) as caught:
            cheapest_within(costs, weights, budget)
        assert caught.value.least == sum(min(row) for row in weights)
        return
    found = cheapest_within(costs, weights, budget)
    assert found.cost == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    assert found.cost == sum(row[o] for row, o in zip(costs, found.options, strict=True))
    assert found.weight == sum(row[o] for row, o in zip(weights, found.options, strict=True)) <= budget


@given(table=items, budget=st.integers(0, 40))
@settings(deadline=None, max_examples=50)
def test_narrow_fronts_that_lose_states_change_nothing_in_the_end(table, budget) -> None:
    costs, weights = split(table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "WIDTHS", (1, 2, 2**31 - 1))
        wanted = least_cost(costs, weights, budget)
        if math.isfinite(wanted):
            assert cheapest_within(costs, weights, budget).cost == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def by_weight(costs: np.ndarray, weights: np.ndarray, budget: int) -> float:
    """The textbook: `f[b]`, the least cost of the items so far within b."""
    least = np.zeros(budget + 1)
    for item_costs, item_weights in zip(costs, weights, strict=True):
        new = np.full(budget + 1, np.inf)
        for cost, weight in zip(item_costs, item_weights, strict=True):
            if weight <= budget:
                new[weight:] = np.minimum(new[weight:], least[: budget + 1 - weight] + cost)
        least = new
    return float(least[budget])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["layers", "noise", "proportional"])
def test_larger_problems_agree_with_the_textbook(kind, seed) -> None:
    rng = np.random.default_rng(seed)
    bits, size = np.arange(2, 9), rng.integers(1, 60, 25)
    weights = size[:, None] * bits if kind != "noise" else rng.integers(0, 300, (25, 7))
    costs = {
        "layers": rng.lognormal(size=(25, 1)) * size[:, None] * 4.0**-bits,  # errors that fall by 6 dB a bit
        "noise": rng.random((25, 7)),
        "proportional": (weights.max() - weights) / 3.0,  # nothing to choose between but the fit
    }[kind]
    budget = int(weights.min(1).sum() * 0.6 + weights.max(1).sum() * 0.4)
    found = cheapest_within(costs.tolist(), weights.tolist(), budget)
    assert found.cost == pytest.approx(by_weight(costs, weights, budget), rel=1e-9)


def test_two_hundred_layers_and_millions_of_bits() -> None:
    rng = np.random.default_rng(0)
    bits, size = np.arange(2, 10), rng.integers(100, 2_000_000, 200)
    weights, costs = size[:, None] * bits, rng.lognormal(size=(200, 1)) * size[:, None] * 4.0**-bits
    budget = int(size.sum() * 4.5)
    found = cheapest_within(costs.tolist(), weights.tolist(), budget)
    assert 0.9999 * budget < found.weight <= budget
    # No exchange of the options of one layer improves it: the least that an optimum can do.
    rows, picked = np.arange(200), np.asarray(found.options)
    fits = weights - weights[rows, picked][:, None] <= budget - found.weight
    assert np.all(costs[fits] >= np.broadcast_to(costs[rows, picked][:, None], costs.shape)[fits])


def test_by_hand() -> None:
    """Two layers of 10 and 30 parameters at 4 or 8 bits, in 200 bits: the second is worth its 8 bits less than the first."""
    found = cheapest_within([[5.0, 1.0], [8.0, 2.0]], [[40, 80], [120, 240]], 200)
    assert (found.options, found.cost, found.weight) == ((1, 0), 9.0, 200)
    assert cheapest_within([[5.0, 1.0], [8.0, 2.0]], [[40, 80], [120, 240]], 10**9).options == (1, 1)
    assert cheapest_within([], [], 0).options == ()
    assert cheapest_within([[1.0, 1.0, 1.0]], [[5, 3, 3]], 9).options == (1,)


def test_a_budget_out_of_reach_says_the_least() -> None:
    with pytest.raises(BudgetError, match="lightest options together weigh 160") as caught:
        cheapest_within([[5.0, 1.0], [8.0, 2.0]], [[40, 80], [120, 240]], 159)
    assert caught.value.least == 160 == pickle.loads(pickle.dumps(caught.value)).least


@pytest.mark.parametrize(
    ("costs", "weights", "message"),
    [
        ([[1.0]], [], "costs of 1 items and weights of 0"),
        ([[]], [[]], "Item 0 .* 0 costs and 0 weights"),
        ([[1.0], [1.0, 2.0]], [[1], [1]], "Item 1 .* 2 costs and 1 weights"),
        ([[float("nan")]], [[1]], "costs must be finite"),
        ([[1.0]], [[0.5]], "weights are integers"),
        ([[1.0]], [[-1]], "weights are integers"),
    ],
)
def test_what_is_no_problem_is_refused(costs, weights, message) -> None:
    with pytest.raises(SpecError, match=message):
        cheapest_within(costs, weights, 10)
