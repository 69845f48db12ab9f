"""Which whole layers go first: measured on data, each block alone replaced by its shortcut."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from whet.specs.base import spec
from whet.specs.criteria import FromData


@spec
@dataclass(frozen=True, slots=True)
class OutputChange(FromData):
    """`Σ (f(x) - f₋(x))² / Σ f(x)²` with `f₋` the model without the block: the error of its outputs. Data needs no targets.

    greedy: what remains is measured anew after every block that has left, at the cost of as many passes.
    """

    _: KW_ONLY
    greedy: bool = False


@spec
@dataclass(frozen=True, slots=True)
class LossChange(FromData):
    """`L(f₋(x), y) - L(f(x), y)` with `f₋` the model without the block: what the loss gains. Needs targets.

    The loss is cross-entropy where targets are classes, else the mean squared error. greedy: as of `OutputChange`.
    """

    _: KW_ONLY
    greedy: bool = False


@spec
@dataclass(frozen=True, slots=True)
class BlockInfluence(FromData):
    """`1 - E[cos(x, y)]` of a block's input and output (Men et al. 2024, ShortGPT, arXiv:2403.03853): one pass for all.

    A vector is a token's state, or all that an example has where there are no tokens. Data needs no targets.
    """


BLOCK_CRITERIA = (OutputChange, LossChange, BlockInfluence)
