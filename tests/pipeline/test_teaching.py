"""Teachers through stored outputs, several at once, or the model itself: in both frameworks and across them."""

import json
import warnings

import numpy as np
import pytest

import whet
from bench import FRAMEWORKS, bench
from whet.data import Batches
from whet.errors import DataError, ModelError, OutputError
from whet.graph.teacher_store import fingerprints, write_outputs
from whet.specs import Distill, LogitsMSE, Prune, SoftTargets, TeacherConfidence, TeacherSubsets, TeacherWeights, Train

OTHER = {"torch": "keras", "keras": "torch"}
AXES = {"torch": (0, 2, 3, 1), "keras": (0, 3, 1, 2)}  # from a framework's images to the other's


def first_loss(framework, teacher, distill=None, data=None, epochs=1):
    """The training losses of the framework's student on `data`, one an epoch."""
    made = whet.distill(
        bench(framework).build(),
        teacher,
        distill or Distill(),
        fit=Train(epochs=epochs, learning_rate=1e-3),
        train=bench(framework).data(96) if data is None else data,
        progress=False,
    )
    return [row["loss"] for row in made.steps[-1].train["history"]], made


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_stored_outputs_teach_like_the_live_teacher(framework, tmp_path):
    """Also shuffled, over epochs: the same losses to float32's last digits, and the same weights."""
    here = bench(framework)
    teacher, (x, _) = here.build(), here.data(96)
    store = whet.teacher_outputs(teacher, x, tmp_path / "store", progress=False)
    assert len(store) == 96 and store.shape == (3,) and "96 examples (3,)" in repr(store)
    live, one = first_loss(framework, teacher, epochs=3)
    stored, other = first_loss(framework, whet.StoredOutputs(tmp_path / "store"), epochs=3)
    np.testing.assert_allclose(stored, live, rtol=1e-5)
    for name, array in here.weights(one.model).items():
        np.testing.assert_allclose(array, here.weights(other.model)[name], atol=1e-4)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_model_of_the_other_framework_and_a_file_teach(framework, tmp_path):
    """The student's loss is by hand that of the other framework's outputs, live or from the exported file."""
    there = bench(OTHER[framework])
    teacher, (x, y) = there.build(), bench(framework).data(96)
    turn = lambda images: images.transpose(AXES[framework])  # noqa: E731
    path = whet.quantize(teacher, calibration=turn(x), progress=False).export(tmp_path / f"teacher{there.suffix}")
    with pytest.raises(ModelError, match=r"teach through whet\.teacher_outputs"):
        first_loss(framework, teacher)
    with pytest.raises(ModelError, match=r"cannot teach while training.*whet\.teacher_outputs\(file"):
        first_loss(framework, path)
    for number, source in enumerate((teacher, path)):
        store = whet.teacher_outputs(source, x, tmp_path / str(number), transform=turn, progress=False)
        found, _ = first_loss(framework, store, Distill(LogitsMSE(), student_weight=0), data=(x[:64], y[:64]))
        student = np.asarray(
            whet.fit.__globals__["side_of"](bench(framework).build()).predict(bench(framework).build(), x[:64])
        )
        # Dropout is at work in the student: near, not equal.
        assert found[0] == pytest.approx(float(((student - store.outputs(x[:64])) ** 2).mean()), rel=0.5, abs=0.5)
        assert store.teacher == (type(teacher).__name__ if number == 0 else path.name)


def predictor(rows=1e9):
    """A teacher of plain NumPy that fails after so many rows."""
    seen = [0]

    def predict(x):
        seen[0] += len(x)
        if seen[0] > rows:
            raise KeyboardInterrupt
        return np.stack([x.sum(1), x[:, 0] ** 2, -x[:, 1]], axis=-1)

    return predict, seen


def examples(n=50):
    return np.random.default_rng(0).normal(size=(n, 5)).astype(np.float32)


