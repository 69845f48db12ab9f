"""Awkward models lose half of their channels, and what stays makes up for most of it."""

import numpy as np
import pytest

import whet
from whet import Channel, Prune, Reconstruct
from whet.data import leaves

TORCH = ("residual", "depthwise", "grouped", "shuffle", "permute", "decoder", "twice", "siamese", "functional", "weight_norm")
KERAS = ("concat_widths", "depthwise", "grouped", "channel_shuffle", "dense_reshape_transposed", "nested_functional")
KERAS += ("attention_layer", "one_dimensional", "padded_and_dilated")


def cases(framework):
    if framework == "torch":
        import zoo_torch

        return zoo_torch.CASES
    import zoo_keras

    return zoo_keras.CASES


def error(found, wanted):
    return sum(float(np.sum((a - b) ** 2)) for a, b in zip(leaves(found), leaves(wanted), strict=True))


@pytest.mark.parametrize(("framework", "name"), [*(("torch", name) for name in TORCH), *(("keras", name) for name in KERAS)])
def test_less_is_lost(framework, name):
    model, inputs = cases(framework)[name]()
    reconstruct = Prune(0.5, granularity=Channel(), round_to=1, reconstruct=Reconstruct())
    plain, solved = (
        whet.prune(model, spec, train=[inputs], progress=False)
        for spec in (Prune(0.5, granularity=Channel(), round_to=1), reconstruct)
    )
    reference = plain.side.predict(model, inputs)
    lost, left = (error(made.side.predict(made.model, inputs), reference) for made in (plain, solved))
    assert left < 0.75 * lost
    told = solved.steps[0].removal["reconstructed"]
    assert told["layers"] and all(row["output_db"] > row["silenced_db"] for row in told["layers"])
