"""What a training tells of every epoch, and that its best epoch meets the sparsity and the bits that were asked for."""

import json

import numpy as np
import pytest

import whet
from whet import QAT, Cubic, EarlyStopping, Int, Metric, Prune, Quantize, Train
from whet.errors import SpecError

RAMP = Prune(0.5, schedule=Cubic(begin=0.25, end=0.5, frequency=1))


def worse_every_time():
    """A metric whose first epoch is the best."""
    calls = []

    def score(outputs, targets):
        calls.append(len(targets))
        return -float(len(calls))

    return Metric(score, per_example=False)


def test_every_epoch_is_told_to_a_function_and_to_files(b, tmp_path):
    spec, data = Train(epochs=4, apply=[RAMP]), {"train": b.data(96), "val": b.data(48, 1), "progress": False}
    told = []
    made = whet.fit(b.build(), spec, log=told.append, **data)
    history = made.steps[0].train["history"]
    assert [row["phase"] for row in told] == ["warm-up", "pruning ramp", "recovery", "recovery"]
    assert [{key: row[key] for key in history[0]} for row in told] == history
    assert all(row["metric_name"] == "accuracy" and row["seconds"] > 0 for row in told)
    assert [row["best"] for row in told[:3]] == [False, False, True]
    whet.prune(b.build(), RAMP, fit=Train(epochs=4), log=tmp_path / "log.jsonl", **data)
    found = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row | {"seconds": 0} for row in found] == [row | {"seconds": 0} for row in told]


def test_a_log_of_another_kind_is_refused_before_training(b):
    with pytest.raises(SpecError, match=r"\.jsonl or \.csv"):
        whet.fit(b.build(), Train(epochs=1), train=b.data(48), log="log.txt", progress=False)


def test_progress_names_phase_metric_and_sparsity(b, capsys):
    whet.fit(b.build(), Train(epochs=2, apply=[Prune(0.5)]), train=b.data(48), val=b.data(48, 1))
    line = capsys.readouterr().err.splitlines()[-1]
    assert ", epoch 2/2, recovery, loss " in line and ", accuracy " in line and line.endswith(", sparsity 0.50")


def test_a_best_meets_the_sparsity_and_the_bits(b):
    """The metric is best in the first epoch, and that one is at no target: the first that is at both is kept."""
    data = {"train": b.data(96), "val": b.data(48, 1), "progress": False}
    stopping = EarlyStopping(patience=1)
    fit = Train(epochs=6, apply=[RAMP], early_stopping=stopping)
    pruned = whet.fit(b.build(), fit, metric=worse_every_time(), **data)
    rows = pruned.steps[0].train["history"]
    assert pruned.steps[0].train["stop"]["best_epoch"] == 4 == len(rows) - 1
    assert rows[2]["sparsity"] < 0.49 < rows[3]["sparsity"]
    told = []
    qat = QAT(epochs=5, learning_rate=1e-3, observe=0.5)
    made = whet.quantize(
        pruned,
        Quantize(Int(4), qat=qat),
        calibration=b.data(64)[0],
        fit=Train(early_stopping=stopping),
        metric=worse_every_time(),
        log=told.append,
        **data,
    )
    assert [row["phase"] for row in told] == ["observing ranges"] * 2 + ["training"] * 2
    assert [row["best"] for row in told] == [False, False, True, False]
    assert made.steps[-1].train["stop"] == {"reason": "stopped: no improvement for 1 epoch", "best_epoch": 3, "epochs": 4}
    kept = b.weights(made.float_model)
    assert {params.bits for params in made.plan.weights.values()} == {4}
    for name, mask in pruned.masks.items():
        (weight,) = (array for path, array in kept.items() if path.endswith(name))
        assert not np.any(weight[mask == 0]) and np.array_equal(mask, made.masks[name])
