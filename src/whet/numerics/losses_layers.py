"""Which function computes a distillation loss on layers, how layers of two models are paired, and all of them together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from whet.errors import ModelError
from whet.numerics import losses_relations as relate
from whet.numerics.losses_attention import Attention, attention_matrices, relations
from whet.numerics.losses_features import attention_transfer, hints, same_positions
from whet.numerics.namespace import Array, Namespace
from whet.specs.distillation import (
    ATTENTION_LOSSES,
    CRD,
    PKT,
    RKD,
    AttentionMatrices,
    AttentionRelations,
    AttentionTransfer,
    Distill,
    Features,
    LayerLoss,
)

_WITHOUT_POSITIONS = 3  # of (n, positions…, channels): fewer axes have none
STUDENT, TEACHER = 0, 1
Heard = Mapping[
    tuple[int, str], Any
]  # (side, layer) -> its features, or the Attention in it under (side, layer + "/attention")
Maps = Mapping[str, Array]


def layer_loss(spec: LayerLoss, student: Any, teacher: Any, *, xp: Namespace, real: Array | None = None) -> Array:
    """The scalar of `spec`, its weight not applied. Shapes: (n, positions…, channels); features already projected.

    Losses on attention take two `Attention`. `real` (n, positions…): see `hints`.

    Raises:
        ModelError: the shapes do not fit each other.
    """
    if isinstance(spec, AttentionMatrices | AttentionRelations):
        return _attention_loss(spec, student, teacher, xp)
    if isinstance(spec, Features | AttentionTransfer):
        return _map_loss(spec, student, teacher, xp, real)
    if isinstance(spec, RKD):
        parts = []
        if spec.distance:
            parts.append(spec.distance * relate.rkd_distance(student, teacher, xp=xp))
        if spec.angle:
            parts.append(spec.angle * relate.rkd_angle(student, teacher, xp=xp))
        return sum(parts[1:], parts[0])
    if isinstance(spec, CRD):
        return relate.crd(student, teacher, spec.temperature, xp=xp)
    compare = relate.pkt if isinstance(spec, PKT) else relate.similarity_preserving
    return compare(student, teacher, xp=xp)


def _attention_loss(spec: AttentionMatrices | AttentionRelations, student: Any, teacher: Any, xp: Namespace) -> Array:
    if not isinstance(student, Attention) or not isinstance(teacher, Attention):
        raise ModelError(f"{type(spec).__name__} compares two Attention(query, key, value), got {type(student).__name__}.")
    if isinstance(spec, AttentionMatrices):
        return attention_matrices(student, teacher, divergent=spec.divergent, xp=xp)
    parts = [relations(student, teacher, of=of, heads=spec.heads, xp=xp) for of in spec.of]
    return sum(parts[1:], parts[0])


def _map_loss(spec: Features | AttentionTransfer, student: Array, teacher: Array, xp: Namespace, real: Array | None) -> Array:
    name, before = type(spec).__name__, tuple(student.shape)
    student, teacher = same_positions(student, teacher, xp=xp)
    if isinstance(spec, AttentionTransfer):
        if len(student.shape) < _WITHOUT_POSITIONS:
            raise ModelError(f"{name} compares positions, and {spec.student!r} gives {tuple(student.shape)}, which has none.")
        return attention_transfer(student, teacher, xp=xp)
    if student.shape[-1] != teacher.shape[-1]:
        raise ModelError(
            f"{name} needs equal channels behind its projector, got {student.shape[-1]} of the student and "
            f"{teacher.shape[-1]} of the teacher."
        )
    fits = real is not None and before == tuple(student.shape) and tuple(real.shape[1:]) == tuple(student.shape[1:-1])
    return hints(student, teacher, xp=xp, real=real if fits else None)


class LayerLosses:
    """The losses of one `Distill` on what layers compute: which layers are heard, which maps are trained, and their sum."""

    def __init__(self, spec: Distill, student: Sequence[str], teacher: Sequence[str]) -> None:
        """`student` and `teacher` are the models' layers by name, in order.

        Raises:
            ModelError: a name matches no layer, or a student's layers have none of the teacher's left to learn from.
        """
        self._losses = [(loss, paired_layers(loss, student, teacher)) for loss in spec.of_layers]

    def __bool__(self) -> bool:
        return bool(self._losses)

    def heard(self, side: int, *, attention: bool) -> list[str]:
        """The layers of a side whose features, or whose attention, are compared."""
        found = [
            pair[side] for loss, pairs in self._losses for pair in pairs if isinstance(loss, ATTENTION_LOSSES) == attention
        ]
        return list(dict.fromkeys(found))

    def notes(self) -> list[str]:
        """In words, which layers patterns paired where the models have different numbers of them."""
        several = [(type(loss).__name__, pairs) for loss, pairs in self._losses if len(pairs) > 1]
        return [f"{name}: " + ", ".join(f"{s} from {t}" for s, t in pairs) for name, pairs in several]

    def maps(self, heard: Heard, outputs: Sequence[Array]) -> dict[str, np.ndarray]:
        """The linear maps that some losses train, as they begin: "0.1/student/kernel" (in, out) and "…/bias" (out).

        Drawn uniformly from ±1/√in, the same in every framework. `heard` and `outputs` are of any batch.
        """
        rng, made = np.random.default_rng(0), {}
        for key, loss, names in self._each():
            features = [self._found(heard, side, name, loss, outputs) for side, name in enumerate(names)]
            for whose, width, wanted in _wanted(loss, features):
                bound = 1 / math.sqrt(width)
                made[f"{key}/{whose}/kernel"] = rng.uniform(-bound, bound, (width, wanted)).astype(np.float32)
                made[f"{key}/{whose}/bias"] = rng.uniform(-bound, bound, wanted).astype(np.float32)
        return made

    def rates(self) -> dict[str, float]:
        """The learning rate of each loss that may train maps, by the first part of their names."""
        return {key: loss.learning_rate for key, loss, _ in self._each() if isinstance(loss, Features | CRD)}

    def total(self, heard: Heard, outputs: Sequence[Array], maps: Maps, *, xp: Namespace, real: Array | None = None) -> Array:
        """The weighted sum over all losses and pairs; `outputs` are the student's and the teacher's.

        Raises:
            ModelError: a layer was not heard, or shapes do not fit.
        """
        total: Any = 0.0
        for key, loss, names in self._each():
            pair = [self._found(heard, side, name, loss, outputs) for side, name in enumerate(names)]
            if isinstance(loss, Features | CRD):
                pair[TEACHER] = xp.stop_gradient(pair[TEACHER])
                pair = [_pooled(one, xp) for one in pair] if isinstance(loss, CRD) else pair
                pair = [_mapped(one, f"{key}/{who}", maps, xp) for one, who in zip(pair, ("student", "teacher"), strict=True)]
            try:
                total = total + loss.weight * layer_loss(loss, *pair, xp=xp, real=real)
            except ModelError as error:
                if names[0] is None:
                    raise
                raise ModelError(f"{names[0]!r} of the student and {names[1]!r} of the teacher: {error}") from error
        return total

    def _each(self) -> list[tuple[str, LayerLoss, tuple[str | None, str | None]]]:
        """Each comparison: its key, its loss and the two layers; None where it is of the models' outputs."""
        found: list[tuple[str, LayerLoss, tuple[str | None, str | None]]] = []
        for index, (loss, pairs) in enumerate(self._losses):
            for number, names in enumerate(pairs or [(None, None)]):
                found.append((f"{index}.{number}", loss, names))
        return found

    @staticmethod
    def _found(heard: Heard, side: int, name: str | None, loss: LayerLoss, outputs: Sequence[Array]) -> Any:
        if name is None:
            return outputs[side]
        wants_attention = isinstance(loss, ATTENTION_LOSSES)
        found = heard.get((side, attention_in(name) if wants_attention else name))
        if found is None:
            what = (
                "computed no attention that can be seen: name the layer that does"
                if wants_attention
                else "was not called, or gave no floating-point tensor (n, …, channels). Choose another one"
            )
            raise ModelError(f"The layer {name!r} of the {('student', 'teacher')[side]} {what}.")
        return found


