"""What pruning says before it runs."""

import gzip
import logging

import numpy as np
import pytest

import whet
from residual_models import build, data_of
from whet import NM, Block, Channel, Cubic, Group, Layer, Prune, Recipe, Train
from whet.errors import SpecError, TargetError
from whet.pipeline.expectation import expectation, expectations, zeros_bytes

SAID = {
    "masks": (
        Prune(0.8),
        "onnxruntime",
        ["80% of the weights", "on onnxruntime the file keeps its bytes and its time", "0.27"],
    ),
    "2:4": (Prune(granularity=NM(2, 4)), "litert", ["50% of", "NVIDIA GPUs, from Ampere on", "no target here uses"]),
    "1:8": (Prune(granularity=NM(1, 8)), None, ["1:8 pattern needs kernels made for it", "every target"]),
    "blocks": (Prune(0.5, granularity=Block(4, 1)), None, ["Blocks of 4 × 1 need kernels"]),
    "channels": (Prune(0.5, granularity=Channel()), None, ["about 0.25 of their bytes", "multiple of 8 are avoided", "Train"]),
    "macs": (Prune(macs=0.5, granularity=Channel(), round_to=1), None, ["until macs=0.5 holds", "write latency="]),
    "latency": (Prune(latency="2 ms", granularity=Channel()), "openvino", ["timed on openvino, holds latency='2 ms'"]),
    "layers": (Prune(granularity=Layer(2)), None, ["leave 2 layers", "whole time"]),
    "group": (Prune(granularity=Group({"a": {0: (1,)}})), None, ["positions named leave"]),
}


@pytest.mark.parametrize("case", SAID)
def test_it_says_what_comes_and_what_does_not(case):
    spec, target, parts = SAID[case]
    told = expectation(spec, target)
    assert all(part in told for part in parts) and "\n" not in told
    faster = "remove channels: granularity=Channel()" in told
    assert faster != spec.removes


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
def test_masked_weights_take_at_least_their_entropy_and_gzip_little_more(sparsity):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=200_000).astype(np.float32)
    plain = len(gzip.compress(weights.tobytes(), 9))
    weights[rng.permutation(weights.size)[: int(sparsity * weights.size)]] = 0
    packed = len(gzip.compress(weights.tobytes(), 9)) / plain
    assert zeros_bytes(sparsity) <= packed <= 1.4 * zeros_bytes(sparsity)


def test_it_is_logged_and_kept_before_anything_else_is_done(caplog):
    spec = Prune(0.5)
    with caplog.at_level(logging.INFO, "whet"):
        made = whet.prune(build("torch"), spec, example=data_of("torch")[0], target="openvino", progress=False)
    told = whet.expectation(spec, "openvino")
    assert caplog.messages == [told] and made.steps[0].control["expected"] == told


def test_a_recipe_tells_of_every_pruning_once():
    recipe = Recipe([Prune(0.3, granularity=Channel()), Train(epochs=1, apply=[Prune(0.5, schedule=Cubic())]), Train(epochs=1)])
    told = expectations(recipe)
    assert len(told) == 2 and told[0].startswith("30% of the channels") and told[1].startswith("50% of the weights")


def test_what_is_no_pruning_is_refused():
    with pytest.raises(SpecError, match=r"takes a whet.Prune"):
        expectation(Train(epochs=1))
    with pytest.raises(TargetError, match="Unknown target 'tpu'"):
        expectation(Prune(0.5), "tpu")
