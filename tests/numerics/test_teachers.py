"""Several teachers as one target: weights, confidence and subsets, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from whet.errors import ModelError, SpecError
from whet.numerics.namespace import numpy_namespace as xp
from whet.numerics.teachers import confidence, joined
from whet.specs import Distill, TeacherConfidence, TeacherSubsets, TeacherWeights

LABELS = np.array([0, 2, 1, -100])


def outputs(count, width=3):
    return list(np.random.default_rng(0).normal(size=(count, 4, width)) * 3)


def test_weights_are_shares() -> None:
    a, b = outputs(2)
    np.testing.assert_allclose(joined(None, [a, b], None, classes=3, xp=xp), (a + b) / 2)
    np.testing.assert_allclose(joined(TeacherWeights((3, 1)), [a, b], None, classes=3, xp=xp), 0.75 * a + 0.25 * b)
    with pytest.raises(ModelError, match="names 1 weights, and there are 2 teachers"):
        joined(TeacherWeights(1.0), [a, b], None, classes=3, xp=xp)
    with pytest.raises(ModelError, match=r"one shape, got \(4, 3\) and \(4, 2\)"):
        joined(None, [a, b[:, :2]], None, classes=3, xp=xp)


def test_confidence_is_of_the_examples_class_or_else_of_the_distribution() -> None:
    found = outputs(3)
    logs = [z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in found]
    weights = confidence(found, LABELS, xp=xp)
    for row, label in enumerate(LABELS):
        if label == -100:
            losses = np.array([-(np.exp(log[row]) * log[row]).sum() for log in logs])
        else:
            losses = np.array([-log[row, label] for log in logs])
        wanted = (1 - np.exp(losses) / np.exp(losses).sum()) / 2
        np.testing.assert_allclose([w[row] for w in weights], wanted, rtol=1e-12)
        assert wanted.sum() == pytest.approx(1)
    target = joined(TeacherConfidence(), found, LABELS, classes=3, xp=xp)
    np.testing.assert_allclose(target, sum(w[:, None] * z for w, z in zip(weights, found, strict=True)))
    wrong = [np.array([[1e4, 0.0]]), np.array([[0.0, 1e4]])]  # one teacher is certain of the wrong class
    np.testing.assert_allclose([float(w[0]) for w in confidence(wrong, np.array([0]), xp=xp)], [1, 0], atol=1e-12)
    with pytest.raises(ModelError, match="there is 1"):
        confidence(found[:1], None, xp=xp)


def test_each_row_is_the_teachers_of_its_class() -> None:
    whole, own = outputs(1)[0], outputs(1, 2)[0]
    spec = TeacherSubsets(((1,), (2, 0)))
    target = joined(spec, [whole, own], LABELS, classes=3, xp=xp)
    np.testing.assert_array_equal(target[2:], whole[2:])  # class 1; and no class at all
    np.testing.assert_array_equal(target[:2, [2, 0]], own[:2])
    assert (target[:2, 1] < own[:2].min(-1) - 100).all()  # what its teacher does not know
    with pytest.raises(ModelError, match="needs integer targets"):
        joined(spec, [whole, own], None, classes=3, xp=xp)
    with pytest.raises(ModelError, match="2 classes must give 2 logits or all 3, got 4"):
        joined(spec, [whole, np.zeros((4, 4))], LABELS, classes=3, xp=xp)
    with pytest.raises(ModelError, match="names the class 2, and the student has 2"):
        joined(spec, [whole, own], LABELS, classes=2, xp=xp)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: TeacherWeights((0, 0)), "positive sum"),
        (lambda: TeacherWeights((-1, 2)), "values"),
        (lambda: TeacherSubsets(()), "a tuple of classes for each teacher"),
        (lambda: TeacherSubsets(((1,), ())), "tuples of class numbers"),
        (lambda: TeacherSubsets(((1, 2), (2,))), "class 2 is in two subsets"),
        (lambda: Distill(teachers=3), r"Distill\.teachers"),
        (lambda: Distill(teacher_training=1), "teacher_training"),
    ],
)
def test_what_is_refused(build, said) -> None:
    with pytest.raises(SpecError, match=said):
        build()