def attention_in(name: str) -> str:
    """Under which name the attention of the layer `name` is heard."""
    return f"{name}/attention"


def _wanted(loss: LayerLoss, features: Sequence[Array]) -> list[tuple[str, int, int]]:
    """The maps that `loss` trains for two features: (whose, channels in, channels out)."""
    widths = [int(one.shape[-1]) for one in features] if isinstance(loss, Features | CRD) else []
    if isinstance(loss, CRD):
        return [("student", widths[0], loss.dimension), ("teacher", widths[1], loss.dimension)]
    return [("student", *widths)] if widths and widths[0] != widths[1] else []  # type: ignore[list-item]


def _mapped(features: Array, key: str, maps: Maps, xp: Namespace) -> Array:
    """`features · kernel + bias` over the channels, where there is such a map."""
    if f"{key}/kernel" not in maps:
        return features
    return xp.matmul(features, maps[f"{key}/kernel"]) + maps[f"{key}/bias"]


def _pooled(features: Array, xp: Namespace) -> Array:
    """(n, positions…, channels) -> (n, channels): the mean over positions."""
    axes = tuple(range(1, len(features.shape) - 1))
    return xp.mean(features, axis=axes) if axes else features


def paired_layers(spec: LayerLoss, student: Sequence[str], teacher: Sequence[str]) -> list[tuple[str, str]]:
    """The layers that `spec` compares, as (student's name, teacher's name), of the models' layers in order.

    Where the teacher has more, M of the student's learn from N of them evenly: number m, counted from 1, from number
    `ceil(m · N / M)`, so that the last learns from the last (TinyBERT's uniform strategy; Jiao et al. 2020).

    Raises:
        ModelError: a name matches no layer, or more layers of the student than of the teacher.
    """
    if spec.student is None or spec.teacher is None:
        return []
    found = [_matching(spec, "student", spec.student, student), _matching(spec, "teacher", spec.teacher, teacher)]
    mine, its = len(found[0]), len(found[1])
    if mine > its:
        raise ModelError(
            f"{type(spec).__name__}: {spec.student!r} matches {mine} layers of the student ({_some(found[0])}) and "
            f"{spec.teacher!r} {its} of the teacher ({_some(found[1])}). Each needs one to learn from: match fewer."
        )
    return [(name, found[1][-(-(m + 1) * its // mine) - 1]) for m, name in enumerate(found[0])]


def _matching(spec: LayerLoss, whose: str, pattern: str, layers: Sequence[str]) -> list[str]:
    found = [name for name in layers if name == pattern] or [name for name in layers if fnmatchcase(name, pattern)]
    if not found:
        raise ModelError(
            f"{type(spec).__name__}: {pattern!r} matches no layer of the {whose}. Its layers: {_some(list(layers))}."
        )
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
