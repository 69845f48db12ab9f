"""Importance scores: what is smallest goes first."""

from __future__ import annotations

from whet.numerics.namespace import Array, Namespace


def magnitude(weight: Array, *, xp: Namespace) -> Array:
    """`|w|` (Han et al. 2015, arXiv:1506.02626). Same shape as `weight`."""
    return xp.abs(weight)
