"""Losses on layers inside Keras models, in `Train`: heard by name, mapped, with attention, and gone afterwards."""

import keras
import numpy as np
import pytest

from keras_parts import batches, dense, fitted, nested, points, same_weights
from whet import keras as side
from whet.data import Batches
from whet.errors import ModelError
from whet.keras.hearing import Hearing, both_heard
from whet.numerics.losses_layers import LayerLosses, attention_in, layer_loss
from whet.numerics.namespace import numpy_namespace as np_xp
from whet.specs import (
    CRD,
    PKT,
    RKD,
    AttentionMatrices,
    AttentionRelations,
    AttentionTransfer,
    Distill,
    Features,
    SimilarityPreserving,
    SoftTargets,
    Train,
)

L = keras.layers
pytestmark = [
    pytest.mark.filterwarnings("ignore:Nothing but .* teaches:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* without a loss on the outputs:UserWarning"),
]


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


def convolutions(width):
    """Two convolutions inside a model of their own, at 6×6 and 3×3, and a head."""
    inner = keras.Sequential(
        [
            L.Input((6, 6, 1)),
            L.Conv2D(width, 3, padding="same", activation="relu", name="conv1"),
            L.Conv2D(width, 3, padding="same", strides=2, name="conv2"),
        ],
        name="inner",
    )
    i = keras.Input((6, 6, 1))
    return keras.Model(i, L.Dense(3, name="head")(L.Flatten()(inner(i))))


def images(n=40):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 6, 6, 1)).astype("float32"), rng.integers(0, 3, n)


def tokens(heads, width, classes=3):
    """A transformer block with a padding mask on ids (n, 7): 0 is padding."""
    ids = keras.Input((7,), dtype="int32", name="ids")
    mask = keras.Input((7,), dtype="int32", name="attention_mask")
    x = L.Embedding(11, width, embeddings_initializer=keras.initializers.RandomNormal(stddev=2.0), name="embed")(ids)
    seen = L.Lambda(lambda m: keras.ops.cast(m[:, None, :], "bool"), output_shape=(1, 7))(mask)
    x = x + L.MultiHeadAttention(heads, width // heads, name="attention")(x, x, attention_mask=seen)
    return keras.Model([ids, mask], L.Dense(classes, name="head")(L.GlobalAveragePooling1D()(x)))


def sentences(n=24):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 8, n)
    mask = (np.arange(7) < lengths[:, None]).astype("int32")
    return {"ids": rng.integers(1, 11, (n, 7)).astype("int32") * mask, "attention_mask": mask}, rng.integers(0, 3, n)


def heard(model, features, attention, inputs):
    """What named layers compute, as NumPy arrays."""
    found = Hearing(model, features, attention)(inputs, training=False)["heard"]
    return keras.tree.map_structure(keras.ops.convert_to_numpy, found)


def first_loss(losses, student, teacher, data):
    spec = Train(epochs=1, learning_rate=1e-9, apply=[Distill(losses, student_weight=0)])
    _, step = fitted(student, spec, teacher=teacher, train=Batches(data, "train", batch=64), val=None)
    return step.train["history"][0]["loss"]


def test_each_loss_is_that_of_the_named_layers():
    """In the compiled step as in NumPy, layers of nested models too, with maps where channels differ."""
    student, teacher, (x, y) = convolutions(4), convolutions(6), images()
    names = ["inner/conv1", "inner/conv2"]
    both = both_heard(heard(student, names, [], x), heard(teacher, names, [], x))
    losses = [
        Features("inner/conv2", "inner/conv2", weight=2.0),
        AttentionTransfer("inner/conv*", "inner/conv*"),
        RKD("inner/conv2", "inner/conv1"),
        SimilarityPreserving("inner/conv1", "inner/conv1"),
        PKT("inner/conv2", "inner/conv2"),
        CRD("inner/conv2", "inner/conv2", dimension=5),
    ]
    outputs = [side.predict(model, x) for model in (student, teacher)]
    for chosen in (losses[:3], losses[3:]):
        table = LayerLosses(Distill(chosen), names, names)
        wanted = table.total(both, outputs, table.maps(both, outputs), xp=np_xp)
        assert first_loss(chosen, side.copy(student), teacher, (x, y)) == pytest.approx(float(wanted), rel=1e-4)


