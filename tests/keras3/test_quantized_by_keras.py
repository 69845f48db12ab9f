"""What `keras.Model.quantize` has rounded on data (GPTQ, AWQ) is named and refused; its other modes are in tests/zoo."""

import keras
import numpy as np
import pytest

import whet
from whet.errors import ModelError
from whet.specs import Prune

pytestmark = pytest.mark.filterwarnings("ignore:Layer InputLayer does not have:UserWarning", "ignore:Invalid quantization mode")
L = keras.layers
IDS = np.random.default_rng(0).integers(0, 9, (2, 64))


class Block(L.Layer):
    """What Keras' GPTQ and AWQ take for a block: a layer that holds dense layers."""

    def __init__(self, **options):
        super().__init__(**options)
        self.inner = L.Dense(8, name="inner")

    def build(self, shape):
        self.inner.build(shape)
        self.built = True

    def call(self, x):
        return x + self.inner(x)


def rounded(mode):
    """A model whose block Keras has quantized on data."""
    embedding, block = L.Embedding(9, 8, name="tokens"), Block(name="block")
    model = keras.Sequential([L.Input((6,), dtype="int32"), embedding, block, L.Dense(9, name="out")])
    kind = {"gptq": keras.quantizers.GPTQConfig, "awq": keras.quantizers.AWQConfig}[mode]
    structure = {"pre_block_layers": [embedding], "sequential_blocks": [block]}
    options = {"num_samples": 2, "sequence_length": 6, "group_size": 4, "quantization_layer_structure": structure}
    model.quantize(mode, config=kind(dataset=list(IDS), tokenizer=np.asarray, **options))
    return model


@pytest.mark.parametrize("mode", ["gptq", "awq"])
def test_what_keras_rounded_on_data_is_refused(mode):
    model = rounded(mode)
    said = rf"'block/inner' is already quantized \({mode}, by keras' quantize\(\)\). Pass the float model"
    with pytest.raises(ModelError, match=said):
        whet.quantize(model, calibration=[IDS[:, :6].astype("int32")], target="litert", progress=False)
    with pytest.raises(ModelError, match=said):
        whet.prune(model, Prune(0.5), progress=False)


def test_every_mode_of_keras_is_tested():
    from keras.src.dtype_policies.dtype_policy import QUANTIZATION_MODES

    assert set(QUANTIZATION_MODES) == {"int8", "int4", "float8", "gptq", "awq"}