def test_a_run_that_was_killed_goes_on(tmp_path):
    x, store = examples(), tmp_path / "store"
    data = lambda rows=x: Batches(rows, "data", batch=8)  # noqa: E731
    predict, _ = predictor(rows=30)
    with pytest.raises(KeyboardInterrupt):
        write_outputs(predict, "t", data(), store, progress=False)
    with pytest.raises(DataError, match="is not finished"):
        whet.StoredOutputs(store)
    with (store / "outputs.npy").open("ab") as stream:  # killed while it wrote
        stream.write(b"half a row")
    predict, seen = predictor()
    made = write_outputs(predict, "t", data(), store, progress=False)
    assert seen[0] == 8 + 26  # the first batch, to know the teacher by, and what was missing
    np.testing.assert_array_equal(np.load(store / "outputs.npy"), predictor()[0](x))
    order = np.random.default_rng(1).permutation(50)
    np.testing.assert_array_equal(made.outputs(x[order]), predictor()[0](x)[order])
    predict, seen = predictor()
    write_outputs(predict, "t", data(), store, progress=False)
    assert seen[0] == 8  # nothing is written twice


def test_other_data_another_order_and_another_teacher_are_noticed(tmp_path):
    x, store = examples(), tmp_path / "store"
    data = lambda rows: Batches(rows, "data", batch=8)  # noqa: E731
    made = write_outputs(predictor()[0], "t", data(x), store, progress=False)
    with pytest.raises(DataError, match=r"Batch 1 of data is not what is stored there.*another order"):
        write_outputs(predictor()[0], "t", data(np.concatenate([x[:8], x[:7:-1]])), store, progress=False)
    with pytest.raises(DataError, match="holds 50 examples, and the data has 24"):
        write_outputs(predictor()[0], "t", data(x[:24]), store, progress=False)
    with pytest.raises(ModelError, match=r"are another teacher's: on the first batch they differ by"):
        write_outputs(lambda rows: predictor()[0](rows) + 1, "t", data(x), store, progress=False)
    with pytest.raises(DataError, match="2 of the batch's 4 examples are not among the 50"):
        made.outputs(np.concatenate([x[:2], x[2:4] + 1e-6]))
    again = write_outputs(lambda rows: predictor()[0](rows) + 1, "u", data(x), store, overwrite=True, progress=False)
    assert again.teacher == "u" and again.outputs(x[3:4])[0, 2] == 1 - x[3, 1]
    with pytest.raises(ModelError, match="NaN or Inf on batch 0"):
        write_outputs(lambda rows: rows * np.nan, "t", data(x), tmp_path / "nan", progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is no store"):
        write_outputs(predictor()[0], "t", data(x), tmp_path / "mine", overwrite=True, progress=False)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    with pytest.raises(DataError, match="is no store"):
        whet.StoredOutputs(tmp_path / "mine")


def test_fingerprints_tell_examples_apart():
    x = np.random.default_rng(0).integers(0, 2, (20_000, 9)).astype(np.float32)
    unique = len(np.unique(x, axis=0))
    assert unique == 512 and len(np.unique(fingerprints(x))) == unique  # values of few bits
    bits = np.zeros((31, 3), np.uint8)
    bits[np.arange(24), np.arange(24) // 8] = 1 << np.arange(24) % 8  # no whole words
    assert len(np.unique(fingerprints(bits))) == 25
    both = {"a": x[:5], "b": np.arange(5)}
    assert (
        len(np.unique(fingerprints(both))) == 5
        and fingerprints(both)[2] == fingerprints({"a": x[2:3], "b": np.arange(2, 3)})[0]
    )


def test_probabilities_are_kept_as_such_and_told(tmp_path):
    powers = lambda x: np.exp(predictor()[0](x))  # noqa: E731
    softmax = lambda x: powers(x) / powers(x).sum(-1, keepdims=True)  # noqa: E731
    store = write_outputs(softmax, "a file", Batches(examples(), "data"), tmp_path / "p", progress=False)
    assert store.is_normalized and json.loads((tmp_path / "p" / "store.json").read_text())["normalized"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_probabilities_teach_by_their_logarithms(framework, tmp_path):
    here = bench(framework)
    (x, y), live = here.data(64), here.build()
    logits = whet.teacher_outputs(live, x, tmp_path / "logits", progress=False)
    rows = np.exp(logits.outputs(x).astype(np.float64))
    table = dict(zip(fingerprints(x).tolist(), rows / rows.sum(-1, keepdims=True), strict=True))
    normalized = write_outputs(
        lambda inputs: np.stack([table[key] for key in fingerprints(inputs).tolist()]),
        "softmax",
        Batches(x, "data"),
        tmp_path / "p",
        progress=False,
    )
    spec = Distill([SoftTargets(2.0)], student_weight=0)
    (one,), _ = first_loss(framework, logits, spec, (x, y))
    (other,), made = first_loss(framework, normalized, spec, (x, y))
    assert one == pytest.approx(other, rel=1e-4)
    assert any("softmax returned probabilities" in note for note in made.steps[-1].train["notes"])


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_several_teachers(framework, tmp_path):
    """Live and stored ones together; two that are one teacher teach like it; each way to join them trains."""
    here = bench(framework)
    teacher, (x, y) = here.build(), here.data(64)
    store = whet.teacher_outputs(teacher, x, tmp_path / "store", progress=False)
    one, _ = first_loss(framework, teacher, data=(x, y))
    for spec in (None, TeacherWeights((1, 3)), TeacherConfidence(), TeacherSubsets(((0,), (1, 2)))):
        two, _ = first_loss(framework, [teacher, store], Distill(teachers=spec), (x, y))
        assert two == pytest.approx(one, rel=1e-4), spec
    with pytest.raises(ModelError, match="names 3 weights, and there are 2"):
        first_loss(framework, [teacher, store], Distill(teachers=TeacherWeights((1, 1, 1))), (x, y))
    features = whet.Features(here.layer, here.layer)
    for several, why in (([teacher, store], "several teachers"), (store, "of a stored teacher")):
        with pytest.raises(ModelError, match=f"{why}.* Take one model"):
            first_loss(framework, several, Distill([SoftTargets(), features]), (x, y))
    with pytest.raises(ModelError, match="needs a teacher"):
        first_loss(framework, [], data=(x, y))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_model_itself_teaches_and_may_do_so_in_training_mode(framework):
    here = bench(framework)
    model, (x, y) = here.build(), here.data(64)
    before = here.frozen(model)
    spec = Train(epochs=1, learning_rate=1e-3, apply=[Prune(0.5), Distill(student_weight=0)])
    made = whet.fit(model, spec, train=(x, y), teacher=True, progress=False)
    assert made.steps[-1].train["history"][-1]["sparsity"] == 0.5
    still, _ = first_loss(framework, model, data=(x, y))
    noisy, _ = first_loss(framework, model, Distill(teacher_training=True), (x, y))
    assert noisy[0] != pytest.approx(still[0], rel=1e-3)  # the teacher's dropout and batch norm are at work
    after = here.frozen(model)
    assert all(np.array_equal(before[0][name], after[0][name]) for name in before[0]) and before[1] == after[1]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_losses_that_alone_are_too_little_are_warned_of(framework):
    here = bench(framework)
    features = whet.Features(here.layer, here.layer)
    for weight, said in ((0.0, "Nothing but Features teaches"), (0.5, "without a loss on the outputs was seen")):
        with pytest.warns(UserWarning, match=said):
            first_loss(framework, here.build(), Distill([features], student_weight=weight), here.data(64))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(teaches, on layers|without a loss on the outputs)")
        first_loss(framework, here.build(), Distill([SoftTargets(), features]), here.data(64))