def test_attention_of_other_heads_and_widths():
    student, teacher, data = tokens(2, 8), tokens(4, 12), sentences()
    pair = []
    for model in (student, teacher):
        found = heard(model, [], ["attention"], [data[0]["ids"], data[0]["attention_mask"]])[attention_in("attention")]
        pair.append(both_heard({"a/attention": found}, {})[0, "a/attention"])
    assert pair[0].query.shape == (24, 2, 7, 4) and pair[1].value.shape == (24, 4, 7, 3)
    np.testing.assert_array_equal(pair[0].allowed[:, 0, 0], data[0]["attention_mask"] != 0)
    losses = [
        AttentionMatrices("attention", "attention"),
        AttentionMatrices("attention", "attention", divergent=True),
        AttentionRelations("attention", "attention", of=("value", "query", "key")),
    ]
    wanted = [float(layer_loss(loss, *pair, xp=np_xp)) for loss in losses]
    assert min(wanted) > 1e-3
    assert first_loss(losses, side.copy(student), teacher, data) == pytest.approx(sum(wanted), rel=1e-4)


def test_layers_learn_with_batches_of_two_sizes_and_nothing_is_left_behind():
    student, teacher = convolutions(4), convolutions(6)
    before, layers = side.copy(teacher), [layer for layer in student.get_layer("inner").layers]
    names = ("inner/conv2", "inner/conv2")
    losses = [Features(*names, learning_rate=0.03), CRD(*names), RKD(*names), PKT(*names), SimilarityPreserving(*names)]
    spec = Train(epochs=12, learning_rate=0.01, weight_decay=0.01, apply=[Distill([SoftTargets(), *losses])])
    _, step = fitted(student, spec, teacher=teacher, train=Batches(images(), "train", batch=32), val=None)
    history = [row["loss"] for row in step.train["history"]]
    assert history[-1] < 0.8 * history[0] and same_weights(before, teacher)
    assert not any("call" in vars(layer) for layer in [*layers, *teacher.get_layer("inner").layers])
    assert len(student.weights) == 6


def test_a_map_moves_at_its_own_rate():
    """The first layer alone is compared, through a map, while the student all but stands still."""
    falls = {}
    for rate in (1e-9, 0.03):
        spec = Distill(Features("inner/conv1", "inner/conv1", learning_rate=rate), student_weight=0)
        train = Train(epochs=15, learning_rate=1e-7, apply=[spec])
        _, step = fitted(convolutions(4), train, teacher=convolutions(6), train=Batches(images(), "train"), val=None)
        falls[rate] = step.train["history"][-1]["loss"] / step.train["history"][0]["loss"]
    assert falls[0.03] < 0.6 and falls[1e-9] == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (Features("conv9", "hidden"), r"'conv9' matches no layer of the student\. Its layers: hidden, out"),
        (Features("hidden", "idle"), "The layer 'idle' of the teacher was not called"),
        (AttentionMatrices("hidden", "hidden"), "'hidden' of the student computed no attention that can be seen"),
        (AttentionTransfer("hidden", "hidden"), "'hidden' of the student and 'hidden' of the teacher: .* compares positions"),
    ],
)
def test_what_cannot_be_compared_is_named(loss, said):
    class WithIdle(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden, self.idle, self.out = L.Dense(8, name="hidden"), L.Dense(3, name="idle"), L.Dense(3, name="out")

        def call(self, x):
            return self.out(self.hidden(x))

    teacher = WithIdle()
    teacher(points(4)[0])
    teacher.idle.build((None, 4))
    with pytest.raises(ModelError, match=said):
        fitted(dense(), Train(epochs=1, apply=[Distill([SoftTargets(), loss])]), teacher=teacher, train=batches())


def test_a_layer_that_runs_twice_is_heard_last():
    model, x = nested(), points(8)[0]
    found = heard(model, ["shared", "deep/same"], [], x)
    assert found["shared"].shape == (8, 4) and found["deep/same"].shape == (8, 4)
    again = heard(model, ["shared"], [], x)["shared"]
    np.testing.assert_array_equal(found["shared"], again)
