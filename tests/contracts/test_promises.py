"""Every technique, in both frameworks, keeps every promise."""

import json
import pickle

import numpy as np
import pytest

import whet
from bench import leaves, same, sqnr
from contract_table import TECHNIQUES, made, rerun
from whet.runtimes.content import read_dtypes
from whet.runtimes.sessions import open_session

SAVED = {".json", ".safetensors", ".keras", ".h5"}


@pytest.fixture(params=TECHNIQUES)
def technique(request):
    return TECHNIQUES[request.param]


@pytest.fixture
def result(technique, b):
    return made(technique.name, b.name)


@pytest.fixture
def again(technique, b):
    return rerun(technique.name, b.name)


@pytest.fixture(scope="session")
def files():
    """The files of the results by technique and framework, each exported once."""
    return {}


@pytest.fixture
def file(technique, result, b, files, tmp_path_factory):
    key = technique.name, b.name
    if key not in files:
        files[key] = result.export(tmp_path_factory.mktemp("contract") / f"model{b.suffix}")
    return files[key]


def truth(compressed, b):
    """Everything that a result is: weights, masks, scales."""
    plan = compressed.plan
    scales = {} if plan is None else {f"scale/{n}": p.scale for n, p in (*plan.weights.items(), *plan.values.items())}
    masks = {f"mask/{name}": mask for name, mask in compressed.masks.items()}
    return {**b.weights(compressed.float_model), **masks, **scales}


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_the_model_is_untouched(again):
    assert same(again.before, again.after)


def test_the_random_numbers_of_others_are_untouched(again):
    before, after = again.random_states
    assert before == after


def test_the_same_seed_gives_the_same_bits(again, result, b):
    assert equal(truth(again.result, b), truth(result, b))


def test_the_result_shares_nothing_with_the_model(again, b):
    kept = {name: array.copy() for name, array in truth(again.result, b).items()}
    b.poison(again.model, 7.0)
    assert equal(truth(again.result, b), kept)


def test_something_changes_and_is_reported(technique, result, b):
    before, after = b.weights(b.build()), b.weights(result.float_model)
    changed = any(not np.array_equal(before[name], after[name]) for name in before)
    assert changed or result.plan is not None
    steps = result.report.data["steps"]
    assert steps and all(step["seconds"] >= 0 and len(step["spec"]) == 1 for step in steps)
    rows = [row for step in steps for row in step["changed"]]
    assert bool(rows) == (technique.name not in ("train", "distill"))
    assert {row["name"] for row in rows if "sparsity" in row} == set(result.masks)
    trained = [step["train"] for step in steps if step["train"] is not None]
    assert all(len(record["history"]) == record["stop"]["epochs"] for record in trained)


def test_the_report_is_plain_json(result):
    assert json.loads(result.report.to_json()) == result.report.data


def test_no_change_is_an_error(technique, b):
    model = b.build()
    with pytest.raises(whet.WhetError, match=r"(?i)nothing|no layer|would (be|not)|no weight"):
        technique.vain(b, model)


def test_once_more_is_the_same_or_refused(technique, result, b):
    before, steps = truth(result, b), len(result.steps)
    if technique.again == "works":
        assert len(technique.run(b, result, 0).steps) == steps + 1
    else:
        with pytest.raises(whet.WhetError, match=technique.again):
            technique.run(b, result, 0)
    assert equal(truth(result, b), before) and len(result.steps) == steps


@pytest.mark.parametrize("technique", [t for t in TECHNIQUES if t not in ("compress", "train_then_quantize")], indirect=True)
def test_the_kind_of_numbers_is_kept(technique, b):
    half = b.cast(b.build())
    kinds = kinds_of(half, b)
    assert "float32" not in {kind for _, kind in kinds}
    result = technique.run(b, half, 0)
    assert kinds_of(result.float_model, b) == kinds
    assert all(kind != "float64" for _, kind in kinds_of(result.model, b))


def kinds_of(model, b):
    if b.name == "torch":
        return [(n, str(p.dtype).removeprefix("torch.")) for n, p in model.named_parameters()]
    return [(v.path, str(v.dtype)) for v in model.trainable_variables]


def test_masks_hold_the_asked_sparsity_to_the_end(technique, result, b):
    if technique.sparsity == 0:
        assert result.masks == {}
        return
    sizes = sum(mask.size for mask in result.masks.values())
    kept = sum(int(mask.sum()) for mask in result.masks.values())
    assert kept == sizes - round(technique.sparsity * sizes)
    arrays = list(b.weights(result.float_model).values())
    for mask in result.masks.values():
        held = [a for a in arrays if a.shape == mask.shape]
        assert any(not np.any(a[mask == 0]) and np.all(a[mask == 1]) for a in held)


def test_masks_are_in_the_codes_of_the_file(technique, result, b, file):
    codes = b.codes(file)
    assert (len(codes) > 0) == (technique.bits == 8)
    for mask in result.masks.values() if codes else ():
        zeros = [int(np.sum(array == 0)) for array in codes if array.size == mask.size]
        removed = mask.size - int(mask.sum())
        assert len(zeros) == 1 and removed <= zeros[0] <= removed + 0.05 * mask.size


def test_the_file_agrees_with_the_simulation(technique, result, b, file):
    inputs, _ = b.data(48, 1)
    expected = result.side.predict(result.model, inputs)
    found = open_session(file).run(inputs)
    assert sqnr(expected, found) > technique.agreement
    assert np.mean(expected.argmax(-1) == np.asarray(found).argmax(-1)) >= 0.97


def test_the_file_stores_what_was_asked(technique, file):
    stored = read_dtypes(file)["stored"]
    assert stored.get({8: "int8", 16: "float16", 32: "float32"}[technique.bits], 0) >= (54 + 288) * technique.bits // 8
    if technique.bits != 32:
        assert stored.get("float32", 0) < 4 * 54


def test_saves_without_pickle_and_loads_the_same(technique, result, b, tmp_path, monkeypatch):
    folder = result.save(tmp_path / "saved")
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= SAVED
    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    loaded = whet.load(folder, b.build())
    assert equal(truth(loaded, b), truth(result, b))
    assert loaded.steps == result.steps and loaded.seed == result.seed and loaded.report.data == result.report.data
    inputs, _ = b.data(16, 2)
    for one, other in zip(
        leaves(loaded.side.predict(loaded.model, inputs)), leaves(result.side.predict(result.model, inputs)), strict=True
    ):
        assert np.array_equal(one, other)


def refuse(*_, **__):
    raise AssertionError("a pickle was read")


@pytest.mark.parametrize("technique", ["prune_uniform", "float16", "prune_then_quantize"], indirect=True)
def test_what_was_loaded_exports_the_same_file(result, b, file, tmp_path):
    loaded = whet.load(result.save(tmp_path / "saved"), b.build())
    assert loaded.export(tmp_path / file.name).read_bytes() == file.read_bytes()
