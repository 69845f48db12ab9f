"""Distillation losses written out in float64 from their papers, and the table of inputs on which every backend is held to them."""

from __future__ import annotations

from typing import Any

import numpy as np

from whet.specs import CRD, DIST, DKD, PKT, RKD, SimilarityPreserving, SoftTargets

TEMPERATURES = (0.5, 1.0, 4.0, 20.0, 100.0)
SPREADS = (0.3, 3.0, 100.0, 1e4)  # of the logits
LABELS = np.arange(12) % 5
TINY = 1e-16  # beside squared norms, in DIST and in unit vectors
LEAST = 1e-7  # beside the similarities of PKT


def pair(spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Student and teacher (12, 5), float32, up to 10⁴ at the widest; their like rows are near each other at the narrowest."""
    rng = np.random.default_rng(11)
    limit = lambda z: np.clip(z * spread, -1e4, 1e4).astype(np.float32)  # noqa: E731
    return limit(rng.normal(size=(12, 5))), limit(rng.normal(size=(12, 5)))


def specs() -> dict[str, Any]:
    """Every loss by name, at every temperature that it has."""
    made: dict[str, Any] = {}
    for t in TEMPERATURES:
        made |= {f"SoftTargets {t:g}": SoftTargets(t), f"DKD {t:g}": DKD(1.0, 8.0, t), f"DIST {t:g}": DIST(2.0, 1.0, t)}
    one = CRD(dimension=5)
    return made | {"RKD": RKD(), "SimilarityPreserving": SimilarityPreserving(), "PKT": PKT(), "CRD": one}


def computed(distillation_loss: Any, layer_loss: Any, make: Any, spreads: tuple[float, ...] = SPREADS) -> dict[str, float]:
    """What a side's functions make of the table, in float32."""
    found = {}
    for spread in spreads:
        s, t = map(make, pair(spread))
        for name, spec in specs().items():
            is_of_logits = isinstance(spec, SoftTargets | DKD | DIST)
            value = distillation_loss(spec, s, t, LABELS) if is_of_logits else layer_loss(spec, s, t)
            found[f"{name} at {spread:g}"] = float(value)
    return found


def expected() -> dict[str, float]:
    """The same by the books."""
    found = {}
    for spread in SPREADS:
        s, t = (z.astype(np.float64) for z in pair(spread))
        for name, spec in specs().items():
            found[f"{name} at {spread:g}"] = float(_BOOKS[type(spec)](spec, s, t))
    return found


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _kl(t: np.ndarray, s: np.ndarray) -> np.ndarray:
    p, q = _log_softmax(t), _log_softmax(s)
    return (np.exp(p) * (p - q)).sum(-1)


def _soft(spec: SoftTargets, s: np.ndarray, t: np.ndarray) -> float:
    return spec.temperature**2 * _kl(t / spec.temperature, s / spec.temperature).mean()


def _dkd(spec: DKD, s: np.ndarray, t: np.ndarray) -> float:
    rows = []
    for a, b, k in zip(s / spec.temperature, t / spec.temperature, LABELS, strict=True):
        rest_a, rest_b = np.delete(a, k), np.delete(b, k)
        two = [np.stack([z[k], rest.max() + np.log(np.exp(rest - rest.max()).sum())]) for z, rest in ((a, rest_a), (b, rest_b))]
        rows.append(spec.alpha * _kl(two[1], two[0]) + spec.beta * _kl(rest_b, rest_a))
    return spec.temperature**2 * np.mean(rows)


def _dist(spec: DIST, s: np.ndarray, t: np.ndarray) -> float:
    q, p = (np.exp(_log_softmax(z / spec.temperature)) for z in (s, t))

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
        norm = np.sqrt(((a * a).sum(-1) + TINY) * ((b * b).sum(-1) + TINY))
        return float((1 - (a * b).sum(-1) / norm).mean())

    return spec.temperature**2 * (spec.beta * apart(p, q) + spec.gamma * apart(p.T, q.T))


def _huber(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 1, x * x / 2, np.abs(x) - 0.5)


def _rkd(spec: RKD, s: np.ndarray, t: np.ndarray) -> float:
    n, total = len(s), 0.0
    between = [np.array([[np.linalg.norm(a - b) for b in z] for a in z]) for z in (s, t)]
    distances = [d / d[d > 0].mean() for d in between]
    total += spec.distance * _huber(distances[0] - distances[1]).mean()
    sides = [z[None, :, :] - z[:, None, :] for z in (s, t)]
    unit = [e / np.sqrt((e * e).sum(-1, keepdims=True) + TINY) for e in sides]
    angles = [np.array([[[u[j, i] @ u[j, k] for k in range(n)] for i in range(n)] for j in range(n)]) for u in unit]
    return total + spec.angle * _huber(angles[0] - angles[1]).mean()


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + TINY)


def _preserving(spec: SimilarityPreserving, s: np.ndarray, t: np.ndarray) -> float:
    return float(((_unit(s @ s.T) - _unit(t @ t.T)) ** 2).mean())


def _pkt(spec: PKT, s: np.ndarray, t: np.ndarray) -> float:
    total = 0.0
    for i in range(len(s)):
        q, p = (np.array([(u[i] @ u[j] + 1) / 2 + LEAST for j in range(len(s)) if j != i]) for u in (_unit(s), _unit(t)))
        q, p = q / q.sum(), p / p.sum()
        total += (p * np.log((p + LEAST) / (q + LEAST)) - p + q).sum()
    return total / len(s)


def _crd(spec: CRD, s: np.ndarray, t: np.ndarray) -> float:
    n, total = len(s), 0.0
    ratio = (n - 1) / n
    for i in range(n):
        for j in range(n):
            e = np.exp(_unit(s)[i] @ _unit(t)[j] / spec.temperature)
            h = e / (e + ratio)
            total -= np.log(h) if i == j else np.log1p(-h)
    return total / n


_BOOKS = {SoftTargets: _soft, DKD: _dkd, DIST: _dist, RKD: _rkd, SimilarityPreserving: _preserving, PKT: _pkt, CRD: _crd}
