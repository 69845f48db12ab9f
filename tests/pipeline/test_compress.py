"""`whet.compress`: recipes tried in turn, budgets held or missed, what is written, what is reported."""

import json
from functools import cache

import numpy as np
import pytest

import whet
from bench import bench, same
from whet import Budget, Cubic, Distill, EarlyStopping, Metric, Prune, Quantize, Recipe, Train
from whet.pipeline.compress import default_recipes
from whet.runtimes.sessions import open_session

ONCE = pytest.mark.parametrize("b", ["torch"], indirect=True)  # what no framework side takes part in
LIGHT = Recipe((Quantize(),))
RUINOUS = Recipe((Prune(0.97), Quantize()))


def run(b, model=None, **changes):
    arguments = {"train": b.data(96), "val": b.data(48, 1), "recipe": LIGHT, "progress": False}
    return whet.compress(b.build() if model is None else model, **(arguments | changes))


@cache
def plain(framework):
    """One quantization, as most tests here need it."""
    b = bench(framework)
    return run(b, test=b.data(40, 2))


def instead(monkeypatch, *recipes):
    monkeypatch.setattr("whet.pipeline.compress.default_recipes", lambda **_: recipes)


def test_default_recipes_go_from_hard_to_light():
    hard, middle, light = default_recipes(classifies=True, has_targets=True)
    for recipe, sparsity in ((hard, 0.8), (middle, 0.5)):
        train, quantize = recipe.steps
        assert train.prune.sparsity == sparsity and isinstance(train.prune.schedule, Cubic)
        assert train.distill == Distill() and train.early_stopping == EarlyStopping() and quantize == Quantize()
    assert light == LIGHT
    assert default_recipes(classifies=False, has_targets=True)[0].steps[0].distill is None
    assert default_recipes(classifies=False, has_targets=False) == (LIGHT,)


def test_without_a_recipe_the_hardest_that_holds_is_chosen(b):
    model = b.build()
    before = b.frozen(model)
    made = run(b, model, recipe=None, budget=Budget(max_drop=0.5))
    assert same(before, b.frozen(model))
    data = made.report.data
    assert data["budget"]["met"] and data["budget"]["missed"] == [] and len(data["candidates"]) == 1
    assert data["recipe"] == default_recipes(classifies=True, has_targets=True)[0].to_dict()
    assert sum(int((mask == 0).sum()) for mask in made.masks.values()) == round(0.8 * (54 + 288))


@ONCE
def test_a_recipe_that_misses_gives_way_to_a_lighter_one(b, monkeypatch):
    instead(monkeypatch, RUINOUS, LIGHT)
    made = run(b, recipe=None, budget=Budget(max_drop=0.05))
    first, second = made.report.data["candidates"]
    assert not first["met"] and second["met"]
    assert first["metric_drop"] > 0.05 and first["missed"][0].startswith("accuracy drops by ")
    assert made.masks == {} and made.report.data["recipe"] == LIGHT.to_dict() and made.report.data["budget"]["met"]


@ONCE
def test_when_all_miss_the_best_is_returned_and_says_what_it_missed(b, monkeypatch):
    instead(monkeypatch, RUINOUS, LIGHT)
    made = run(b, recipe=None, budget=Budget(max_drop=0.05, size="10 B", gzip=0.001))
    budget = made.report.data["budget"]
    assert not budget["met"] and made.masks == {} and len(made.report.data["candidates"]) == 2
    assert [text.split(" is ")[0] for text in budget["missed"]] == ["size", "gzip"]
    assert budget["missed"][0].endswith("allowed 10") and "bytes" in budget["missed"][0]


@ONCE
def test_confidence_and_latency_that_hold(b):
    budget = run(b, budget=Budget(max_drop=0.2, confidence=0.95, latency="20 s")).report.data["budget"]
    assert budget["met"] and budget["missed"] == []


