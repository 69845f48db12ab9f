"""Early stopping as a table: what is seen, and what is decided."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.errors import SpecError
from whet.numerics.stopping import StoppingState, update
from whet.specs import EarlyStopping

NAN, INF = float("nan"), float("inf")

# name, values (None before a value: the ramp still rises), spec, higher is better, epochs that are best, epoch of the stop
TABLE = [
    ("rises for ever", [1, 2, 3, 4, 5], EarlyStopping(patience=1), True, [0, 1, 2, 3, 4], None),
    ("falls, lower is better", [5, 4, 3], EarlyStopping(patience=1), False, [0, 1, 2], None),
    ("falls, higher is better", [5, 4, 3], EarlyStopping(patience=2), True, [0], 2),
    ("patience counts from the best", [1, 3, 2, 2, 2, 9], EarlyStopping(patience=3), True, [0, 1], 4),
    ("an improvement resets patience", [1, 0, 0, 2, 0, 0, 0], EarlyStopping(patience=3), True, [0, 3], 6),
    ("a tie is no improvement", [1, 1, 1], EarlyStopping(patience=2), True, [0], 2),
    ("less than min_delta is none", [1, 1.05, 1.1, 1.2], EarlyStopping(patience=5, min_delta=0.15), True, [0, 3], None),
    ("exactly min_delta is none", [1, 1.5, 2.5], EarlyStopping(patience=5, min_delta=0.5), True, [0, 2], None),
    ("NaN first is not best", [NAN, 1, 2], EarlyStopping(patience=2), True, [1, 2], None),
    ("NaN in the middle waits", [1, NAN, NAN, 5], EarlyStopping(patience=2), True, [0], 2),
    ("all NaN stops without a best", [NAN, NAN, NAN], EarlyStopping(patience=2), True, [], 1),
    ("infinity is not best", [INF, 1, INF, -INF], EarlyStopping(patience=9), True, [1], None),
    ("minus infinity is not best either", [-INF, 1], EarlyStopping(patience=9), False, [1], None),
    ("the ramp is waited for", [(9,), (8,), (7,), 1, 2, 1, 1], EarlyStopping(patience=2), True, [3, 4], 6),
    ("a ramp of NaN does no harm", [(NAN,), (NAN,), 1], EarlyStopping(patience=1), True, [2], None),
    ("the ramp never ends", [(9,), (8,), (7,)], EarlyStopping(patience=1), True, [], None),
    (
        "relative: 10 % of the best",
        [10, 10.9, 11.1, 12.1, 12.3],
        EarlyStopping(min_delta=0.1, relative=True),
        True,
        [0, 2, 4],
        None,
    ),
    (
        "relative, lower is better",
        [10, 9.1, 8.9, 8.1, 8.0],
        EarlyStopping(min_delta=0.1, relative=True),
        False,
        [0, 2, 4],
        None,
    ),
    ("relative to a negative best", [-10, -9.5, -8.9], EarlyStopping(min_delta=0.1, relative=True), True, [0, 2], None),
    ("relative to zero", [0, 0, 1e-9], EarlyStopping(min_delta=0.1, relative=True), True, [0, 2], None),
    ("the warm-up does not count", [5, 1, 1, 1, 1, 1], EarlyStopping(patience=2, warmup=3), True, [0], 4),
    ("the warm-up's best is kept", [1, 9, 2, 3, 4], EarlyStopping(patience=2, warmup=2), True, [0, 1], 3),
    ("the warm-up begins after the ramp", [(9,), (9,), 5, 1, 1, 1, 1], EarlyStopping(patience=2, warmup=2), True, [2], 5),
    ("the threshold is reached", [1, 2, 3, 4], EarlyStopping(threshold=3), True, [0, 1, 2], 2),
    ("the threshold, lower is better", [5, 3, 0.5, 0.1], EarlyStopping(threshold=0.5), False, [0, 1, 2], 2),
    ("the threshold counts in the warm-up", [1, 7], EarlyStopping(threshold=5, warmup=9), True, [0, 1], 1),
    ("the threshold waits for the ramp", [(9,), 1, 6], EarlyStopping(threshold=5), True, [1, 2], 2),
    ("infinity reaches no threshold", [INF, 1], EarlyStopping(threshold=5, patience=3), True, [1], None),
    ("the first value diverges", [1], EarlyStopping(divergence=2), True, [0], 0),
    ("divergence stops at once", [1, 0.5, 20, 0.1], EarlyStopping(divergence=10, patience=9), False, [0, 1], 2),
    ("divergence of NaN", [1, NAN, 5], EarlyStopping(divergence=0.5, patience=9), True, [0], 1),
    ("divergence of infinity", [1, INF, 0.5], EarlyStopping(divergence=10, patience=9), False, [0], 1),
    ("infinity is none the better", [1, INF, 2], EarlyStopping(divergence=0), True, [0], 1),
    ("exactly the bound is no divergence", [10, 9], EarlyStopping(divergence=10), False, [0, 1], None),
    ("divergence waits for the ramp", [(99,), 5, 4], EarlyStopping(divergence=10), False, [1, 2], None),
    ("without a spec the best is tracked and nothing stops", [1, 2, 1, 1, 1, 1], None, True, [0, 1], None),
]


@pytest.mark.parametrize(
    ("values", "spec", "higher", "best", "stop"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_decisions(values, spec, higher, best, stop) -> None:
    state, seen_best, stopped = StoppingState(), [], None
    for epoch, item in enumerate(values):
        eligible = not isinstance(item, tuple)
        before = state
        state, decision = update(state, item if eligible else item[0], spec, higher_is_better=higher, eligible=eligible)
        assert before.epoch == epoch and state.epoch == epoch + 1  # the old state is untouched
        assert decision.reason
        if decision.is_best:
            seen_best.append(epoch)
            assert state.best == item and state.best_epoch == epoch and state.waited == 0
        if decision.stop:
            stopped = epoch
            break
    assert seen_best == best and stopped == stop
    assert state.best_epoch == (best[-1] if best else None)


def test_reasons_say_what_happened() -> None:
    spec = EarlyStopping(patience=2)
    state, decision = update(StoppingState(), 0.5, spec, higher_is_better=True, eligible=False)
    assert decision.reason == "waiting for the pruning schedule to end"
    state, decision = update(state, 0.5, spec, higher_is_better=True)
    assert decision.reason == "improved"
    state, decision = update(state, 0.5, spec, higher_is_better=True)
    assert decision.reason == "no improvement for 1 epoch" and not decision.stop
    state, decision = update(state, NAN, spec, higher_is_better=True)
    assert decision.reason == "stopped: nan is never best" and decision.stop


def test_reasons_of_the_bounds() -> None:
    def reason(value, **fields):
        return update(StoppingState(), value, EarlyStopping(**fields), higher_is_better=True)[1].reason

    assert reason(0.96, threshold=0.95) == "stopped: 0.96 reaches the threshold of 0.95"
    assert reason(0.04, divergence=0.1) == "stopped: 0.04 is worse than 0.1: training diverged"
    assert reason(NAN, divergence=0.1) == "stopped: nan is worse than 0.1: training diverged"
    state, _ = update(StoppingState(), 1.0, EarlyStopping(warmup=5), higher_is_better=True)
    state, decision = update(state, 0.5, EarlyStopping(warmup=5), higher_is_better=True)
    assert decision.reason == "no improvement, warming up" and state.waited == 0


def test_bounds_in_the_wrong_direction_are_refused() -> None:
    spec = EarlyStopping(threshold=0.9, divergence=0.1)
    assert not update(StoppingState(), 0.5, spec, higher_is_better=True)[1].stop
    with pytest.raises(SpecError, match=r"threshold \(0.9\) must be better than its divergence \(0.1\).*lower is better"):
        update(StoppingState(), 0.5, spec, higher_is_better=False)


specs = st.builds(
    EarlyStopping,
    patience=st.integers(1, 4),
    min_delta=st.sampled_from([0.0, 0.25]),
    relative=st.booleans(),
    warmup=st.integers(0, 3),
    threshold=st.none() | st.just(4.0),
    divergence=st.none() | st.just(-4.0),
)
steps = st.lists(st.tuples(st.floats(-5, 5) | st.sampled_from([NAN, INF, -INF]), st.booleans()), max_size=12)


@given(steps=steps, spec=specs)
def test_a_resumed_run_decides_as_an_undisturbed_one_and_the_best_is_finite_and_eligible(steps, spec) -> None:
    whole = resumed = StoppingState()
    eligible_best = []
    for value, eligible in steps:
        whole, decision = update(whole, value, spec, higher_is_better=True, eligible=eligible)
        resumed = StoppingState(**json.loads(json.dumps(asdict(resumed))))
        resumed, again = update(resumed, value, spec, higher_is_better=True, eligible=eligible)
        assert resumed == whole and again == decision
        assert not decision.stop or (eligible and decision.reason.startswith("stopped: "))
        if decision.is_best:
            assert eligible and math.isfinite(value)
            eligible_best.append(value)
    assert eligible_best == sorted(eligible_best) and whole.best == (eligible_best[-1] if eligible_best else None)


def test_the_state_survives_json() -> None:
    import numpy as np

    state, _ = update(StoppingState(), np.float32(0.5), EarlyStopping(), higher_is_better=True)
    assert StoppingState(**json.loads(json.dumps(asdict(state)))) == state
