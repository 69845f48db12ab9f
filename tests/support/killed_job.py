"""A small `whet.compress` job that says each batch it trains on: killed in the middle, then run again, by the tests.

python killed_job.py FRAMEWORK OUT
"""

import hashlib
import json
import sys

import numpy as np
import pytest

import whet
from bench import convert_in_process, few_runs
from whet import Cubic, Distill, Features, Movement, Prune, Quantize, SoftTargets, Train
from whet.specs import QAT, Budget


class Told:
    """Batches that are told one by one when they are read."""

    def __init__(self, x, y):
        self.x, self.y, self.told = x, y, 0

    def __len__(self):
        return 4

    def __iter__(self):
        for start in range(0, len(self.x), 16):
            self.told += 1
            print("batch", flush=True)
            yield self.x[start : start + 16], self.y[start : start + 16]


def torch_model():
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))


def keras_model():
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(16, name="hidden"), layers.BatchNormalization(name="norm"), layers.ReLU(), layers.Dropout(0.3)]
    return keras.Sequential([keras.Input((8,)), *hidden, layers.Dense(2, name="out")])


def run(framework, out):
    """What the job ends with, and how many batches it read."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int64)
    losses = (SoftTargets(), Features(student="2", teacher="2")) if framework == "torch" else (SoftTargets(),)
    pruning = Train(
        epochs=3,
        learning_rate=0.01,
        apply=[Prune(0.5, criterion=Movement(), schedule=Cubic(end=0.6, frequency=1)), Distill(losses)],
    )
    data = Told(x, y)
    made = whet.compress(
        torch_model() if framework == "torch" else keras_model(),
        train=data,
        val=(x, y),
        budget=Budget(1.0),
        target="onnxruntime" if framework == "torch" else "litert",
        recipe=[pruning, Quantize(qat=QAT(epochs=3, learning_rate=1e-3))],
        progress=False,
        out=out,
    )
    weights = made.float_model.state_dict().values() if framework == "torch" else made.float_model.get_weights()
    found = {
        "weights": [hashlib.sha256(np.asarray(value).tobytes()).hexdigest() for value in weights],
        "scales": [float(params.scale.sum()) for params in made.plan.values.values()],
        "steps": [{key: step.train[key] for key in ("history", "stop", "notes")} for step in made.steps],
    }
    return json.loads(json.dumps(found)), data.told


def main(framework, out):
    """The job in a process of its own, which the tests kill."""
    with pytest.MonkeyPatch.context() as patch:
        few_runs(patch)
        if framework == "keras":
            convert_in_process(patch)
        run(framework, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