@ONCE
def test_what_cannot_be_shown_says_how_many_examples_it_needs(b):
    budget = run(b, budget=Budget(max_drop=0.01, confidence=0.95, latency="0.01 us")).report.data["budget"]
    assert not budget["met"]
    unsure, slow = budget["missed"]
    assert "at 95 % confidence, allowed 0.01" in unsure
    needed = int(unsure.split("about ")[1].split(" validation examples")[0].replace(",", ""))
    assert 48 < needed < 100_000
    assert slow.startswith("latency is ") and slow.endswith("ms, allowed 1e-05")


def nearness(outputs, targets):
    """1 where the targets are zero, or are exactly the outputs."""
    return (np.all(targets == 0, axis=1) | (np.abs(outputs - targets).max(axis=1) < 1e-4)).astype(float)


@ONCE
def test_decided_on_val_and_reported_on_test(b):
    model = b.build()
    x, _ = b.data(40, 2)
    exact = whet.prune(model, Prune(0.01), progress=False).side.predict(model, x)
    val = (b.data(48, 1)[0], np.zeros((48, 3), np.float32))
    made = run(b, model, val=val, test=(x, exact), metric=nearness)
    data = made.report.data
    assert data["budget"] | {"spec": None} == {
        "spec": None,
        "met": True,
        "missed": [],
        "decided_on": "val",
        "reported_on": "test",
    }
    assert data["candidates"][0]["metric_drop"] == 0
    assert data["original"]["metric"]["n"] == data["compressed"]["metric"]["n"] == 40
    assert data["change"]["metric_drop"]["value"] > 0.5
    assert any("the drop on test is above the 0.01 that held on val" in text for text in data["warnings"])


@ONCE
def test_a_metric_of_the_whole(b):
    def share(outputs, targets):
        return np.mean(outputs.argmax(1) == targets)

    data = run(b, metric=Metric(share, per_example=False, name="share")).report.data
    assert data["original"]["metric"]["name"] == "share" and data["original"]["metric"]["value"] > 0.9
    low, high = data["change"]["metric_drop"]["ci95"]
    assert low <= data["change"]["metric_drop"]["value"] <= high


def numbers(n, seed):
    x = np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)
    return x, (x @ np.asarray([1.0, -2.0, 0.5, 0.0], np.float32))[:, None]


def test_a_regression_where_lower_is_better(b):
    train = Train(epochs=30, learning_rate=3e-2, apply=Prune(0.25, schedule=Cubic()))
    data = whet.compress(
        b.regressor(), train=numbers(256, 0), val=numbers(64, 1), recipe=[train, Quantize()], budget=Budget(0.3), progress=False
    ).report.data
    before, after = data["original"]["metric"], data["compressed"]["metric"]
    assert before["name"] == after["name"] == "mean_squared_error" and before["higher_is_better"] is False
    assert after["value"] < before["value"]  # it was not trained before
    assert data["change"]["metric_drop"]["value"] == pytest.approx(after["value"] - before["value"])
    assert data["change"]["metric_drop"]["value"] < 0 and data["budget"]["met"]
    assert data["compressed"]["parity"]["agreement"] is None


def pairs(n, seed):
    rng = np.random.default_rng(seed)
    a, c = rng.normal(size=(n, 4)).astype(np.float32), rng.normal(size=(n, 3)).astype(np.float32)
    return {"a": a, "b": c}, (a[:, 0] + c[:, 1] > 0).astype(np.int64)


def test_several_inputs_by_name_and_a_dict_of_outputs(b, tmp_path):
    train = [{**pairs(32, seed)[0], "labels": pairs(32, seed)[1]} for seed in range(6)]
    recipe = [Train(epochs=5, apply=(Prune(0.3, schedule=Cubic(frequency=1)), Distill())), Quantize()]
    made = whet.compress(
        b.named(), train=train, val=pairs(48, 9), recipe=recipe, budget=Budget(1.0), progress=False, out=tmp_path / "out"
    )
    assert made.report.data["original"]["metric"]["n"] == 48
    inputs, _ = pairs(5, 3)
    session = open_session(tmp_path / "out" / f"model{b.suffix}")
    assert sorted(slot.name for slot in session.inputs) == ["a", "b"]
    outputs = dict(zip((slot.name for slot in session.outputs), session.run(inputs), strict=True))
    expected = made.side.predict(made.model, inputs)
    assert outputs.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(outputs[name], array, atol=0.05)


