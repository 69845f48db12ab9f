"""K-means of 10 million normal weights into 16 levels: Whet beside scikit-learn.

    python benchmarks/kmeans.py [--values 10000000] [--clusters 16] [--quick] [--record out/quantization.json]

scikit-learn runs `KMeans(n_init=1)`, seeded by k-means++, on the same float32 values. Seconds are of the wall, the least of
three runs of ours and of one of theirs, and of the processors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tables
from sklearn.cluster import KMeans

from whet.numerics.kmeans import kmeans_levels, squared_error

LEAST_SPEEDUP = 50


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, float, Any]:
    """The least seconds and processor seconds of `repeats` runs, and the last result."""
    found, result = [], None
    for _ in range(repeats):
        clock = tables.Clock()
        result = work()
        found.append(clock.seconds())
    return min(wall for wall, _ in found), min(cpu for _, cpu in found), result


def main() -> int:
    """Run both and print the table."""
    options = tables.parser(__doc__)
    options.add_argument("--values", type=int, default=10_000_000)
    options.add_argument("--clusters", type=int, default=16)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    count = 100_000 if given.quick else given.values
    weights = np.random.default_rng(given.seed).normal(size=(1, count)).astype(np.float32)
    table = tables.Table(
        "kmeans",
        f"K-means of {count:,} float32 values into {given.clusters} levels",
        ("", "s", "CPU s", "squared error", "to reach"),
        "python benchmarks/kmeans.py",
        record=given.record,
    )
    wall, cpu, levels = timed(lambda: kmeans_levels(weights, given.clusters), 3)
    error = float(squared_error(weights, levels)[0])
    table.add("Whet", f"{wall:.3f}", f"{cpu:.3f}", f"{error:.2f}", "")
    peer = KMeans(given.clusters, n_init=1, init="k-means++", random_state=given.seed)
    its_wall, its_cpu, fitted = timed(lambda: peer.fit(weights.T), 1)
    its_error = float(squared_error(weights, fitted.cluster_centers_.T)[0])
    table.add(f"scikit-learn, {fitted.n_iter_} iterations", f"{its_wall:.3f}", f"{its_cpu:.3f}", f"{its_error:.2f}", "")
    faster, no_worse = tables.against(its_cpu / cpu, LEAST_SPEEDUP), tables.against(its_error / error, 1)
    bar = "" if given.quick else f"{faster}; error {no_worse}"
    table.add("ratio", f"{its_wall / wall:.0f}", f"{its_cpu / cpu:.0f}", f"{its_error / error:.6f}", bar)
    return 0


if __name__ == "__main__":
    sys.exit(main())
