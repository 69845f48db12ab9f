"""Widths under a budget of latency, against every choice there is."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.errors import BudgetError
from whet.numerics.widths import Term, choose_widths, total_ms


def alone(times):
    """One term for each family, by option."""
    return [Term((family,), lambda at, row=row: row[at[0]]) for family, row in enumerate(times)]


def every(losses, terms, limit):
    """(loss, choice) of all that fit."""
    found = []
    for choice in itertools.product(*(range(len(row)) for row in losses)):
        if total_ms(terms, choice) <= limit:
            found.append((sum(row[o] for row, o in zip(losses, choice, strict=True)), choice))
    return found


options = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40)), min_size=1, max_size=3)


@settings(max_examples=100, deadline=None)
@given(st.lists(options, min_size=1, max_size=4), st.floats(0.2, 1.0))
def test_times_of_single_families_are_chosen_exactly(rows, fraction):
    losses = [[0.0, *(float(sum(x for x, _ in row[: i + 1])) for i in range(len(row)))] for row in rows]
    times = [[100.0, *(100.0 / (1 + sum(y for _, y in row[: i + 1])) for i in range(len(row)))] for row in rows]
    limit = fraction * 100.0 * len(rows)
    terms = alone(times)
    fits = every(losses, terms, limit)
    if not fits:
        with pytest.raises(BudgetError):
            choose_widths(losses, terms, limit)
        return
    chosen = choose_widths(losses, terms, limit)
    assert total_ms(terms, chosen) <= limit
    assert sum(row[o] for row, o in zip(losses, chosen, strict=True)) == pytest.approx(min(fits)[0], abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 20), min_size=4, max_size=4), min_size=3, max_size=4), st.floats(0.15, 0.95))
def test_a_chain_of_layers_fits_and_is_near_the_best(worth, fraction):
    """Layer i reads family i-1 and makes family i: its time is the product of both widths."""
    losses = [[0.0, *itertools.accumulate(map(float, row[:3]))] for row in worth]
    count = len(worth)

    def width(option):
        return 1 - option / 4

    terms = [Term((i, i + 1), lambda at: 10 * width(at[0]) * width(at[1])) for i in range(count - 1)]
    limit = fraction * total_ms(terms, [0] * count)
    fits = every(losses, terms, limit)
    if not fits:
        return
    chosen = choose_widths(losses, terms, limit)
    best, found = min(fits)[0], sum(row[o] for row, o in zip(losses, chosen, strict=True))
    assert total_ms(terms, chosen) <= limit and found <= 3.0 * best + 1e-9


def test_the_improvement_undoes_what_the_walk_took_too_much():
    """The walk takes the cheapest step first, which alone does not suffice; then the dear one suffices alone."""
    losses, terms = [[0.0, 1.0], [0.0, 9.0]], alone([[10.0, 8.0], [10.0, 3.0]])
    assert choose_widths(losses, terms, 13.0) == (0, 1)


def test_nothing_is_lost_where_all_fits_and_too_little_time_is_an_error():
    terms = alone([[4.0, 2.0]])
    assert choose_widths([[0.0, 1.0]], terms, 4.0) == (0,)
    with pytest.raises(BudgetError, match=r"the least that was found is 2 ms") as caught:
        choose_widths([[0.0, 1.0]], terms, 1.0)
    assert caught.value.least == 2.0


def test_a_width_that_is_slower_is_never_bought():
    assert choose_widths([[0.0, 1.0, 2.0]], alone([[4.0, 5.0, 3.0]]), 3.5) == (2,)
