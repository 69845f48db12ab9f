"""What counts as the same outputs when a file is checked against its model."""

import numpy as np
import pytest

from whet.errors import ExportError
from whet.formats.agreement import TOLERANCE, check_output

MODEL = np.linspace(-4, 4, 100, dtype=np.float32).reshape(10, 10)


@pytest.mark.parametrize("quantized", [False, True])
def test_what_kernels_differ_by_passes(quantized):
    pairs = [
        (MODEL, MODEL + np.float32(0.9 * TOLERANCE * 4)),
        (np.zeros(3, np.float32), np.full(3, 9e-7, np.float32)),
        (np.arange(3), np.arange(3)[::-1]),  # indices of equals may differ
        (MODEL[:0], MODEL[:0]),
    ]
    assert [check_output(*pair, "out", quantized=quantized) for pair in pairs] == [None] * 4


def test_one_value_counts_in_float_files_and_all_together_in_integer_ones():
    off = MODEL.copy()
    off[3, 4] += 1.1 * TOLERANCE * 4
    with pytest.raises(ExportError, match=r"a\.onnx: the file differs from the model by up to 0\.0044 \(outputs reach 4\)"):
        check_output(MODEL, off, "a.onnx", quantized=False)
    off[3, 4] += 2  # one code too far is no wrong file
    check_output(MODEL, off, "a.onnx", quantized=True)
    spread = float(np.sqrt(np.mean(MODEL**2)))
    check_output(MODEL, MODEL + 0.49 * spread, "a.onnx", quantized=True)
    with pytest.raises(ExportError, match="differs from the model"):
        check_output(MODEL, MODEL + 0.51 * spread, "a.onnx", quantized=True)


@pytest.mark.parametrize("quantized", [False, True])
def test_shapes_and_numbers_that_are_none_are_named(quantized):
    with pytest.raises(ExportError, match=r"output 1: the file returns the shape \(10, 9\), the model \(10, 10\)"):
        check_output(MODEL, MODEL[:, :9], "output 1", quantized=quantized)
    for bad in (np.nan, np.inf):
        with pytest.raises(ExportError, match="the file returns NaN or Inf, the model does not"):
            check_output(MODEL, np.where(MODEL > 3.9, bad, MODEL), "output 1", quantized=quantized)
