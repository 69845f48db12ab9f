"""The geometry of the charts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from report_samples import sample_report
from whet.report import charts


def train():
    return sample_report()["steps"][0]["train"]


def test_one_panel_per_recorded_curve_with_the_decision_marked() -> None:
    panels = charts.training_panels(train())
    assert [panel.title for panel in panels] == ["accuracy on validation data", "training loss", "sparsity"]
    for panel in panels:
        assert len(panel.dots) == 24
        assert [(m.kind, m.label) for m in panel.markers] == [("kept", "kept 18"), ("stop", "stop")]
        kept = panel.dots[18]
        assert panel.markers[0].x == kept.x
        for dot in panel.dots:
            assert charts.LEFT <= dot.x <= charts.WIDTH - charts.RIGHT
            assert charts.TOP <= dot.y <= charts.HEIGHT - charts.BOTTOM
    assert panels[2].dots[-1].label == "epoch 23: 80.0 %"
    assert panels[1].dots[0].y < panels[1].dots[-1].y  # a falling loss falls


def test_the_ramp_ends_where_patience_begins() -> None:
    record = train()
    for row in record["history"]:
        row["eligible"] = row["epoch"] > 9
    panel = charts.training_panels(record)[0]
    assert panel.shade == panel.dots[9].x
    for row in record["history"]:
        row["sparsity"], row["eligible"] = 0.0, True
    assert charts.training_panels(record)[0].shade is None


def test_missing_values_cut_the_line_and_are_not_drawn() -> None:
    record = train()
    record["history"][5]["loss"] = float("nan")
    record["history"][6]["loss"] = None
    for row in record["history"]:
        row["metric"] = None
    loss, _ = charts.training_panels(record)
    assert len(loss.lines) == 2
    assert len(loss.dots) == 22


def test_an_empty_history_has_no_panels() -> None:
    assert charts.training_panels({"history": [], "stop": {}, "metric": None}) == ()


def test_one_epoch_and_a_flat_curve_are_drawn() -> None:
    record = train()
    record["history"] = record["history"][:1]
    for panel in charts.training_panels(record):
        assert all(math.isfinite(dot.x) and math.isfinite(dot.y) for dot in panel.dots)


@given(low=st.floats(-1e6, 1e6), span=st.floats(0, 1e6))
def test_ticks_are_few_and_hold_the_range(low, span) -> None:
    ticks = charts.nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)
    slack = 1e-6 * max(abs(low), abs(low + span), 1e-300)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack


def test_whiskers_share_one_scale() -> None:
    first, second = charts.whiskers([{"value": 0.9, "ci95": [0.8, 0.95]}, {"value": 0.85, "ci95": None}])
    assert 0 < first.low < second.at < first.at < first.high < 100
    assert second.low == second.at == second.high
    (only,) = charts.whiskers([{"value": 0.0, "ci95": None}])
    assert only.at == pytest.approx(50)
