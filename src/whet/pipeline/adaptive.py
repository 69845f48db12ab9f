"""`Adaptive` resolved: the scheme of every layer, from measured damage, as an exact knapsack."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from whet import texts
from whet.data import Batches
from whet.errors import BudgetError, DataError, SpecError
from whet.graph.placement import matches
from whet.numerics.knapsack import Choice, cheapest_within
from whet.pipeline.compressed import Compressed, outputs_of
from whet.pipeline.sensitivity import Damage, Sensitivity, alone, measured, sampled
from whet.records import Estimate
from whet.runtimes.comparison import score_drop
from whet.runtimes.scoring import score
from whet.specs import Metric, Quantize, Target, to_dict
from whet.specs.quantization import Adaptive, Nearest

ROUNDS = 6  # of bisection for max_drop
ROUNDING = 1e-9
FLOAT_BITS = 32


@dataclass(frozen=True, slots=True)
class Resolved:
    """spec: of fixed schemes. rows: by weight, what the step says more of it: "sensitivity" and "why". record: what was chosen
    and what was measured on the way."""

    spec: Quantize
    rows: dict[str, dict[str, Any]]
    record: dict[str, Any]


def resolve(
    made: Compressed,
    spec: Quantize,
    target: Target,
    *,
    calibration: Batches | None,
    val: Batches | None,
    metric: Metric | None,
    progress: bool,
) -> Resolved:
    """One of `spec.weights.candidates` for every layer, so that the sum of their damages is least within the budget.

    Damage is measured for each layer and candidate alone (`whet.sensitivity`), on some hundred examples of `val` or
    `calibration`; where neither is given, on the example. Weights are rounded to nearest there: GPTQ and AdaRound leave less
    damage, but much the same order of layers, and would solve the whole model anew for every candidate. Layers that
    `spec.overrides` names keep that scheme and count towards the budget. With `max_drop` the fewest bits on average are
    sought, by bisection, whose drop on `val` holds in the simulation of the whole.

    Raises:
        BudgetError: the smallest candidates together are over the budget.
        DataError: max_drop without labelled `val`.
        SpecError: the budget names what it cannot hold here.
    """
    adaptive = spec.weights
    if not isinstance(adaptive, Adaptive):
        raise SpecError(f"Only Adaptive is resolved, got {adaptive!r}.")
    _check_budget(adaptive)
    specs = [alone(replace(spec, weights=candidate, rounding=Nearest())) for candidate in adaptive.candidates]
    given = next((batches for batches in (val, calibration) if batches is not None), None)
    data = sampled(given if given is not None else Batches([made.example], "example"))
    own = metric if val is not None else None
    found = measured(made, specs, target, calibration=calibration, data=data, metric=own, progress=progress)
    table = _Table(found, len(adaptive.candidates))
    budget = adaptive.budget
    trials: list[dict[str, Any]] = []
    if budget.bits is not None:
        choice = table.within(int(budget.bits * table.parameters + ROUNDING), "bits")
    elif budget.size is not None:
        limit = budget.limit("size", table.parameters * FLOAT_BITS / 8)
        choice = table.within(int((limit or 0) + ROUNDING), "bytes")
    else:
        choice = _least_bits(made, spec, table, target, calibration, val, metric, trials)
    fixed = fixed_spec(spec, table, choice)
    return Resolved(fixed, table.reasons(choice), table.record(spec, choice, found, trials))


class _Table:
    """Damage, bits and bytes of every layer (rows) under every candidate (columns)."""

    def __init__(self, found: Sensitivity, candidates: int) -> None:
        self.layers = found.layers
        self.rows: list[list[Damage]] = [[found.of(layer, index) for index in range(candidates)] for layer in self.layers]
        self.parameters = sum(row[0].parameters for row in self.rows)

    def bits(self, row: Damage) -> int:
        """Bits of all codes of a layer."""
        return round(row.bits * row.parameters)

    def within(self, limit: int, unit: str) -> Choice:
        """The least damage with at most `limit` bits of codes, or bytes with scales and levels."""
        weigh: Callable[[Damage], int] = self.bits if unit == "bits" else (lambda row: row.bytes)
        costs = [[row.damage for row in rows] for rows in self.rows]
        try:
            return cheapest_within(costs, [[weigh(row) for row in rows] for rows in self.rows], limit)
        except BudgetError as cause:
            least = cause.least / self.parameters if unit == "bits" else cause.least
            word = f"{least:.3g} bits on average" if unit == "bits" else texts.bytes_text(least)
            raise BudgetError(
                f"The budget of Adaptive cannot be held: the smallest candidates need {word}. Raise it, or add smaller "
                "candidates.",
                least,
            ) from cause

    def chosen(self, choice: Choice) -> list[Damage]:
        """The row of every layer under what was chosen for it."""
        return [rows[option] for rows, option in zip(self.rows, choice.options, strict=True)]

    def average(self, choice: Choice) -> float:
        """Average bits."""
        return sum(self.bits(row) for row in self.chosen(choice)) / max(self.parameters, 1)

    def reasons(self, choice: Choice) -> dict[str, dict[str, Any]]:
        """By weight: its layer's damage, and what the next smaller and next larger candidates would have done."""
        found: dict[str, dict[str, Any]] = {}
        for rows, row in zip(self.rows, self.chosen(choice), strict=True):
            order = sorted(rows, key=_extent)
            smaller = next((other for other in reversed(order) if _extent(other) < _extent(row)), None)
            larger = next((other for other in order if _extent(other) > _extent(row)), None)
            said = [f"alone it costs {texts.significant(row.damage)}"]
            if smaller is not None:
                said.append(f"{smaller.scheme} would cost {texts.significant(smaller.damage)} and save {_extra(row, smaller)}")
            if larger is not None:
                said.append(
                    f"{larger.scheme} would cost {texts.significant(larger.damage)} and take {_extra(larger, row)} more"
                )
            found |= {name: {"sensitivity": row.damage, "why": "; ".join(said)} for name in row.weights}
        return found

    def record(self, spec: Quantize, choice: Choice, found: Sensitivity, trials: list[dict[str, Any]]) -> dict[str, Any]:
        """What report.json keeps."""
        rows = self.chosen(choice)
        counts = Counter(row.scheme for row in rows)
        held = [trial for trial in trials if trial["held"]]
        budget = spec.weights.budget if isinstance(spec.weights, Adaptive) else None
        return {
            "budget": None if budget is None else to_dict(budget),
            "average_bits": self.average(choice),
            "bytes": sum(row.bytes for row in rows),
            "float_bytes": self.parameters * FLOAT_BITS // 8,
            "damage": sum(row.damage for row in rows),
            "layers": dict(counts),
            "measured_on": found.measured_on,
            "examples": found.examples,
            "met": bool(held) if trials else True,
            "trials": trials,
        }


