"""Ids on every position of every dimension: which positions of which tensors must be removed together.

Every position of every dimension of every tensor carries an integer, its id. Operations move ids about or unite them; positions
whose ids are one in the end leave together or stay together. A position that cannot leave is fixed, with the reason.

A dimension that is split, `flat[a·B + b] ↔ (i[a], j[b])`, or merged, which is the same relation read backwards, can lose
positions of one factor only, or it would be no rectangle. Which one is decided at the end, when all that reads the factors
is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Value = tuple[IntArray, ...]  # the ids of a tensor: one array for each dimension

FREE = 0
SECOND_FACTOR = "another factor of the same dimension is the one that can shrink"


@dataclass(frozen=True, slots=True, eq=False)
class _Link:
    """`flat` (n₁·n₂·…) is a grid over the factors (n₁), (n₂), …: one of them stays free."""

    flat: IntArray
    factors: tuple[IntArray, ...]


def _on_grid(ids: IntArray, factors: Sequence[IntArray], k: int) -> IntArray:
    """`ids`, one for each position of factor k, at every position of the grid, flat."""
    shape = [1] * len(factors)
    shape[k] = -1
    return np.broadcast_to(ids.reshape(shape), tuple(len(factor) for factor in factors)).reshape(-1)


class Ids:
    """Union-find over positions, with reasons for those that are fixed, and links that are decided by `solve`."""

    def __init__(self) -> None:
        self._parent: IntArray = np.zeros(1024, np.int64)
        self._reason: IntArray = np.zeros(1024, np.int64)  # of roots: index into reasons, 0 where free
        self._chosen = np.zeros(1024, bool)  # of roots: the free factor of a decided link
        self._contracted = np.zeros(1024, bool)  # of ids, not roots
        self._size = 0
        self.reasons: list[str] = [""]
        self._links: list[_Link] = []

    def __len__(self) -> int:
        return self._size

    def fresh(self, n: int, reason: str | None = None) -> IntArray:
        """`n` new ids, fixed for `reason` if one is given."""
        start, end = self._size, self._size + n
        while end > len(self._parent):
            self._grow()
        self._parent[start:end] = made = np.arange(start, end)
        self._size = end
        if reason is not None:
            self.fix(made, reason)
        return made

    def _grow(self) -> None:
        more = len(self._parent)
        self._parent = np.concatenate([self._parent, np.zeros(more, np.int64)])
        self._reason = np.concatenate([self._reason, np.zeros(more, np.int64)])
        self._chosen = np.concatenate([self._chosen, np.zeros(more, bool)])
        self._contracted = np.concatenate([self._contracted, np.zeros(more, bool)])

    def find(self, ids: IntArray) -> IntArray:
        """The root of every id: equal roots leave together."""
        roots = self._parent[ids]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[ids] = roots
        return roots

    def unite(self, left: IntArray, right: IntArray) -> None:
        """Make `left[i]` and `right[i]` one, for all i. Shapes are equal, or one of them broadcasts."""
        left, right = (side.reshape(-1) for side in np.broadcast_arrays(left, right))
        while True:
            one, two = self.find(left), self.find(right)
            differ = one != two
            if not differ.any():
                return
            low, high = np.minimum(one, two)[differ], np.maximum(one, two)[differ]
            np.minimum.at(self._parent, high, low)
            target = self.find(high)
            np.maximum.at(self._reason, target, self._reason[high])
            np.logical_or.at(self._chosen, target, self._chosen[high])

    def fix(self, ids: IntArray, reason: str) -> None:
        """These positions stay. What was fixed before keeps its reason."""
        roots = self.find(ids)
        free = roots[self._reason[roots] == FREE]
        if len(free):
            if reason not in self.reasons:
                self.reasons.append(reason)
            self._reason[free] = self.reasons.index(reason)

    def is_fixed(self, ids: IntArray) -> npt.NDArray[np.bool_]:
        """Where a position cannot leave."""
        fixed: npt.NDArray[np.bool_] = self._reason[self.find(ids)] != FREE
        return fixed

    def reason(self, one: int) -> str:
        """Why this id is fixed; empty where it is free."""
        return self.reasons[int(self._reason[self.find(np.asarray([one]))][0])]

    def contract(self, ids: IntArray) -> None:
        """These positions are summed over with weights: zero weights there silence what is read."""
        self._contracted[ids] = True

    def is_contracted(self, ids: IntArray) -> npt.NDArray[np.bool_]:
        """Which of exactly these ids, not of those united with them, `contract` was told of."""
        marked: npt.NDArray[np.bool_] = self._contracted[ids]
        return marked

    def link(self, flat: IntArray, factors: Sequence[IntArray], reason: str = SECOND_FACTOR) -> None:
        """`flat` is the grid of `factors`, the last running fastest; one of them will stay free.

        Raises:
            ValueError: the sizes do not multiply to that of `flat`.
        """
        if math.prod(len(factor) for factor in factors) != len(flat):
            raise ValueError(f"{[len(factor) for factor in factors]} do not multiply to {len(flat)}.")
        for factor in factors:
            if len(factor) == 1 and len(flat) > 1:
                self.fix(factor, "a dimension of size 1")
        wide = tuple(factor for factor in factors if len(factor) > 1)
        if len(wide) <= 1:
            for factor in wide or factors[:1]:
                self.unite(flat, factor)
            return
        self._links.append(_Link(flat, wide))

    def solve(self) -> None:
        """Decide every link.

        A link of which one factor alone can shrink is decided by that; where all else is done, a factor that shrinks
        elsewhere is preferred, then the one that leaves most groups, then the one that runs fastest. A dimension on which
        two decisions conflict becomes fixed.
        """
        pending = self._links
        self._links = []
        while pending:
            left = [link for link in pending if not self._decide(link)]
            if len(left) == len(pending):
                k = max(range(len(left)), key=lambda i: (any(self._is_chosen(f) for f in left[i].factors), -i))
                link = left.pop(k)
                self._apply(link, self._best(link))
            pending = left

    def _candidates(self, link: _Link) -> list[int]:
        return [k for k, factor in enumerate(link.factors) if not self.is_fixed(factor).all()]

    def _is_chosen(self, factor: IntArray) -> bool:
        return bool(self._chosen[self.find(factor)].any())

    def _decide(self, link: _Link) -> bool:
        """Apply a link that leaves no choice."""
        if self.is_fixed(link.flat).all():
            reason = self.reason(int(link.flat[0]))
            for factor in link.factors:
                self.fix(factor, reason)
            return True
        found = self._candidates(link)
        if not found:
            self.fix(link.flat, self.reason(int(link.factors[0][0])))
            return True
        if len(found) == 1:
            self._apply(link, found[0])
        return len(found) == 1

    def _apply(self, link: _Link, k: int) -> None:
        for other, factor in enumerate(link.factors):
            if other != k:
                self.fix(factor, SECOND_FACTOR)
        self.unite(link.flat, _on_grid(link.factors[k], link.factors, k))
        self._chosen[self.find(link.factors[k])] = True

    def _best(self, link: _Link) -> int:
        return max(self._candidates(link), key=lambda k: (self._is_chosen(link.factors[k]), self._groups_left(link, k), k))

    def _groups_left(self, link: _Link, k: int) -> int:
        """How many groups there would be in this dimension if factor k stayed free."""
        roots, local = np.unique(self.find(np.concatenate([link.flat, link.factors[k]])), return_inverse=True)
        n = len(link.flat)
        trial = Ids()
        made = trial.fresh(len(roots))
        trial.unite(made[local[:n]], _on_grid(made[local[n:]], link.factors, k))
        return len(np.unique(trial.find(made)))
