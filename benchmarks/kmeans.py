"""K-means of 10 million normal weights into 16 levels: Whet beside scikit-learn, one thread pool for both.

    python benchmarks/kmeans.py [--values 10000000] [--clusters 16] [--seed 0]

Prints the time and the squared error of each. scikit-learn runs `KMeans(n_init=1)`, seeded by k-means++, on
the same float32 values.
"""

from __future__ import annotations

import argparse
import os
import platform
import time

import numpy as np
from sklearn.cluster import KMeans

from whet.numerics.kmeans import kmeans_levels, squared_error


def timed(work, repeats):
    """The least time of `repeats` runs in seconds, and the last result."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def main() -> None:
    """Run both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=int, default=10_000_000)
    parser.add_argument("--clusters", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    weights = np.random.default_rng(args.seed).normal(size=(1, args.values)).astype(np.float32)
    ours, levels = timed(lambda: kmeans_levels(weights, args.clusters), 3)
    peer = KMeans(args.clusters, n_init=1, init="k-means++", random_state=args.seed)
    theirs, fitted = timed(lambda: peer.fit(weights.T), 1)
    error = float(squared_error(weights, levels)[0])
    their_error = float(squared_error(weights, fitted.cluster_centers_.T)[0])
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
    print(f"{args.values:,} float32 values, {args.clusters} clusters; {machine}")
    print(f"{'':14}{'seconds':>10}{'squared error':>18}")
    print(f"{'Whet':14}{ours:10.3f}{error:18.3f}")
    print(f"{'scikit-learn':14}{theirs:10.3f}{their_error:18.3f}   {fitted.n_iter_} iterations")
    print(f"{theirs / ours:.0f} x faster, error {error / their_error - 1:+.4%}")


if __name__ == "__main__":
    main()
