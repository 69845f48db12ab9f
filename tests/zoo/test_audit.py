"""The zoo as a list: for each case and framework, 8 bits keep their promise, or a sentence says why not."""

import copy
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import audit_keras
import audit_torch
import whet
from bench import bench, leaves, same, sqnr
from other_backend import run_under
from whet.runtimes.evidence import pack
from whet.runtimes.sessions import open_session
from zoo_cases import CASES

ROWS = [("torch", row) for row in audit_torch.ROWS] + [("keras", row) for row in audit_keras.ROWS]
ELSEWHERE = {  # cases whose models are no awkward ones, and where they are tested
    22: "tests/zoo/test_zoo.py::test_control_flow_by_values_is_simulated_and_not_exported",
    27: "tests/zoo/test_audit.py::test_poor_calibration_is_refused_or_warned_of",
    28: "tests/zoo/test_audit.py::test_batches_in_any_form_give_one_plan",
    31: "tests/zoo/test_already_quantized.py::test_what_whet_has_quantized",
    32: "tests/zoo/test_audit.py::test_a_quantized_pytorch_model_is_copied_pickled_and_compiled",
    33: "tests/zoo/test_zoo.py::test_what_people_write_in_keras_works",
    34: "tests/zoo/test_audit.py::test_a_model_saved_under_another_backend_gives_the_same_codes",
    35: "tests/zoo/test_audit.py::test_the_promise_is_kept_or_refused",
}
QUIET = {"progress": False}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about what is odd here


def some(inputs, count):
    """`count` examples, from the first on, and around."""
    if isinstance(inputs, dict):
        return {name: some(array, count) for name, array in inputs.items()}
    return inputs[np.arange(count) % len(inputs)]


def made_of(row, framework):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = row.build()
    if framework == "torch" and row.refused is None:
        model.eval()
    return model, inputs


def test_no_case_is_missing():
    """Of 1 to 35; those after it are about training schedules, distillation and files."""
    named = {int(name.split()[0]) for name in (*CASES, *(row.name for _, row in ROWS)) if name.split()[0].isdigit()}
    assert named | set(ELSEWHERE) == set(range(1, 36))
    root = Path(__file__).parents[2]
    for place in ELSEWHERE.values():
        file, test = place.split("::")
        assert f"def {test}(" in (root / file).read_text()


@pytest.mark.parametrize(("framework", "row"), ROWS, ids=lambda value: getattr(value, "name", value))
def test_the_promise_is_kept_or_refused(framework, row, tmp_path, monkeypatch):
    b = bench(framework)
    model, inputs = made_of(row, framework)
    if row.refused is not None:
        with pytest.raises(whet.WhetError, match=row.refused):
            whet.quantize(model, calibration=[inputs], **QUIET)
        return
    before = b.frozen(model)
    made = whet.quantize(model, calibration=[inputs], **QUIET)
    assert same(before, b.frozen(model))

    skipped = {line["name"]: line["reason"] for line in made.steps[0].skipped}
    assert skipped.keys() == row.listed.keys() and all(word in skipped[name] for name, word in row.listed.items())
    assert len(made.plan.weights) == row.weights == len(made.steps[0].changed)
    floats, simulated = (made.side.predict(one, inputs) for one in (made.float_model, made.model))
    assert sqnr(floats, simulated) > 25

    path = tmp_path / f"model{b.suffix}"
    if row.unwritten is not None:
        monkeypatch.undo()  # the converter in a process of its own, as it is for everyone
        with pytest.raises(whet.WhetError, match=row.unwritten):
            made.export(path)
        assert not list(tmp_path.iterdir())
        return
    session = open_session(made.export(path))
    assert len(b.codes(path)) == row.weights
    for count in (len(leaves(simulated)[0]), 1, 5):  # whatever the size it was traced with
        part = some(inputs, count)
        expected = made.side.predict(made.model, part)
        found = pack(session.run(part), session, expected)
        assert isinstance(found, dict) == isinstance(expected, dict)
        assert [leaf.shape for leaf in leaves(found)] == [leaf.shape for leaf in leaves(expected)]
        assert sqnr(expected, found) > 35


