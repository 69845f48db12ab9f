"""Keras training on every kind of data, twice with one seed, and broken off in the middle of a ramp: the same weights."""

import keras
import numpy as np
import pytest

import whet
from whet import Cubic, Distill, Features, Prune, SoftTargets, Train
from whet.errors import DataError

L = keras.layers
GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(64, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int64")
RAMP = Train(
    epochs=3,
    learning_rate=0.01,
    apply=[Prune(0.6, schedule=Cubic(end=0.9, frequency=1)), Distill([SoftTargets(), Features("hidden", "hidden")])],
)
PARTS = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 64, 16)]


def network(seed=0, width=8):
    keras.utils.set_random_seed(seed)
    hidden = [L.Dense(width, name="hidden"), L.BatchNormalization(name="norm"), L.ReLU(), L.Dropout(0.2)]
    return keras.Sequential([keras.Input((6,)), *hidden, L.Dense(2, name="out")])


def fit(train=PARTS, spec=RAMP, **options):
    teacher = network(3, 12) if spec.distill else None
    return whet.fit(network(), spec, train=train, teacher=teacher, progress=False, **options)


def bits(made):
    return [array.tobytes() for array in made.float_model.get_weights()]


def rows(made):
    return made.steps[0].train["history"]


class Parts(keras.utils.PyDataset):
    def __len__(self):
        return len(PARTS)

    def __getitem__(self, index):
        return PARTS[index]


class Breaking(list):
    """Batches that end the program's run in the middle of the ramp: in the second epoch, when the first one's checkpoint is there."""

    def __init__(self, parts, file):
        super().__init__(parts)
        self.file = file

    def __iter__(self):
        for index, batch in enumerate(super().__iter__()):
            if index == 2 and self.file.exists():
                raise KeyboardInterrupt
            yield batch


@pytest.fixture(scope="module")
def whole():
    return fit()


def test_one_seed_is_one_result_and_a_broken_ramp_goes_on_to_it(whole, tmp_path):
    file = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(Breaking(PARTS, file), checkpoint=file)
    again = fit(checkpoint=file)
    assert again.steps[0].train["notes"][-1] == "continued from the checkpoint after epoch 1"
    assert bits(again) == bits(whole) and rows(again) == rows(whole)
    sparsity = [row["sparsity"] for row in rows(whole)]
    assert 0 < sparsity[0] < sparsity[1] < sparsity[2] == pytest.approx(0.6, abs=0.02)
    assert bits(fit(seed=1)) != bits(whole)


def test_batches_of_any_kind_train_alike(whole):
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
    for kind in (data, Parts(), (part for part in PARTS)):
        assert bits(fit(kind)) == bits(whole)


def test_sample_weights_go_among_the_targets():
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    spec = Train(epochs=1, loss=lambda outputs, targets: cross_entropy(targets["label"], outputs, targets["weight"]))
    weight = (np.arange(64) % 4 == 0).astype("float32")
    weighed = fit((X, {"label": Y, "weight": weight}), spec)
    wrong = np.where(weight > 0, Y, 1 - Y)  # labels that weigh nothing teach nothing
    assert bits(fit((X, {"label": wrong, "weight": weight}), spec)) == bits(weighed)
    assert bits(fit((X, {"label": wrong, "weight": np.ones(64, "float32")}), spec)) != bits(weighed)
    with pytest.raises(DataError, match=r"sample weights are not taken beside them: put them among the targets"):
        fit([(X, Y, weight)])
