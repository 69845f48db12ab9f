"""Two measurements side by side: what was gained, what was lost, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from whet.data import leaves
from whet.errors import RuntimeFileError
from whet.numerics.scoring import Floats
from whet.numerics.statistics import paired_drop, ratio_of_medians, sqnr_db, top1_agreement
from whet.records import Estimate, Evidence
from whet.runtimes.latency import Timings
from whet.runtimes.scoring import Score, quantiles
from whet.specs import Metric

TINY_MS = 0.1
OPENING = 0.05  # one file opened twice was seen to differ by up to 4 % from itself: no faster, no slower within this


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One file's evidence, and the arrays behind it, which further comparisons need.

    outputs: for all examples. scores: (n,) per example, None for a metric of the whole. timings: (runs,) milliseconds,
    None where it was not timed.
    """

    evidence: Evidence
    outputs: Any
    scores: Floats | None
    timings: Timings | None
    score: Score


def parity(reference: Any, outputs: Any) -> dict[str, Any]:
    """How far `outputs` are from `reference`, arrays or equal structures of arrays.

    `{"agreement", "max_error", "mean_error", "sqnr_db"}`: agreement is the fraction of examples whose highest entry is at
    the same place in the first output that has classes, None where none has; sqnr_db is None when all is equal. A
    "reason" says why something is None.

    Raises:
        RuntimeFileError: other numbers or shapes of outputs, or NaN where the reference has none.
    """
    a, b = leaves(reference), leaves(outputs)
    expected, got = [x.shape for x in a], [y.shape for y in b]
    if expected != got:
        raise RuntimeFileError(f"The outputs cannot be compared: the reference gives shapes {expected}, this one {got}.")
    old = np.concatenate([x.astype(np.float64).ravel() for x in a])
    new = np.concatenate([y.astype(np.float64).ravel() for y in b])
    same = (old == new) | (np.isnan(old) & np.isnan(new))
    old, new = np.where(same & ~np.isfinite(old), 0.0, old), np.where(same & ~np.isfinite(new), 0.0, new)
    with np.errstate(invalid="ignore"):
        error = np.abs(old - new)
    if not np.isfinite(error).all():
        place = int(np.argmin(np.isfinite(error)))
        raise RuntimeFileError(f"The outputs cannot be compared: {new[place]} stands where the reference has {old[place]}.")
    result: dict[str, Any] = {
        "agreement": None,
        "max_error": float(error.max()),
        "mean_error": float(error.mean()),
        "sqnr_db": sqnr_db(old, new),
    }
    classes = next((i for i, x in enumerate(a) if x.ndim >= 2 and x.shape[-1] >= 2), None)
    reasons = []
    if classes is None:
        reasons.append("no output has classes, so there is no top-1 agreement")
    else:
        result["agreement"] = top1_agreement(a[classes], b[classes])
    if result["sqnr_db"] is None:
        reasons.append("the outputs are equal, so the signal-to-noise ratio is infinite")
    return result | ({"reason": "; ".join(reasons)} if reasons else {})


def change(
    original: Measured, compressed: Measured, metric: Metric, *, confidence: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """The "change" of report.json: `{"metric_drop", "size_ratio", "gzip_ratio", "latency_ratio"}`, new over old.

    A positive metric_drop is worse, whichever direction of the metric is better. Its interval, at `confidence`, is paired:
    both files saw the same examples. Each `ci95` that cannot be had is None with a "reason".
    """
    old, new = original.evidence, compressed.evidence
    return {
        "metric_drop": metric_drop(original, compressed, metric, confidence=confidence, seed=seed).to_dict(),
        "size_ratio": new.bytes / old.bytes,
        "gzip_ratio": new.gzip_bytes / old.gzip_bytes,
        "latency_ratio": latency_ratio(original, compressed, seed=seed),
    }


def metric_drop(
    original: Measured, compressed: Measured, metric: Metric, *, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """How much worse the metric became, in its own units, with the paired interval."""
    return score_drop(original.score, compressed.score, metric, confidence=confidence, seed=seed)


def score_drop(before: Score, after: Score, metric: Metric, *, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """As `metric_drop`, of two scores on the same examples."""
    sign = 1.0 if metric.higher_is_better else -1.0
    value = sign * (before.value - after.value)
    if before.scores is not None and after.scores is not None:
        if len(before.scores) < 2:
            return Estimate(value, None, "one example has no interval")
        return Estimate(value, paired_drop(sign * before.scores, sign * after.scores, confidence, seed=seed))
    if before.resampled is None or after.resampled is None:
        reason = before.record.get("reason") or after.record.get("reason") or "the metric has no interval"
        return Estimate(value, None, reason)
    interval = quantiles(sign * (before.resampled - after.resampled), confidence)
    return Estimate(value, interval, None if interval else "the metric has no value on most resamples of these examples")


def latency_ratio(original: Measured, compressed: Measured, *, seed: int = 0) -> dict[str, Any]:
    """`{"value", "ci95"}` of the ratio of median times; value None where the files were not timed together."""
    if original.timings is None or compressed.timings is None:
        return {"value": None, "ci95": None, "reason": "the files were not timed"}
    return timing_ratio(original.timings, compressed.timings, seed=seed)


def timing_ratio(original: Timings, compressed: Timings, *, seed: int = 0) -> dict[str, Any]:
    """`{"value", "ci95"}` of the ratio of the medians of two timings taken in alternation."""
    before, after = original.ms, compressed.ms
    value = float(np.median(after) / np.median(before))
    if len(before) < 2 or len(before) != len(after):
        return Estimate(value, None, "too few runs for an interval").to_dict()
    return Estimate(value, ratio_of_medians(after, before, seed=seed)).to_dict()


def plain_warnings(old: Evidence, new: Evidence, moved: dict[str, Any], *, sparsity: float | None = None) -> list[str]:
    """What a user must not overlook in the comparison of two files, in plain words."""
    found = []
    if new.bytes >= old.bytes:
        word = "LARGER" if new.bytes > old.bytes else "no smaller"
        found.append(f"{word}: {new.bytes:,} bytes against {old.bytes:,}")
    ratio = moved["latency_ratio"]
    if ratio["value"] is None or old.latency_ms is None or new.latency_ms is None:
        return found
    times = f"{new.latency_ms.p50:.3g} ms against {old.latency_ms.p50:.3g} ms"
    low, high = ratio["ci95"] if ratio["ci95"] is not None else (ratio["value"], ratio["value"])
    interval = "" if ratio["ci95"] is None else f", {low:.2f} to {high:.2f} with 95 % confidence"
    if low > 1 + OPENING:
        small = "; on a model this tiny the cost of each call outweighs the arithmetic" if old.latency_ms.p50 < TINY_MS else ""
        found.append(f"SLOWER here: {times} ({ratio['value']:.2f} x{interval}){small}")
    elif high >= 1 - OPENING:
        found.append(f"no faster beyond the noise: {times} ({ratio['value']:.2f} x{interval})")
    if sparsity and high >= 1 - OPENING:
        found.append(
            f"sparse but not faster: {100 * sparsity:.0f} % of the weights are zero, and this runtime computes with zeros as "
            "with any number; they only shrink the gzipped file"
        )
    return found
