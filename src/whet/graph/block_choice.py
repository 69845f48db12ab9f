"""Which whole blocks leave: eligible ones, the least important first, as many as were asked for or as a budget needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from whet.errors import BudgetError, ModelError, SpecError
from whet.graph.groups import Size
from whet.graph.placement import selected
from whet.graph.shortcuts import Block, Blocks
from whet.numerics.knapsack import cheapest_within
from whet.specs import Layer, Prune

Measure = Callable[[Sequence[str]], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Left:
    """The names of the blocks that leave, in the order of the model, and what every block was found to matter at first."""

    names: tuple[str, ...]
    importance: Mapping[str, float]


def eligible_blocks(found: Blocks, spec: Prune) -> tuple[tuple[Block, ...], tuple[tuple[str, str], ...]]:
    """The blocks that may leave, and (name, reason) of the others.

    Raises:
        ModelError: there is none.
    """
    chosen, skipped = [], list(found.skipped)
    for block in found.blocks:
        reason = selected(block.name, spec.keep, spec.include, *block.layers)
        if reason is None:
            chosen.append(block)
        else:
            skipped.append((block.name, reason))
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:8])
        raise ModelError(
            f"Prune can remove no layer of this model: nothing in it has a shortcut around it ({reasons or 'no addition'}). "
            "Remove channels: granularity=Channel()."
        )
    return tuple(chosen), tuple(skipped)


def choose_blocks(blocks: Sequence[Block], spec: Prune, size: Size, measure: Measure, *, greedy: bool) -> Left:
    """The blocks of least importance, as many as `spec` says; ties by position, the first leaves first.

    measure: the importance of every block when those given have left already. greedy: measure anew after each that leaves; else
    a budget is met by the choice of least total importance, exactly.

    Raises:
        ModelError: none would leave, or the budget cannot be met.
    """
    importance = dict(measure(()))
    count = _count(blocks, spec)
    if count is None:
        what = next(name for name in ("macs", "parameters", "bytes") if getattr(spec, name) is not None)
        excess = _excess(what, getattr(spec, what), size, blocks)
        names = _stepwise(blocks, measure, importance, what, excess) if greedy else _cheapest(blocks, importance, what, excess)
    elif greedy:
        names = _stepwise(blocks, measure, importance, None, count)
    else:
        names = [block.name for block in sorted(blocks, key=lambda block: importance[block.name])[:count]]
    return Left(tuple(block.name for block in blocks if block.name in names), importance)


def _count(blocks: Sequence[Block], spec: Prune) -> int | None:
    """How many leave; None where a budget says it."""
    if isinstance(spec.granularity, Layer) and spec.granularity.count is not None:
        if spec.granularity.count > len(blocks):
            names = ", ".join(block.name for block in blocks)
            raise SpecError(f"Layer({spec.granularity.count}) asks for more than can leave, which are {len(blocks)}: {names}.")
        return spec.granularity.count
    if spec.sparsity is None:
        return None
    count = round(spec.sparsity * len(blocks))
    if count == 0:
        raise ModelError(
            f"Prune would remove nothing: sparsity {spec.sparsity:g} of {len(blocks)} layers is less than one. Write "
            "granularity=Layer(1), or raise sparsity=."
        )
    return count


def _excess(what: str, limit: float, size: Size, blocks: Sequence[Block]) -> int:
    """How much must leave at least.

    Raises:
        SpecError: nothing must. ModelError: not enough can.
    """
    full = int(getattr(size, what))
    allowed = limit * full if limit < 1 else limit
    saved = sum(int(getattr(block, what)) for block in blocks)
    if full <= allowed:
        raise SpecError(f"The model has {full:,} {what} and fits Prune({what}={limit:g}) as it is.")
    if full - saved > allowed:
        raise ModelError(
            f"Prune({what}={limit:g}) allows {allowed:,.0f} {what}, and without all layers that can leave {full - saved:,} of "
            f"{full:,} remain. Allow more, loosen keep=, or remove channels too."
        )
    return full - int(allowed)


def _cheapest(blocks: Sequence[Block], importance: Mapping[str, float], what: str, excess: int) -> list[str]:
    """Of all choices that save `excess` the one of least total importance."""
    sizes = [int(getattr(block, what)) for block in blocks]
    try:
        choice = cheapest_within(
            [(0.0, importance[block.name]) for block in blocks], [(size, 0) for size in sizes], sum(sizes) - excess
        )
    except BudgetError as cause:
        raise ModelError(f"No choice of layers meets the budget of {what}: {cause}") from cause
    return [block.name for block, option in zip(blocks, choice.options, strict=True) if option]


def _stepwise(
    blocks: Sequence[Block], measure: Measure, importance: Mapping[str, float], what: str | None, amount: int
) -> list[str]:
    """The least important block again and again, what remains measured anew; until `amount` blocks, or so much, has left."""
    gone: list[str] = []
    known = {block.name: block for block in blocks}
    while len(gone) < len(blocks) and (len(gone) if what is None else sum(getattr(known[n], what) for n in gone)) < amount:
        found = importance if not gone else measure(gone)
        gone.append(min((name for name in known if name not in gone), key=lambda name: found[name]))
    return gone
