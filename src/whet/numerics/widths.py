"""Widths under a budget of latency: how much each family of channels loses, so that a sum of measured times fits.

The time of a layer depends on the widths of several families (what it reads and what it makes), so that the choice is no plain
knapsack. A greedy walk finds one that fits (Yang et al. 2018, NetAdapt, arXiv:1804.03230, with importance in the place of
short training); knapsacks with the times linearised around it then improve it (Shen et al. 2021, HALP, arXiv:2110.10811). Where
every time depends on one family alone, the first knapsack is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from whet.errors import BudgetError
from whet.numerics.knapsack import cheapest_within

_NANO = 1_000_000  # nanoseconds in a millisecond
_ROUNDS = 12


@dataclass(frozen=True, slots=True)
class Term:
    """One measured time. families: those whose widths it depends on; ms: of the option index of each of these."""

    families: tuple[int, ...]
    ms: Callable[[tuple[int, ...]], float]


def total_ms(terms: Sequence[Term], chosen: Sequence[int]) -> float:
    """The sum of all times at these options."""
    return sum(_ms(term, chosen) for term in terms)


def _ms(term: Term, chosen: Sequence[int]) -> float:
    return term.ms(tuple(chosen[family] for family in term.families))


def choose_widths(losses: Sequence[Sequence[float]], terms: Sequence[Term], limit: float) -> tuple[int, ...]:
    """The option of each family, of small total loss, whose times sum to at most `limit` milliseconds.

    losses[f][o]: what option o of family f loses; option 0 loses nothing. Ties go to the first family and the smaller option.

    Raises:
        BudgetError: the greedy walk finds no choice that fits; `error.least` is the least sum it saw.
    """
    touching = [[term for term in terms if family in term.families] for family in range(len(losses))]
    chosen = _greedy(losses, terms, touching, limit)
    slack = 0.0
    for _ in range(_ROUNDS):
        found = _linearised(losses, terms, touching, chosen, limit - slack)
        if found is None or found == chosen:
            break
        excess = total_ms(terms, found) - limit
        if excess <= 0 and _loss(losses, found) < _loss(losses, chosen):
            chosen, slack = found, 0.0
        elif excess > 0:  # two families that shrink together save less than each alone promises
            slack += excess
        else:
            break
    return tuple(chosen)


def _loss(losses: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    return sum(losses[family][option] for family, option in enumerate(chosen))


def _around(touching: Sequence[Term], chosen: list[int], family: int, option: int) -> float:
    """The times that a family touches, with it at `option` and all others as chosen."""
    trial = [*chosen[:family], option, *chosen[family + 1 :]]
    return sum(_ms(term, trial) for term in touching)


def _greedy(
    losses: Sequence[Sequence[float]], terms: Sequence[Term], touching: Sequence[Sequence[Term]], limit: float
) -> list[int]:
    """Again and again the step that loses least for each millisecond saved, until the times fit."""
    chosen = [0] * len(losses)
    now = total_ms(terms, chosen)
    while now > limit:
        best: tuple[float, int, int, float] | None = None
        for family, options in enumerate(losses):
            here = _around(touching[family], chosen, family, chosen[family])
            for option in range(chosen[family] + 1, len(options)):
                saved = here - _around(touching[family], chosen, family, option)
                if saved <= 0:
                    continue
                price = (options[option] - options[chosen[family]]) / saved
                if best is None or price < best[0]:
                    best = (price, family, option, saved)
        if best is None:
            raise BudgetError(
                f"No widths fit {limit:.4g} ms: the least that was found is {now:.4g} ms. Allow more, lower round_to=, or "
                "loosen keep=.",
                now,
            )
        chosen[best[1]] = best[2]
        now -= best[3]
    return chosen


def _linearised(
    losses: Sequence[Sequence[float]],
    terms: Sequence[Term],
    touching: Sequence[Sequence[Term]],
    chosen: list[int],
    limit: float,
) -> list[int] | None:
    """The knapsack in which every family's times are those with all others as chosen; None where nothing fits."""
    weights = [
        [round(_around(touching[family], chosen, family, option) * _NANO) for option in range(len(options))]
        for family, options in enumerate(losses)
    ]
    own = sum(weights[family][option] for family, option in enumerate(chosen))
    budget = own + int((limit - total_ms(terms, chosen)) * _NANO)
    try:
        return list(cheapest_within(losses, weights, budget).options)
    except BudgetError:
        return None  # the slack asks for more than this linearisation can give: the choice stays
