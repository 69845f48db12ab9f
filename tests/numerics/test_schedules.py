"""Sparsity over steps: Zhu & Gupta's numbers, and boundaries that reach exactly the target."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.errors import SpecError
from whet.numerics.schedules import lay
from whet.numerics.schedules import ramp as ramp_at
from whet.specs import Cosine, Cubic, Exponential, Iterative, Linear, Movement, OneShot, Prune, RigL


def test_textbook_cubic() -> None:
    ramp = lay(Prune(0.8, schedule=Cubic(begin=0.0, end=1.0, frequency=25)), 101)
    assert (ramp.begin, ramp.end) == (0, 100)
    assert [ramp.sparsity(step) for step in (0, 25, 50, 75, 100)] == pytest.approx([0.0, 0.4625, 0.7, 0.7875, 0.8])


def test_the_initial_sparsity_holds_from_the_beginning_of_the_ramp() -> None:
    ramp = lay(Prune(0.8, schedule=Cubic(initial=0.2, begin=0.1, end=0.6, frequency=10)), 100)
    assert [ramp.sparsity(step) for step in (0, 9, 10, 19)] == [0.0, 0.0, pytest.approx(0.2), pytest.approx(0.2)]
    assert ramp.sparsity(20) > 0.2


def test_one_shot_is_whole_before_the_first_step() -> None:
    ramp = lay(Prune(0.5, schedule=OneShot()), 1)
    assert ramp.sparsity(0) == 0.5 and ramp.is_done(0) and [ramp.renews(s) for s in range(3)] == [True, False, False]


ramps = st.tuples(
    st.integers(2, 400), st.integers(1, 40), st.floats(0, 0.9), st.floats(0.01, 1), st.floats(0.05, 0.99), st.floats(0, 1)
)


@given(ramps)
def test_every_ramp_that_can_be_laid_reaches_its_target_before_a_step_that_runs(drawn) -> None:
    steps, frequency, begin, end, sparsity, share = drawn
    if end <= begin:
        return
    spec = Prune(sparsity, schedule=Cubic(initial=sparsity * share, begin=begin, end=end, frequency=frequency))
    try:
        ramp = lay(spec, steps)
    except SpecError as error:
        assert "cannot ramp" in str(error) and (min(round(end * steps), steps - 1) - round(begin * steps)) < frequency
        return
    renewals = [step for step in range(steps) if ramp.renews(step)]
    assert renewals[0] == ramp.begin and renewals[-1] == ramp.end < steps
    assert ramp.sparsity(renewals[-1]) == sparsity  # exactly, not nearly
    assert all(b - a <= frequency for a, b in pairwise(renewals))
    seen = [ramp.sparsity(step) for step in range(steps)]
    assert all(b >= a - 1e-12 for a, b in pairwise(seen)) and seen[-1] == sparsity
    changes = [s for s in range(1, steps) if seen[s] != seen[s - 1]]
    assert set(changes) <= set(renewals)  # what is in force changes only when the masks do
    assert [ramp.is_done(s) for s in range(steps)] == [s >= ramp.end for s in range(steps)]


def test_a_ramp_longer_than_training_is_an_error_that_says_what_to_change() -> None:
    with pytest.raises(SpecError, match=r"it has 6 of 10 training steps, and renews its masks every 10.*lower Cubic.frequency"):
        lay(Prune(0.8, schedule=Cubic()), 10)
    with pytest.raises(SpecError):
        lay(Prune(0.8, schedule=Cubic()), 1)


def test_every_schedule_by_its_formula() -> None:
    final, at = 0.8, (0.0, 0.25, 0.5, 1.0)
    expected = {
        Linear(): [0.0, 0.2, 0.4, 0.8],
        Cubic(): [0.0, 0.8 * (1 - 0.75**3), 0.7, 0.8],
        Cosine(): [0.0, 0.8 * (1 - math.cos(math.pi / 4)) / 2, 0.4, 0.8],
        Exponential(): [0.0, 1 - 0.2**0.25, 1 - 0.2**0.5, 0.8],
        Iterative(): [0.0, 1 - 0.2**0.25, 1 - 0.2**0.5, 0.8],
    }
    for schedule, values in expected.items():
        assert [ramp_at(schedule, final, t) for t in at] == pytest.approx(values), schedule
        started = replace(schedule, initial=0.3)
        assert ramp_at(started, final, 0.0) == pytest.approx(0.3) and ramp_at(started, final, 1.0) == pytest.approx(0.8)


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Exponential(), Iterative(rounds=4)])
def test_every_schedule_rises_and_reaches_its_target(schedule) -> None:
    laid = lay(Prune(0.75, schedule=schedule), 101)
    seen = [laid.sparsity(step) for step in range(101)]
    assert all(b >= a for a, b in pairwise(seen)) and seen[0] == 0 and seen[-1] == 0.75 and seen[laid.end] == 0.75
    if isinstance(schedule, Iterative):
        assert [round(s, 4) for s in dict.fromkeys(seen)] == [round(1 - 0.25 ** (k / 4), 4) for k in range(5)]


def test_rounds_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(SpecError, match="cannot go 9 rounds: it has 6 of 10 training steps"):
        lay(Prune(0.8, schedule=Iterative(rounds=9)), 10)


def test_rigl_moves_masks_by_a_falling_cosine_until_its_end() -> None:
    ramp = lay(Prune(0.9, schedule=RigL(fraction=0.4, frequency=10, end=0.5)), 80)
    assert (ramp.end, ramp.frequency) == (40, 10) and all(ramp.sparsity(step) == 0.9 for step in range(80))
    assert [step for step in range(80) if ramp.renews(step)] == [0]
    assert {s: round(ramp.drop_fraction(s), 9) for s in range(80) if ramp.drop_fraction(s)} == {
        10: round(0.2 * (1 + math.cos(math.pi / 4)), 9),
        20: 0.2,
        30: round(0.2 * (1 + math.cos(3 * math.pi / 4)), 9),
    }
    assert not ramp.is_done(39) and ramp.is_done(40)
    assert lay(Prune(0.5, schedule=Cubic()), 100).drop_fraction(20) == 0


@pytest.mark.parametrize(
    ("spec", "steps", "said"),
    [
        (Prune(0.9, schedule=RigL()), 100, "RigL would never move a mask: it ends at step 75 of 100 and moves them every 100"),
        (Prune(0.5, criterion=Movement()), 100, "removes some before the first step"),
        (Prune(0.5, criterion=Movement(), schedule=RigL(frequency=5)), 100, "removes some before the first step"),
        (Prune(0.5, criterion=Movement(), schedule=Cubic(initial=0.1)), 100, "removes some before the first step"),
    ],
)
def test_what_cannot_be_reached_is_an_error_before_training(spec, steps, said) -> None:
    with pytest.raises(SpecError, match=said):
        lay(spec, steps)


def test_movement_may_begin_at_nothing() -> None:
    assert lay(Prune(0.5, criterion=Movement(), schedule=Cubic()), 100).sparsity(0) == 0
    assert lay(Prune(0.5, criterion=Movement(), schedule=Cubic(initial=0.2, begin=0.1)), 100).begin == 10