def test_the_frameworks_own_loaders(b):
    loaded = run(b, train=b.loader(*b.data(96)), val=b.loader(*b.data(48, 1)), test=b.loader(*b.data(40, 2)))
    assert loaded.report.data["original"]["metric"] == plain(b.name).report.data["original"]["metric"]
    for name, params in plain(b.name).plan.weights.items():
        assert np.array_equal(loaded.plan.weights[name].scale, params.scale)


def test_an_integer_file_that_computes_in_float_is_an_error(b, monkeypatch, tmp_path):
    """The export of the quantized model is exchanged for the float one, under its name."""
    side = plain(b.name).side
    write = side.export

    def tampered(model, plan, target, path, **options):
        write(model, None, target, path, **options)

    monkeypatch.setattr(side, "export", tampered)
    with pytest.raises(
        whet.WhetError, match=rf"'model\{b.suffix}' should compute in integers, but 2 of its 2 operators"
    ) as caught:
        run(b, out=tmp_path / "out")
    assert type(caught.value).__name__ == "ExportError" and not (tmp_path / "out").exists()


FILES = ["model{}", "original{}", "report.html", "report.json"]


def test_the_folder_is_written_whole_and_replaced_only_when_asked(b, tmp_path):
    out = tmp_path / "deep" / "out"
    made = run(b, out=out)
    names = sorted(name.format(b.suffix) for name in FILES)
    written = {path.name for path in out.iterdir()}
    assert written >= set(names) and not any(name.startswith(".") for name in written)
    assert json.loads((out / "report.json").read_text()) == made.report.data == whet.Report.read(out / "report.json").data
    assert "<html" in (out / "report.html").read_text()
    data = made.report.data
    for name, row in (("original", data["original"]), ("model", data["compressed"])):
        file = out / f"{name}{b.suffix}"
        assert file.stat().st_size == row["bytes"] and row["file"] == file.name
        assert whet.measure(file, b.data(48, 1), progress=False).metric["value"] == row["metric"]["value"]

    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(whet.WhetError, match=r"already holds .*model.*overwrite=True"):
        run(b, out=out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run(b, out=out, overwrite=True, seed=3)
    assert {path.name for path in out.iterdir()} == written | {"notes.txt"}
    assert json.loads((out / "report.json").read_text())["seed"] == 3


@ONCE
def test_a_folder_is_not_half_written(b, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("whet.pipeline.output.write_html", full)
    with pytest.raises(whet.WhetError, match=r"Cannot write to .*No space left on device") as caught:
        run(b, out=tmp_path / "out")
    assert isinstance(caught.value, OSError)
    assert list(tmp_path.iterdir()) == []


METRIC = {"name", "value", "ci95", "n", "higher_is_better"}
LATENCY = {"p50", "p90", "batch", "threads", "runs", "cpu_per_wall"}
EVIDENCE = {"file", "bytes", "gzip_bytes", "metric", "latency_ms", "runtime", "placement", "dtypes", "warnings"}
EVIDENCE |= {"latencies", "zstd_bytes", "operators", "process"}
PARITY = {"agreement", "max_error", "mean_error", "sqnr_db"}
MOVED = {"metric_drop", "size_ratio", "gzip_ratio", "latency_ratio"}
REPORT = {
    *("format", "seed", "created", "environment", "original", "compressed", "change", "steps", "simulation_parity"),
    *("recipe", "budget", "candidates", "warnings"),
}
STEP = {"spec", "changed", "skipped", "seconds", "train", "unmatched"}


def without_reason(row):
    """The fields of an estimate; a "reason" stands only beside something that is null."""
    assert "reason" not in row or None in row.values()
    return set(row) - {"reason"}


def test_report_json_has_its_fields(b):
    data = json.loads(plain(b.name).report.to_json())
    assert set(data) >= REPORT and data["format"] == 1 and data["seed"] == 0
    assert set(data["original"]) >= EVIDENCE and set(data["compressed"]) >= EVIDENCE | {"parity"}
    assert "parity" not in data["original"]
    for row in (data["original"], data["compressed"]):
        assert without_reason(row["metric"]) == METRIC and len(row["metric"]["ci95"]) == 2
        assert set(row["latency_ms"]) >= LATENCY and 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p90"]
        assert {"name", "version"} <= set(row["runtime"]) and row["runtime"]["version"]
        assert set(row["dtypes"]) == {"stored", "computed"} and 0 < row["gzip_bytes"]
    assert data["original"]["placement"] is None and data["compressed"]["placement"]["target"] == b.target
    assert data["compressed"]["placement"]["quantized_weights"] == 2
    assert without_reason(data["compressed"]["parity"]) == PARITY
    change = data["change"]
    assert set(change) >= MOVED
    assert without_reason(change["metric_drop"]) == without_reason(change["latency_ratio"]) == {"value", "ci95"}
    assert change["size_ratio"] == pytest.approx(data["compressed"]["bytes"] / data["original"]["bytes"])
    assert change["gzip_ratio"] == pytest.approx(data["compressed"]["gzip_bytes"] / data["original"]["gzip_bytes"])
    (step,) = data["steps"]
    assert set(step) >= STEP and [row["bits"] for row in step["changed"]] == [8, 8] and step["train"] is None
    assert set(data["simulation_parity"]) == {"agreement", "sqnr_db"}
    assert data["simulation_parity"]["agreement"] >= 0.97
    sqnr = data["simulation_parity"]["sqnr_db"]
    assert sqnr is None or sqnr > 40
    assert set(data["environment"]) >= {"python", "os", "machine", "cpu", "cores", "cpu_features", "memory_bytes", "packages"}
    assert data["compressed"]["dtypes"]["stored"]["int8"] >= 54 + 288 and "int8" not in data["original"]["dtypes"]["stored"]


def test_a_train_step_reports_its_history(b):
    data = run(b, recipe=[Train(epochs=3, apply=Prune(0.5, schedule=Cubic(frequency=1))), Quantize()]).report.data
    train = data["steps"][0]["train"]
    assert set(train) == {"history", "stop", "metric", "notes"}
    assert [row["epoch"] for row in train["history"]] == [1, 2, 3]
    assert all(
        set(row) == {"epoch", "loss", "metric", "sparsity", "learning_rate", "eligible", "phase"} for row in train["history"]
    )
    assert train["history"][-1]["sparsity"] == pytest.approx(0.5) and set(train["stop"]) == {"reason", "best_epoch", "epochs"}


@pytest.mark.parametrize(
    ("framework", "target", "beside"),
    [("torch", "openvino", "{}.bin"), ("keras", "tensorflow", "{}.savedmodel/saved_model.pb")],
)
def test_files_in_several_parts_are_written_whole_and_run(framework, target, beside, tmp_path):
    pytest.importorskip(target)
    b = bench(framework)
    given = {"target": target, "recipe": LIGHT if target == "openvino" else Recipe((Prune(0.5),)), "out": tmp_path}
    for overwrite in (False, True):
        made = run(b, **given, overwrite=overwrite).report.data["compressed"]
        assert (tmp_path / beside.format("model")).exists() and (tmp_path / beside.format("original")).exists()
        measured = whet.measure(tmp_path / made["file"], b.data(48, 1), progress=False)
        assert measured.metric["value"] == made["metric"]["value"] and measured.bytes == made["bytes"]
    with pytest.raises(whet.WhetError, match="already holds"):
        run(b, **given)
