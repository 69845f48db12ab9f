"""What a target's files can hold of a plan, and the refusal of what they cannot."""

from __future__ import annotations

from whet.errors import ExportError
from whet.graph.placement import Plan
from whet.numerics.affine import QParams
from whet.numerics.codebook import Codebook
from whet.specs.schemes import Float
from whet.specs.target import TARGETS, Target

_WORDS = {
    "int16": "weights of more than 8 bits",
    "unsigned": "weights with zero points",
    "groups": "a scale for each group of weights",
    "codebook": "levels that do not lie evenly",
    "float8": "8-bit floats",
}


def is_plain(params: QParams | Codebook) -> bool:
    """Whether a weight is stored as signed codes of at most 8 bits, with one scale or one for each channel."""
    return isinstance(params, QParams) and params.spec.symmetric and params.bits <= 8 and params.group is None


def kinds_of(params: QParams | Codebook) -> tuple[str, ...]:
    """The words of `Target.stores` that a target needs to hold a weight."""
    if isinstance(params, Codebook):
        return ("float8",) if isinstance(params.spec, Float) else ("codebook",)
    found = () if params.spec.symmetric else ("unsigned",)
    if params.group is not None:
        found = (*found, "groups")
    return (*found, "int16") if params.bits > 8 else found or ("int8",)


def refuse(plan: Plan, target: Target | None, *, wide: bool = False) -> None:
    """Refuse what integer kernels do not take (unless `wide` codes are computed in float), and what the files of `target`
    (None: any) cannot hold.

    Raises:
        ExportError: naming the weight or value, what it has, and targets that take it.
    """
    for name, params in plan.values.items():
        if params.bits > 8 and not wide:
            raise ExportError(
                f"The value {name!r} has {params.bits} bits; integer kernels of {plan.target} take at most 8. "
                "It can be simulated, not exported: choose Int(8) or fewer bits."
            )
    for name, weight in plan.weights.items():
        if plan.values and isinstance(weight, QParams) and weight.bits > 8 and not wide:
            raise ExportError(
                f"The weight {name!r} has {weight.bits} bits; integer kernels of {plan.target} take at most 8. "
                "It can be simulated, not exported: choose Int(8) or fewer bits."
            )
        if target is None:
            continue
        for kind in kinds_of(weight):
            if kind not in target.stores:
                others = sorted(t.name for t in TARGETS.values() if kind in t.stores and t.name != target.name)
                raise ExportError(
                    f"The weight {name!r} is quantized as {weight.spec!r}, and files of {target.name} cannot hold "
                    f"{_WORDS.get(kind, kind)}. It can be simulated. Choose a target that can ({', '.join(others)}), or "
                    "Int(8)."
                )
    bits = {name: spec.bits for name, spec in plan.dynamic.items() if spec.bits != 8}
    if bits:
        name = next(iter(bits))
        raise ExportError(
            f"The input of {name!r} is rounded to {bits[name]} bits at run time; kernels of {plan.target} take 8. "
            "It can be simulated, not exported: choose Dynamic()."
        )
