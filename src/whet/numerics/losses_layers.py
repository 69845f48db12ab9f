"""Which function computes a distillation loss on layers, and how layers of two models are paired."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from whet.errors import ModelError
from whet.numerics import losses_relations as relations
from whet.numerics.losses_features import attention_transfer, hints, same_positions
from whet.numerics.namespace import Array, Namespace
from whet.specs.distillation import PKT, RKD, AttentionTransfer, Features, LayerLoss

_WITHOUT_POSITIONS = 3  # of (n, positions…, channels): fewer axes have none


def layer_loss(spec: LayerLoss, student: Array, teacher: Array, *, xp: Namespace) -> Array:
    """The scalar of `spec`, its weight not applied. Shapes: (n, positions…, channels); features already projected.

    Raises:
        ModelError: the shapes do not fit each other.
    """
    if isinstance(spec, Features | AttentionTransfer):
        name = type(spec).__name__
        student, teacher = same_positions(student, teacher, xp=xp)
        if isinstance(spec, AttentionTransfer):
            if len(student.shape) < _WITHOUT_POSITIONS:
                raise ModelError(
                    f"{name} compares positions, and {spec.student!r} gives {tuple(student.shape)}, which has none."
                )
            return attention_transfer(student, teacher, xp=xp)
        if student.shape[-1] != teacher.shape[-1]:
            raise ModelError(
                f"{name} needs equal channels behind its projector, got {student.shape[-1]} of the student and "
                f"{teacher.shape[-1]} of the teacher."
            )
        return hints(student, teacher, xp=xp)
    if isinstance(spec, RKD):
        parts = []
        if spec.distance:
            parts.append(spec.distance * relations.rkd_distance(student, teacher, xp=xp))
        if spec.angle:
            parts.append(spec.angle * relations.rkd_angle(student, teacher, xp=xp))
        return sum(parts[1:], parts[0])
    compare = relations.pkt if isinstance(spec, PKT) else relations.similarity_preserving
    return compare(student, teacher, xp=xp)


def paired_layers(spec: LayerLoss, student: Sequence[str], teacher: Sequence[str]) -> list[tuple[str, str]]:
    """The layers that `spec` compares, as (student's name, teacher's name), of the models' layers in order.

    Raises:
        ModelError: a name matches no layer, or the two match different numbers.
    """
    if spec.student is None or spec.teacher is None:
        return []
    found = [_matching(spec, "student", spec.student, student), _matching(spec, "teacher", spec.teacher, teacher)]
    if len(found[0]) != len(found[1]):
        raise ModelError(
            f"{type(spec).__name__}: {spec.student!r} matches {len(found[0])} layers of the student ({_some(found[0])}) and "
            f"{spec.teacher!r} {len(found[1])} of the teacher ({_some(found[1])}). They are paired in order: match as many."
        )
    return list(zip(*found, strict=True))


def _matching(spec: LayerLoss, whose: str, pattern: str, layers: Sequence[str]) -> list[str]:
    found = [name for name in layers if name == pattern] or [name for name in layers if fnmatchcase(name, pattern)]
    if not found:
        raise ModelError(
            f"{type(spec).__name__}: {pattern!r} matches no layer of the {whose}. Its layers: {_some(list(layers))}."
        )
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
