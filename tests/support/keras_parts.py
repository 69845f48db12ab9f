"""Small Keras models and data for the tests of whet.keras."""

import keras
import numpy as np

from whet.data import Batches

L = keras.layers


@keras.saving.register_keras_serializable(package="whet_tests")
class Block(L.Layer):
    """Two dense layers that it makes for itself, unnamed."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = L.Dense(units)
        self.second = L.Dense(units)

    def call(self, x):
        return self.second(keras.ops.relu(self.first(x)))


class Bare(keras.Model):
    """A subclassed model as people write them: no configuration, no keyword arguments, not registered."""

    def __init__(self):
        super().__init__()
        self.hidden = L.Dense(6, activation="relu")
        self.out = L.Dense(3)

    def call(self, x):
        return self.out(self.hidden(x))


class Sized(keras.Model):
    """A subclassed model whose constructor takes an argument that nothing remembers."""

    def __init__(self, units):
        super().__init__()
        self.out = L.Dense(units)

    def call(self, x):
        return self.out(x)


def bare():
    model = Bare()
    model(np.zeros((1, 4), "float32"))
    return model


def dense(classes=3, softmax=False):
    return keras.Sequential(
        [
            L.Input((4,)),
            L.Dense(8, activation="relu", name="hidden"),
            L.Dense(classes, activation="softmax" if softmax else None, name="out"),
        ]
    )


def cnn(dropout=0.0, norm=False):
    return keras.Sequential(
        [
            L.Input((8, 8, 1)),
            L.Conv2D(4, 3, activation="relu", name="conv"),
            L.BatchNormalization(name="norm") if norm else L.Activation("linear", name="norm"),
            L.Flatten(),
            L.Dropout(dropout, name="drop"),
            L.Dense(10, name="out"),
        ]
    )


def nested(shared_inside=True):
    """A Sequential and a Functional inside a Functional; `shared` is used outside, and inside the inner model, called twice."""
    shared = L.Dense(4, name="shared")
    layers = [shared, L.Dense(4, name="same")] if shared_inside else [L.Dense(4, name="same")]
    inner = keras.Sequential([L.Input((4,)), *layers], name="inner")
    i = keras.Input((4,))
    deep = keras.Model(i, L.Dense(4, name="same")(i) + i, name="deep")
    x = keras.Input((4,))
    y = deep(inner(inner(shared(x))))
    return keras.Model(x, {"logits": L.Dense(3, name="same")(y), "features": y})


def points(n=96, classes=3, seed=0):
    """Points in 4 dimensions and the class of their nearest centre: easy to learn."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, 4)) * 2
    labels = rng.integers(0, classes, n)
    return (centres[labels] + 0.3 * rng.normal(size=(n, 4))).astype("float32"), labels.astype("int64")


def batches(what="train", n=96, batch=32, **kwargs):
    return Batches(points(n, **kwargs), what, batch=batch)


def fitted(model, spec, *, teacher=None, masks=None, train=None, val="default", metric=None, seed=0):
    """`whet.keras.train` with the usual arguments."""
    from whet.graph.epochs import TrainingRun
    from whet.keras import train as run

    given = TrainingRun(
        train=batches() if train is None else train,
        val=batches("val", 40, seed=1) if val == "default" else val,
        metric=metric,
        teacher=teacher,
        masks=masks or {},
        seed=seed,
        progress=False,
    )
    return run(model, spec, given)


def same_weights(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a.get_weights(), b.get_weights(), strict=True))


def undrawn(changed):
    """The rows of a step without their histograms, each of which counts the whole weight twice."""
    rows = [dict(row) for row in changed]
    for row in rows:
        drawn = row.pop("histogram")
        assert sum(drawn["before"]) == sum(drawn["after"]) == row["parameters"] and len(drawn["edges"]) == 2
    return tuple(rows)
