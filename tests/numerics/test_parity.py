"""One source, four array libraries, the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import numerics_parity
from numerics_parity import SPECS, assert_same, compute, gradient_points, values
from other_backend import run_under
from whet.numerics.affine import fake_quantize, qparams, quantize
from whet.numerics.namespace import numpy_namespace
from whet.specs import Int
from whet.torch.namespace import xp as torch_xp


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return compute(numpy_namespace, lambda a: a, np.asarray)


def test_torch_equals_numpy(expected) -> None:
    assert_same(expected, compute(torch_xp, torch.from_numpy, lambda t: t.numpy()))


def test_keras_on_tensorflow_equals_numpy(expected) -> None:
    keras = pytest.importorskip("keras")
    from whet.keras.namespace import xp

    assert keras.backend.backend() == "tensorflow"
    assert_same(expected, compute(xp, keras.ops.convert_to_tensor, lambda t: np.asarray(keras.ops.convert_to_numpy(t))))


def test_keras_on_torch_equals_numpy(expected, tmp_path) -> None:
    pytest.importorskip("keras")
    run_under("torch", Path(numerics_parity.__file__).read_text(), tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as file:
        found = dict(file)
    np.testing.assert_array_equal(found.pop("gradient"), gradient_points()[1])
    assert_same(expected, found)


@pytest.mark.parametrize("jit", [False, True])
def test_codes_in_a_tensorflow_graph_equal_numpys(expected, jit) -> None:
    tf = pytest.importorskip("tensorflow")
    from whet.keras.namespace import xp

    spec = SPECS["uint8"]

    @tf.function(jit_compile=jit)
    def codes(x, low, high):
        scale, zero = qparams(low, high, spec, xp=xp)
        return quantize(x, scale, zero, spec, xp=xp)

    found = codes(tf.constant(values()), tf.constant(-2.7182817), tf.constant(3.1415927)).numpy()
    assert int(np.sum(found != expected["exact codes uint8"])) == 0


def test_straight_through_gradient_on_torch() -> None:
    points, gradients = gradient_points()
    x = torch.tensor(points, requires_grad=True)
    fake_quantize(x, torch.tensor(0.25), torch.tensor(4.0), Int(3, symmetric=False), xp=torch_xp).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), gradients)


def test_straight_through_gradient_on_keras_with_tensorflow() -> None:
    tf = pytest.importorskip("tensorflow")
    from whet.keras.namespace import xp

    points, gradients = gradient_points()
    x = tf.Variable(points)
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(fake_quantize(x, tf.constant(0.25), tf.constant(4.0), Int(3, symmetric=False), xp=xp))
    np.testing.assert_array_equal(tape.gradient(y, x).numpy(), gradients)


def test_no_gradient_reaches_the_teacher() -> None:
    from whet.numerics.losses import soft_targets

    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    soft_targets(student, teacher, 2.0, xp=torch_xp).backward()
    assert teacher.grad is None and student.grad is not None
    # d/ds of T² KL is T (softmax(s/T) - softmax(t/T)) / rows (Hinton et al. 2015, eq. 2)
    wanted = 2.0 * (torch.softmax(student / 2, -1) - torch.softmax(teacher / 2, -1)) / 4
    torch.testing.assert_close(student.grad, wanted.detach())


def test_fused_operator_of_torch_gives_the_same_values() -> None:
    spec = Int(8, symmetric=False)
    x = torch.from_numpy(values()[:65_536])
    scale, zero = qparams(torch.tensor(-2.5), torch.tensor(3.5), spec, xp=torch_xp)
    fused = torch.fake_quantize_per_tensor_affine(x, scale, zero.to(torch.int32), 0, 255)
    ours = fake_quantize(x, scale, zero, spec, xp=torch_xp)
    # torch multiplies by 1 / scale where numpy and the runtimes divide: only values beside a half point may differ, by one code.
    assert float((fused - ours).abs().max()) <= float(scale) * 1.001
    assert float((fused != ours).float().mean()) < 1e-4
