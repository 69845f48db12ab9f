"""n:m and block masks, ERK and other criteria on Keras models; what is not there is refused by name."""

import numpy as np
import pytest

import whet
import whet.keras
import zoo_keras
from whet.errors import SpecError
from whet.specs import ERK, NM, Block, Channel, Prune, Random, Taylor


def test_two_of_four_along_the_inputs() -> None:
    model, _ = zoo_keras.CASES["digits_cnn"]()
    made = whet.prune(model, Prune(granularity=NM(2, 4)))
    assert made.masks
    for name, mask in made.masks.items():
        inputs = mask.shape[-2]
        assert inputs % 4 == 0, name
        cut = np.moveaxis(mask, -2, -1).reshape(-1, 4)
        assert (cut.sum(1) == 2).all(), name
    assert any("no multiple of 4" in row["reason"] for row in made.steps[0].skipped)


def test_blocks_erk_and_chance() -> None:
    model, _ = zoo_keras.CASES["digits_cnn"]()
    made = whet.prune(model, Prune(0.5, granularity=Block(2, 2), criterion=Random(seed=1), allocation=ERK()))
    for name, mask in made.masks.items():
        cut = np.moveaxis(mask, (-2, -1), (0, 1)).reshape(mask.shape[-2] // 2, 2, mask.shape[-1] // 2, 2, -1)
        assert (cut == cut[:, :1, :, :1]).all(), name
    kept, size = sum(int(m.sum()) for m in made.masks.values()), sum(m.size for m in made.masks.values())
    assert kept / size == pytest.approx(0.5, abs=0.01)


def test_what_is_missing_is_named() -> None:
    model, inputs = zoo_keras.CASES["digits_cnn"]()
    with pytest.raises(SpecError, match="Taylor needs data for its gradients"):
        whet.prune(model, Prune(0.5, criterion=Taylor()))
    with pytest.raises(SpecError, match=r"Prune.rebuild='graph' is for PyTorch"):
        whet.prune(model, Prune(0.5, granularity=Channel(), rebuild="graph"), example=inputs)
