"""Early stopping as a table: what is seen, and what is decided."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

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


def test_the_state_survives_json() -> None:
    import numpy as np

    state, _ = update(StoppingState(), np.float32(0.5), EarlyStopping(), higher_is_better=True)
    assert StoppingState(**json.loads(json.dumps(asdict(state)))) == state
