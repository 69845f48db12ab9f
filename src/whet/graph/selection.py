"""Which groups leave: scores, an allocation, a rounding, and a budget turned into a choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import ModelError, SpecError
from whet.graph.groups import Family, Gone, Groups, layer_named
from whet.graph.named_groups import Eligible, named_families, named_gone
from whet.graph.placement import selected
from whet.numerics.allocation import ranked_counts, ranked_within, round_kept, uniform_counts
from whet.numerics.criteria import normalised
from whet.specs import Global, Group, Head, Isomorphic, Prune

Floats = npt.NDArray[np.float64]
_STEPS = 30  # halvings of the fraction when a budget is met


def eligible(groups: Groups, spec: Prune) -> Eligible:
    """The families of the granularity of `spec`, without those that it keeps and those of a single group."""
    if isinstance(spec.granularity, Group):
        return named_families(groups, spec.granularity)
    wanted = "head" if isinstance(spec.granularity, Head) else "channel"
    found, skipped = [], []
    for family in groups.families:
        reason = _reason(family, spec)
        if family.kind != wanted:
            reason = f"its {family.kind}s are not asked for (granularity={type(spec.granularity).__name__}())"
        elif reason is None and len(family) < 2:
            reason = f"it has a single {family.kind}"
        if reason is None:
            found.append(family)
        else:
            skipped.append((family.layer, reason))
    for row in groups.fixed:
        held = groups.structure.held[row.tensor]
        if row.axis == held.out and len(held.shape) > 1:
            layer = layer_named(row.tensor) if "/" in row.tensor else row.tensor.removesuffix(".weight")
            skipped.append((layer, row.reason))
    return Eligible(tuple(found), tuple(dict.fromkeys(skipped)))


def _reason(family: Family, spec: Prune) -> str | None:
    """Why keep or include leaves this family out: by the layers whose outputs it holds."""
    makers = [member.tensor for member in family.members if member.is_parameter and not member.contracted]
    layers = [(layer_named(tensor), tensor) for tensor in makers]
    kept = next((reason for row in layers if (reason := selected(row[0], spec.keep, None, row[1])) is not None), None)
    if kept is not None or spec.include is None:
        return kept
    left_out = all(selected(layer, (), spec.include, tensor) is not None for layer, tensor in layers)
    return "not in include" if left_out else None


def choose(groups: Groups, families: Sequence[Family], scores: Sequence[Floats], spec: Prune) -> Gone:
    """The groups of `families` that leave: of each family those with the lowest scores, ties by position.

    Raises:
        ModelError: nothing would leave, or the budget of `spec` cannot be met.
    """
    if isinstance(spec.granularity, Group):
        gone = named_gone(groups, spec.granularity)
    elif spec.sparsity is not None:
        gone = _gone(groups, families, scores, _lost(groups, families, scores, spec, spec.sparsity))
    else:
        gone = _within_budget(groups, families, scores, spec)
    if not gone.any():
        raise ModelError(
            f"Prune would remove nothing: with round_to={spec.round_to} and sparsity {spec.sparsity} no layer can lose a "
            f"{'head' if isinstance(spec.granularity, Head) else 'multiple of channels'}. Raise sparsity= or lower round_to=."
        )
    return gone


def _gone(groups: Groups, families: Sequence[Family], scores: Sequence[Floats], lost: Sequence[int]) -> Gone:
    """The `lost` lowest groups of every family."""
    rows = zip(families, scores, lost, strict=True)
    return groups.gone([family.roots[np.argsort(score, kind="stable")[:count]] for family, score, count in rows])


def _lost(groups: Groups, families: Sequence[Family], scores: Sequence[Floats], spec: Prune, sparsity: float) -> list[int]:
    """How many groups each family loses, rounded."""
    found = []
    for family, lost in zip(families, _counts(families, scores, spec, sparsity), strict=True):
        axis = len(groups.structure.held[family.members[0].tensor].value[family.members[0].axis])
        step = 1 if family.kind == "head" else spec.round_to
        others = axis - len(family) * family.width
        found.append(round_kept(len(family), lost, step=step, width=family.width, others=others))
    return found


def _counts(families: Sequence[Family], scores: Sequence[Floats], spec: Prune, sparsity: float) -> list[int]:
    if isinstance(spec.allocation, Global):
        return ranked_counts([normalised(score) for score in scores], sparsity)
    if isinstance(spec.allocation, Isomorphic):
        return ranked_within([normalised(score) for score in scores], [_build(family) for family in families], sparsity)
    return uniform_counts([len(family) for family in families], sparsity)


def _build(family: Family) -> Any:
    """Equal for families of layers that are built alike: the same operations around them, whatever their sizes."""
    return (family.kind, tuple((m.axis, m.contracted, m.is_parameter) for m in family.members))


def _within_budget(groups: Groups, families: Sequence[Family], scores: Sequence[Floats], spec: Prune) -> Gone:
    """The least sparsity at which the model fits, by halving; then layers take back their last step while it still fits.

    Rounding makes many layers step at once; those whose returning groups score highest take theirs back first.
    """
    what = next(name for name in ("macs", "parameters", "bytes") if getattr(spec, name) is not None)
    limit, full = getattr(spec, what), groups.size()
    allowed = limit * getattr(full, what) if limit < 1 else limit

    def size(lost: Sequence[int]) -> int:
        return int(getattr(groups.size(_gone(groups, families, scores, lost)), what))

    if getattr(full, what) <= allowed:
        raise SpecError(f"The model has {getattr(full, what):,} {what} and fits Prune({what}={limit:g}) as it is.")
    low, high = 0.0, 0.999
    fewer, lost = [0] * len(families), _lost(groups, families, scores, spec, high)
    if size(lost) > allowed:
        raise ModelError(
            f"Prune({what}={limit:g}) allows {allowed:,.0f} {what}, and removing all that can leave gives {size(lost):,} of "
            f"{getattr(full, what):,}. Allow more, lower round_to={spec.round_to}, or loosen keep= (see whet.groups)."
        )
    for _ in range(_STEPS):
        middle = (low + high) / 2
        trial = _lost(groups, families, scores, spec, middle)
        if size(trial) <= allowed:
            high, lost = middle, trial
        else:
            low, fewer = middle, trial
    rows = zip(scores, fewer, lost, strict=True)
    worth = [float(normalised(np.sort(score))[few:many].mean()) if few < many else 0.0 for score, few, many in rows]
    for i in sorted(range(len(families)), key=lambda i: -worth[i]):
        trial = [*lost[:i], min(fewer[i], lost[i]), *lost[i + 1 :]]
        if size(trial) <= allowed:
            lost = trial
    return _gone(groups, families, scores, lost)
