"""How long GPTQ takes on a 4096 × 4096 layer, beside its matrix products and Cholesky factorisation alone.

    OPENBLAS_NUM_THREADS=2 python benchmarks/gptq_speed.py [columns] [group size]

The floor is what no implementation in NumPy avoids: one factorisation in float64, and for every block of columns the product
that brings it the errors of all columns before it. The published form also inverts H and factorises the inverse; its time
is printed too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

from whet.numerics.gptq import BLOCK, gptq
from whet.numerics.rounders import integer_rounder
from whet.numerics.scales import absmax_scale

REPEATS = 3


def seconds(work: Callable[[], object]) -> float:
    """The least time of three runs."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    """Prints the table."""
    columns = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    group_size = int(sys.argv[2]) if len(sys.argv) > 2 else 128
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(columns, columns)).astype(np.float32)
    x = rng.normal(size=(2 * columns, columns)).astype(np.float32) * np.exp(rng.normal(size=columns)).astype(np.float32)
    hessian = (x.T @ x).astype(np.float64) / len(x)
    scale = absmax_scale(weight, -8, 7, group_size=group_size)
    rounder = integer_rounder(scale, -8, 7, shape=weight.shape, group_size=group_size)
    ratio = rng.normal(size=(columns, columns)).astype(np.float32)

    def products() -> None:
        for start in range(BLOCK, columns, BLOCK):
            ratio[:start, start : start + BLOCK].T @ weight[:start]

    cholesky = seconds(lambda: np.linalg.cholesky(hessian))
    floor = seconds(products)
    published = cholesky + floor + seconds(lambda: np.linalg.cholesky(np.linalg.inv(hessian)))
    ours = seconds(lambda: gptq(weight, hessian, rounder))
    print(f"{columns} × {columns}, int4, groups of {group_size}, float32 weights, best of {REPEATS}")
    print(f"Cholesky factorisation, float64          {cholesky:6.2f} s")
    print(f"products of errors with the factor       {floor:6.2f} s")
    print(f"both, and the published form's inverse   {published:6.2f} s")
    print(f"gptq                                     {ours:6.2f} s")
    print(f"gptq / (Cholesky + products)             {ours / (cholesky + floor):6.2f}")
    print(f"gptq / published form's products         {ours / published:6.2f}")


if __name__ == "__main__":
    main()
