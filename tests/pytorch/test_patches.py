"""Rows of a layer's matrix product: times the weight's matrices they give what PyTorch computes."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from whet.graph.matrices import Layout
from whet.torch.interception import Call
from whet.torch.patches import columns_at, geometry, outputs_at, positions

CASES = {
    "conv1d": (F.conv1d, (2, 4, 9), (6, 4, 3), {"stride": 2, "padding": 1}),
    "conv2d": (F.conv2d, (2, 4, 7, 8), (6, 4, 3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "conv3d": (F.conv3d, (2, 2, 5, 4, 6), (4, 2, 2, 3, 2), {"padding": 1, "dilation": 2}),
    "same padding": (F.conv2d, (2, 4, 7, 8), (6, 4, 4, 3), {"padding": "same"}),
    "no padding": (F.conv2d, (2, 4, 7, 8), (6, 4, 4, 3), {"padding": "valid"}),
    "grouped": (F.conv2d, (2, 4, 6, 6), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": (F.conv2d, (2, 4, 6, 6), (8, 1, 3, 3), {"groups": 4}),
    "one example": (F.conv2d, (4, 6, 6), (6, 4, 3, 3), {}),
    "transposed": (F.conv_transpose2d, (2, 4, 5, 6), (4, 6, 3, 2), {"stride": 2, "padding": 1, "output_padding": 1}),
    "transposed wide": (F.conv_transpose1d, (2, 4, 5), (4, 6, 2), {"stride": 3, "padding": 2, "dilation": 2}),
    "transposed grouped": (F.conv_transpose2d, (2, 4, 5, 6), (4, 3, 3, 3), {"groups": 2, "stride": 2}),
    "linear": (F.linear, (3, 5, 4), (6, 4), {}),
}


@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize("most", [10_000, 7])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_rows_times_matrices_are_the_outputs(case, most):
    function, shape, size, options = case
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(s, generator=generator) for s in (shape, size))
    op = "linear" if function is F.linear else "conv_transpose" if "transpose" in function.__name__ else "conv"
    call = Call(function, function.__name__, (x, weight), options)
    out = call()
    where = geometry(call, op, weight)
    at = positions(where, out, most, seed=3)
    columns, outputs = columns_at(where, x, at), outputs_at(where, out, at)
    transposed = op == "conv_transpose"
    layout = Layout(size, 1 if transposed else 0, 0 if transposed else 1, where.groups, transposed)
    matrices = layout.matrices(weight.numpy())
    made = np.stack([columns[g].numpy() @ matrices[g].T for g in range(where.groups)], axis=1).reshape(len(outputs), -1)
    np.testing.assert_allclose(made, outputs.numpy(), rtol=1e-4, atol=1e-5)
    assert len(outputs) <= max(most, out.shape[0] if out.ndim == len(size) else 1) + out.shape[0]
    again = positions(where, out, most, seed=3)
    assert torch.equal(at, again) and len(set(at.tolist())) == len(at)