POOR = {
    "nothing": (lambda x: [], "calibration is empty"),
    "an exhausted generator": (lambda x: (batch for batch in ()), "calibration is empty"),
    "NaN": (lambda x: np.where(x == x[3].flat[7], np.nan, x), r"holds nan at index \(3, "),
    "infinity": (lambda x: np.where(x == x[0, 0, 0, 0], np.inf, x), r"holds inf at index \(0, 0, 0, 0\)"),
    "one example": (lambda x: x[:1], "is a single example"),
    "one number": (lambda x: np.full_like(x, 0.5), r"nothing but 0\.5"),
}


@pytest.mark.parametrize("kind", POOR)
def test_poor_calibration_is_refused_or_warned_of(b, kind):
    spoil, said = POOR[kind]
    if kind in ("one example", "one number"):
        with pytest.warns(UserWarning, match=said):
            made = whet.quantize(b.build(), calibration=spoil(b.data(16)[0]), **QUIET)
        assert np.isfinite(made.side.predict(made.model, b.data(16, 1)[0])).all()
    else:
        with pytest.raises(whet.errors.DataError, match=said):
            whet.quantize(b.build(), calibration=spoil(b.data(16)[0]), **QUIET)


def scales(made):
    return {name: np.asarray(params.scale).tolist() for name, params in (made.plan.weights | made.plan.values).items()}


def test_batches_in_any_form_give_one_plan(b):
    x, y = b.data(64)
    plans = [
        scales(whet.quantize(b.build(), calibration=data, **QUIET))
        for data in (x, (x, y), [x[:32], x[32:]], [(x, y)], (part for part in (x[:5], x[5:])), b.loader(x, y), x.astype(float))
    ]
    assert len(plans[0]) >= 4 and all(plan == plans[0] for plan in plans)


@pytest.mark.parametrize("name", ["29 a transposed weight", "29 weights in one storage", "29 channels last"])
def test_the_layout_of_weights_changes_no_code(name):
    model, inputs = made_of(next(row for row in audit_torch.ROWS if row.name == name), "torch")
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if getattr(module, "weight", None) is not None:
            module.weight = torch.nn.Parameter(module.weight.detach().clone(memory_format=torch.contiguous_format))
    one, other = (whet.quantize(m, calibration=[inputs], **QUIET) for m in (model, plain))
    assert scales(one) == scales(other)
    assert np.array_equal(*(made.side.predict(made.model, inputs) for made in (one, other)))


def test_a_quantized_pytorch_model_is_copied_pickled_and_compiled():
    b = bench("torch")
    made = whet.quantize(b.build(), calibration=b.data(64)[0], **QUIET)
    x = torch.from_numpy(b.data(16, 1)[0])
    expected = made.model(x)
    assert not made.model.training
    for other in (
        copy.deepcopy(made.model),
        pickle.loads(pickle.dumps(made.model)),
        torch.compile(made.model, backend="eager"),
    ):
        assert torch.equal(other(x), expected) and torch.equal(other.eval()(x), expected)
    made.model.train()
    assert not torch.equal(made.model(x), expected)  # its dropout is the user's own
    made.model.eval()
    assert torch.equal(made.model(x), expected)


SAVE = """
import sys
import keras, numpy as np
assert keras.backend.backend() == "torch"
layers = keras.layers
parts = [layers.Conv2D(6, 3), layers.BatchNormalization(), layers.ReLU(), layers.Flatten(), layers.Dense(3)]
model = keras.Sequential([keras.Input((6, 6, 1)), *parts])
rng = np.random.default_rng(0)
model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.get_weights()])
model.save(sys.argv[1])
import whet
x = rng.normal(size=(32, 6, 6, 1)).astype("float32")
np.save(sys.argv[2], x)
made = whet.quantize(model, calibration=x, progress=False)
made.save(sys.argv[3])
"""


def test_a_model_saved_under_another_backend_gives_the_same_codes(tmp_path):
    keras = pytest.importorskip("keras")
    places = [str(tmp_path / name) for name in ("model.keras", "x.npy", "made")]
    run_under("torch", SAVE, *places)
    assert keras.backend.backend() == "tensorflow"
    x = np.load(places[1])
    made = whet.quantize(keras.models.load_model(places[0]), calibration=x, **QUIET)
    other = whet.load(places[2], keras.models.load_model(places[0]))
    mine, its = scales(made), scales(other)
    assert mine.keys() == its.keys() and re.search("conv2d", "".join(mine))
    for name, scale in mine.items():
        assert np.allclose(scale, its[name], rtol=1e-5)
    assert sqnr(made.side.predict(made.model, x), other.side.predict(other.model, x)) > 40
