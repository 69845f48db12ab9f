"""The multiple-choice knapsack: one option for each item, of least total cost within a budget, exactly.

Items are merged one by one into a Pareto front of (weight, cost). States that lead to nothing better than a known solution
leave early, by the bound of Lagrange: for any multiplier λ ≥ 0, `Σ min over options (cost + λ weight) - λ budget` is at most
the cost of every solution (Kellerer, Pferschy & Pisinger 2004, "Knapsack Problems", ch. 11). The multiplier is the best one,
found by bisection; the first solution is its own, improved greedily, and narrow fronts improve it before one is complete. So
little is left between bound and solution that hundreds of layers with budgets of millions of bits take a moment. Instances
in which cost is an exact multiple of weight (subset sums) have no such bound and can take minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from whet.errors import BudgetError, SpecError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BISECTIONS = 200
SLACK = 1e-12  # of the sum of all costs: what rounding may add to a bound
HEAVIEST = 2**46  # of one option: the sum of 65,536 items is still an int64
WIDTHS = (1 << 10, 1 << 14, 1 << 17, 2**31 - 1)  # of fronts; each run starts from the solution of the one before


@dataclass(frozen=True, slots=True)
class Choice:
    """The index of the option taken for each item, what they cost together and what they weigh."""

    options: tuple[int, ...]
    cost: float
    weight: int


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """The options that no other of their item dominates, by ascending weight, and so descending cost: (items, options).

    Rows are filled with options of infinite cost; `option` is each one's index as it was given.
    """

    cost: Floats
    weight: Ints
    option: Ints

    def of(self, chosen: Ints) -> tuple[float, int]:
        """Cost and weight of a column for each item."""
        rows = np.arange(chosen.size)
        return float(self.cost[rows, chosen].sum()), int(self.weight[rows, chosen].sum())


def cheapest_within(costs: Sequence[Sequence[float]], weights: Sequence[Sequence[int]], budget: int) -> Choice:
    """The option of each item so that the sum of `costs` is least and the sum of `weights` at most `budget`.

    costs[i][o] and weights[i][o]: of option o of item i. Costs are finite; weights and the budget are integers (bits, bytes,
    nanoseconds), not negative. Exact but for rounding: no choice costs less by more than 10⁻¹² of the costs' sum. Of options of
    one item that are alike the first is taken, and always the same of several solutions.

    Raises:
        BudgetError: the lightest options together weigh more than the budget; `error.least` is what they weigh.
        SpecError: an item has no options, costs and weights differ in number, or one of them is not allowed.
    """
    table = _table(costs, weights)
    if not costs:
        return Choice((), 0.0, 0)
    least = int(table.weight[:, 0].sum())
    if least > budget:
        raise BudgetError(
            f"No choice fits the budget of {budget:,}: the lightest options together weigh {least:,}. "
            "Raise the budget to at least that, or add lighter options.",
            least,
        )
    multiplier, columns = _relaxed(table, budget)
    columns = _improved(table, columns, budget)
    for width in WIDTHS:
        better, complete = _merged(table, budget, multiplier, table.of(columns)[0], width)
        columns = columns if better is None else better
        if complete:
            break
    rows = np.arange(columns.size)
    picked = tuple(int(index) for index in table.option[rows, columns])
    cost = sum(float(costs[item][option]) for item, option in enumerate(picked))
    return Choice(picked, cost, sum(int(weights[item][option]) for item, option in enumerate(picked)))


def _table(costs: Sequence[Sequence[float]], weights: Sequence[Sequence[int]]) -> _Table:
    if len(costs) != len(weights):
        raise SpecError(f"The knapsack got costs of {len(costs)} items and weights of {len(weights)}: give both for each.")
    kept = [_undominated(item, list(c), list(w)) for item, (c, w) in enumerate(zip(costs, weights, strict=True))]
    widest = max((len(options) for options in kept), default=0)
    shape = (len(kept), widest)
    cost, weight, option = np.full(shape, np.inf), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for item, options in enumerate(kept):
        for column, index in enumerate(options):
            cost[item, column], weight[item, column], option[item, column] = costs[item][index], weights[item][index], index
    return _Table(cost, weight, option)


def _undominated(item: int, costs: list[float], weights: list[int]) -> list[int]:
    if not costs or len(costs) != len(weights):
        raise SpecError(
            f"Item {item} of the knapsack has {len(costs)} costs and {len(weights)} weights: give one or more of both."
        )
    for cost, weight in zip(costs, weights, strict=True):
        if not np.isfinite(cost):
            raise SpecError(f"Item {item} of the knapsack has the cost {cost}: costs must be finite; leave such options out.")
        if int(weight) != weight or not 0 <= weight < HEAVIEST:
            raise SpecError(
                f"Item {item} of the knapsack has the weight {weight}: weights are integers from 0 to 2**46; take a finer or "
                "coarser unit and round."
            )
    kept: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (weights[i], costs[i], i)):
        if not kept or costs[index] < costs[kept[-1]]:
            kept.append(index)
    return kept


def _relaxed(table: _Table, budget: int) -> tuple[float, Ints]:
    """The multiplier of the greatest bound, and the columns it takes on the side that fits the budget."""
    free = np.argmin(table.cost, axis=1)
    if table.of(free)[1] <= budget:
        return 0.0, free
    finite = np.where(np.isfinite(table.cost), table.cost, np.nan)
    low, high = 0.0, float(np.max(np.nanmax(finite, axis=1) - np.nanmin(finite, axis=1))) * 2 + 1e-300
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        # Of equals argmin takes the first column, which is the lightest.
        if table.of(np.argmin(table.cost + middle * table.weight, axis=1))[1] <= budget:
            high = middle
        else:
            low = middle
    best = max((low, high), key=lambda m: float(np.min(table.cost + m * table.weight, axis=1).sum() - m * budget))
    return best, np.argmin(table.cost + high * table.weight, axis=1)


def _improved(table: _Table, chosen: Ints, budget: int) -> Ints:
    """`chosen`, with the exchange that saves most and fits, again and again."""
    chosen, rows = chosen.copy(), np.arange(chosen.size)
    while True:
        _, weight = table.of(chosen)
        saved = table.cost[rows, chosen][:, None] - table.cost
        heavier = table.weight - table.weight[rows, chosen][:, None]
        saved = np.where(heavier <= budget - weight, saved, -np.inf)
        item, column = np.unravel_index(int(np.argmax(saved)), saved.shape)
        if not saved[item, column] > 0:
            return chosen
        chosen[item] = column


def _merged(table: _Table, budget: int, multiplier: float, known: float, width: int) -> tuple[Ints | None, bool]:
    """The columns of the best choice that costs less than `known`, if there is one; and whether every front fitted `width`.

    Wider fronts lose the states of the greatest bounds, and the choice is then only the best of those seen.
    """
    finite = np.where(np.isfinite(table.cost), table.cost, 0.0)
    limit = known - SLACK * (float(np.abs(finite).max(axis=1).sum()) + multiplier * budget)
    # What the items from i on add to a bound, and weigh at least.
    bound_after = np.append(np.cumsum(np.min(table.cost + multiplier * table.weight, axis=1)[::-1])[::-1], 0.0)
    least_after = np.append(np.cumsum(table.weight[::-1, 0])[::-1], 0)
    weight, cost, complete = np.zeros(1, np.int64), np.zeros(1), True
    history: list[tuple[npt.NDArray[np.int32], Ints]] = []
    for item in range(len(table.cost)):
        usable = np.flatnonzero(np.isfinite(table.cost[item]))
        heavier = (weight + table.weight[item, usable, None]).reshape(-1)
        dearer = (cost + table.cost[item, usable, None]).reshape(-1)
        bound = dearer + multiplier * (heavier - budget) + bound_after[item + 1]
        alive = np.flatnonzero((heavier + least_after[item + 1] <= budget) & (bound < limit))
        if alive.size == 0:
            return None, complete
        alive = alive[np.lexsort((dearer[alive], heavier[alive]))]
        least = np.minimum.accumulate(dearer[alive])
        alive = alive[np.append(True, least[1:] < least[:-1])]
        if alive.size > width:
            alive, complete = alive[np.sort(np.argsort(bound[alive], kind="stable")[:width])], False
        history.append(((alive % weight.size).astype(np.int32), usable[alive // weight.size]))
        weight, cost = heavier[alive], dearer[alive]
    state = weight.size - 1  # the cheapest: costs fall as weights rise
    if not cost[state] < known:  # a bound counts what the budget has left, the cost does not
        return None, complete
    columns = np.zeros(len(history), np.int64)
    for item in range(len(history) - 1, -1, -1):
        parents, taken = history[item]
        columns[item], state = taken[state], parents[state]
    return columns, complete