def _extra(larger: Damage, smaller: Damage) -> str:
    """What `larger` takes more than `smaller`: bytes of the file, or bits where the target stores both alike."""
    if larger.bytes != smaller.bytes:
        return texts.bytes_text(larger.bytes - smaller.bytes)
    bits = larger.bits - smaller.bits
    return f"{bits:.3g} bit{'' if bits == 1 else 's'} a weight"


def _extent(row: Damage) -> tuple[int, float]:
    """Candidates are ordered by their bytes; where a target stores several alike, by their bits."""
    return row.bytes, row.bits


def fixed_spec(spec: Quantize, table: _Table, choice: Choice) -> Quantize:
    """`spec` with the chosen schemes as overrides, the user's own first; other layers get the most frequent one."""
    if not isinstance(spec.weights, Adaptive):
        raise SpecError(f"Only Adaptive is resolved, got {spec.weights!r}.")
    schemes = {layer: spec.weights.candidates[option] for layer, option in zip(table.layers, choice.options, strict=True)}
    usual = Counter(choice.options).most_common(1)[0][0] if choice.options else 0
    chosen = dict(spec.overrides)
    for layer in sorted(schemes, key=len, reverse=True):  # a name also covers its children: these come first
        if not any(matches(layer, pattern) for pattern in spec.overrides):
            chosen[glob.escape(layer)] = schemes[layer]
    return replace(spec, weights=spec.weights.candidates[usual], overrides=chosen)


def _least_bits(
    made: Compressed,
    spec: Quantize,
    table: _Table,
    target: Target,
    calibration: Batches | None,
    val: Batches | None,
    metric: Metric | None,
    trials: list[dict[str, Any]],
) -> Choice:
    """The choice of the fewest average bits whose measured drop holds; the largest candidates where none does."""
    if val is None or metric is None or not isinstance(spec.weights, Adaptive):
        raise DataError(
            "Adaptive(budget=Budget(max_drop=…)) measures the drop: pass labelled val=, or give "
            "Budget(bits=…) or Budget(size=…)."
        )
    budget = spec.weights.budget
    before = score(outputs_of(made.side, made.float_model, val), val, metric, seed=made.seed)

    def attempt(choice: Choice) -> bool:
        fixed = fixed_spec(spec, table, choice)
        options = {"calibration": calibration, "example": made.example, "progress": False}
        plan, _ = made.side.quantize(made.float_model, replace(fixed, max_drop=None), target, **options)
        outputs = outputs_of(made.side, made.side.simulate(made.float_model, plan), val)
        confidence = budget.confidence or 0.95
        drop = score_drop(before, score(outputs, val, metric, seed=made.seed), metric, confidence=confidence, seed=made.seed)
        held = _held(drop, budget.max_drop, surely=budget.confidence is not None)
        trials.append({"average_bits": table.average(choice), "drop": drop.to_dict(), "held": held})
        return held

    least, most = (sum(pick(map(table.bits, rows)) for rows in table.rows) for pick in (min, max))
    smallest, largest = table.within(least, "bits"), table.within(most, "bits")
    if attempt(smallest):
        return smallest
    if not attempt(largest):
        return largest
    best, low, high = largest, least, most
    for _ in range(ROUNDS):
        middle = (low + high) // 2
        choice = table.within(middle, "bits")
        if attempt(choice):
            best, high = choice, middle
        else:
            low = middle
    return best


def _held(drop: Estimate, limit: float, *, surely: bool) -> bool:
    worst = drop.value if not surely or drop.ci95 is None else drop.ci95[1]
    return worst <= limit + ROUNDING


def _check_budget(adaptive: Adaptive) -> None:
    budget = adaptive.budget
    if budget.bits is not None and budget.size is not None:
        raise SpecError("Adaptive.budget takes bits or size, got both: average bits of the codes, or bytes with their scales.")
    for name in ("gzip", "latency"):
        if getattr(budget, name) is not None:
            raise SpecError(f"Adaptive.budget takes bits, size or max_drop, got {name}={getattr(budget, name)!r}.")
