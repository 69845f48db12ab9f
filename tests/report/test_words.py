"""Numbers and specs in words."""

from __future__ import annotations

import pytest

from whet import Cubic, Distill, EarlyStopping, Prune, Quantize, Train
from whet.report import words
from whet.specs import to_dict


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (89_412, "89.4 kB"), (999_600, "1.00 MB"), (2_500_000_000, "2.50 GB")],
)
def test_bytes_in_powers_of_a_thousand(count, text) -> None:
    assert words.bytes_text(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.0213, "0.0213"),
        (27.14, "27.1"),
        (1240.0, "1,240"),
        (-0.5, "-0.500"),
        (3e-9, "3.00e-09"),
        (float("inf"), "inf"),
    ],
)
def test_significant_digits(value, text) -> None:
    assert words.significant(value) == text


def test_accuracy_is_told_in_percent_and_other_metrics_in_their_own_units() -> None:
    assert words.score_with_interval({"name": "accuracy", "value": 0.975, "ci95": [0.955, 0.985]}) == "97.5 % [95.5, 98.5]"
    assert words.score_with_interval({"name": "mse", "value": 0.5, "ci95": None}) == "0.5000"
    assert words.drop_text({"value": -0.0033, "ci95": [-0.02, 0.01]}, "top1") == "-0.33 points [-2.00, 1.00]"
    assert words.drop_text({"value": 0.25, "ci95": None}, "mse") == "0.250"


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        ({"value": 0.5, "ci95": [0.4, 0.6]}, "faster"),
        ({"value": 1.3, "ci95": [1.2, 1.4]}, "SLOWER"),
        ({"value": 1.3, "ci95": [0.9, 1.9]}, "no difference beyond the noise"),
        ({"value": 0.97, "ci95": [0.96, 0.98]}, "no difference beyond the noise"),
        ({"value": 1.3, "ci95": None}, "SLOWER"),
        ({"value": None, "ci95": None}, None),
        (None, None),
    ],
)
def test_latency_is_judged_by_its_interval(ratio, verdict) -> None:
    assert words.latency_verdict(ratio) == verdict
    assert words.latency_text(ratio).endswith(verdict or "")


def test_a_spec_is_written_as_in_python() -> None:
    spec = Train(epochs=3, apply=[Prune(0.8, schedule=Cubic()), Distill()], early_stopping=EarlyStopping(patience=5))
    said = words.spec_text(to_dict(spec))
    assert said == (
        "Train(epochs=3, apply=[Prune(sparsity=0.8, schedule=Cubic()), Distill()], early_stopping=EarlyStopping(patience=5))"
    )
    assert (
        eval(said, {"Train": Train, "Prune": Prune, "Cubic": Cubic, "Distill": Distill, "EarlyStopping": EarlyStopping}) == spec
    )
    assert words.spec_text(to_dict(Quantize(keep=("fc",)))) == "Quantize(keep=['fc'])"
    assert words.spec_text({"Train": {"loss": {"function": "job:loss"}}}) == "Train(loss=job:loss)"


def test_control_characters_do_not_survive() -> None:
    assert words.printable("a\x1b[31mb\nc\x00") == "a�[31mb c�"
