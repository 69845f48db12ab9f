"""Several teachers' outputs as one target: weighed once for all, by each example's confidence, or by who knows its class.

The mean of logits is, behind a softmax, the geometric mean of the teachers' distributions, which Hinton et al. 2015
(arXiv:1503.02531, section 1) name beside the arithmetic one for an ensemble's soft targets; unlike that one it depends on no
temperature and serves losses on logits and on numbers too.
"""

from __future__ import annotations

from collections.abc import Sequence

from whet.errors import ModelError
from whet.numerics.namespace import Array, Namespace
from whet.specs.distillation import TeacherConfidence, TeacherSubsets, TeacherWeights

_NOWHERE = 200.0  # a logit this far below all others has probability e⁻²⁰⁰ at most
_IGNORED = -100  # a target that is padding

Joining = TeacherWeights | TeacherConfidence | TeacherSubsets | None


def joined(spec: Joining, outputs: Sequence[Array], labels: Array | None, *, classes: int, xp: Namespace) -> Array:
    """One target (…, classes) of the teachers' outputs (…, classes), in their order; labels (…) integers or None.

    None takes their mean. Of `TeacherSubsets` a teacher may return its own classes alone.

    Raises:
        ModelError: as many weights as teachers are needed, labels are missing, or classes do not fit.
    """
    if isinstance(spec, TeacherSubsets):
        return _of_its_subset(spec, outputs, labels, classes, xp)
    shapes = [tuple(one.shape) for one in outputs]
    if len(set(shapes)) > 1:
        raise ModelError(f"The teachers must give outputs of one shape, got {' and '.join(map(str, dict.fromkeys(shapes)))}.")
    if isinstance(spec, TeacherConfidence):
        weights = confidence(outputs, labels, xp=xp)
        return _sum([w[..., None] * z for w, z in zip(weights, outputs, strict=True)])
    shares = [1.0] * len(outputs) if spec is None else list(spec.values)
    if len(shares) != len(outputs):
        raise ModelError(f"TeacherWeights names {len(shares)} weights, and there are {len(outputs)} teachers.")
    total = sum(shares)
    return _sum([z * (share / total) for share, z in zip(shares, outputs, strict=True)])


def confidence(outputs: Sequence[Array], labels: Array | None, *, xp: Namespace) -> list[Array]:
    """`w_k = (1 - exp(L_k) / Σ_j exp(L_j)) / (K - 1)` of each row, `L_k` teacher k's cross-entropy (Zhang et al. 2022,
    arXiv:2201.00007, eq. 4).

    Without labels, and where they are padding, `L_k` is the entropy of its distribution. Shapes: (…, classes) -> (…).

    Raises:
        ModelError: fewer than two teachers.
    """
    if len(outputs) < 2:
        raise ModelError(f"TeacherConfidence weighs teachers against each other, and there is {len(outputs)}.")
    found = []
    for z in outputs:
        logs = xp.log_softmax(z, axis=-1)
        loss = -xp.sum(xp.exp(logs) * logs, axis=-1)
        if labels is not None:
            picked = -xp.sum(xp.where(xp.one_hot(labels, z.shape[-1]), logs, xp.full_like(logs, 0.0)), axis=-1)
            loss = xp.where(labels == _IGNORED, loss, picked)
        found.append(loss[..., None])
    # exp(L_k) / Σ exp(L_j), without overflow where a teacher is certain of another class.
    parts = xp.exp(xp.log_softmax(xp.concatenate(found, axis=-1), axis=-1))
    return [(1.0 - parts[..., k]) / (len(outputs) - 1) for k in range(len(outputs))]


def _of_its_subset(spec: TeacherSubsets, outputs: Sequence[Array], labels: Array | None, classes: int, xp: Namespace) -> Array:
    """Each row by the teacher whose subset holds its label; the first one's where none does."""
    if len(spec.classes) != len(outputs):
        raise ModelError(f"TeacherSubsets names {len(spec.classes)} subsets, and there are {len(outputs)} teachers.")
    if labels is None:
        raise ModelError("TeacherSubsets chooses a teacher by an example's class, and needs integer targets.")
    highest = max(max(subset) for subset in spec.classes)
    if highest >= classes:
        raise ModelError(f"TeacherSubsets names the class {highest}, and the student has {classes}: 0 to {classes - 1}.")
    wide = [_widened(z, subset, classes, xp) for z, subset in zip(outputs, spec.classes, strict=True)]
    chosen = wide[0]
    for z, subset in zip(wide[1:], spec.classes[1:], strict=True):
        is_its = labels == subset[0]
        for label in subset[1:]:
            is_its = is_its | (labels == label)
        chosen = xp.where(is_its[..., None], z, chosen)
    return chosen


def _widened(z: Array, subset: Sequence[int], classes: int, xp: Namespace) -> Array:
    """Logits of the classes of `subset` alone as logits of all, far below in the others."""
    if z.shape[-1] == classes:
        return z
    if z.shape[-1] != len(subset):
        raise ModelError(
            f"A teacher of {len(subset)} classes must give {len(subset)} logits or all {classes}, got {z.shape[-1]}."
        )
    far = xp.min(z, axis=-1, keepdims=True) - _NOWHERE
    place = {label: index for index, label in enumerate(subset)}
    return xp.concatenate([z[..., place[c] : place[c] + 1] if c in place else far for c in range(classes)], axis=-1)


def _sum(parts: list[Array]) -> Array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
