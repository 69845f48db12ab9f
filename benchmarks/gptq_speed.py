"""How long GPTQ takes on a 4096 × 4096 layer, beside its matrix products and Cholesky factorisation alone.

    python benchmarks/gptq_speed.py [--columns 4096] [--group 128] [--quick] [--record out/quantization.json]

The floor is what no implementation in NumPy avoids: one factorisation in float64, and for every block of columns the product
that brings it the errors of all columns before it. The published form also inverts H and factorises the inverse; its time
is printed too. Least of three runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import tables

from whet.numerics.gptq import BLOCK, gptq
from whet.numerics.rounders import integer_rounder
from whet.numerics.scales import absmax_scale

REPEATS, MOST_RATIO = 3, 2.0


def seconds(work: Callable[[], object]) -> np.ndarray:
    """The least (wall, processor) seconds of three runs."""
    found = []
    for _ in range(REPEATS):
        clock = tables.Clock()
        work()
        found.append(clock.seconds())
    return np.min(found, axis=0)


def main() -> int:
    """Prints the table."""
    options = tables.parser(__doc__)
    options.add_argument("--columns", type=int, default=4096)
    options.add_argument("--group", type=int, default=128)
    given = options.parse_args()
    columns = 512 if given.quick else given.columns
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(columns, columns)).astype(np.float32)
    x = rng.normal(size=(2 * columns, columns)).astype(np.float32) * np.exp(rng.normal(size=columns)).astype(np.float32)
    hessian = (x.T @ x).astype(np.float64) / len(x)
    scale = absmax_scale(weight, -8, 7, group_size=given.group)
    rounder = integer_rounder(scale, -8, 7, shape=weight.shape, group_size=given.group)
    ratio = rng.normal(size=(columns, columns)).astype(np.float32)

    def products() -> None:
        for start in range(BLOCK, columns, BLOCK):
            ratio[:start, start : start + BLOCK].T @ weight[:start]

    table = tables.Table(
        "gptq",
        f"GPTQ of {columns} × {columns} weights, int4, groups of {given.group}, float32, best of {REPEATS}",
        ("", "s", "CPU s", "to reach"),
        "python benchmarks/gptq_speed.py",
        record=given.record,
    )
    rows = {"Cholesky factorisation, float64": seconds(lambda: np.linalg.cholesky(hessian))}
    rows["products of errors with the factor"] = seconds(products)
    floor = sum(rows.values())
    rows["both, and the published form's inverse"] = floor + seconds(lambda: np.linalg.cholesky(np.linalg.inv(hessian)))
    rows["GPTQ"] = seconds(lambda: gptq(weight, hessian, rounder))
    for name, (wall, cpu) in rows.items():
        table.add(name, f"{wall:.2f}", f"{cpu:.2f}", "")
    wall, cpu = rows["GPTQ"] / floor
    bar = "" if given.quick else tables.against(cpu, MOST_RATIO, most=True)
    table.add("GPTQ / (Cholesky + products)", f"{wall:.2f}", f"{cpu:.2f}", bar)
    return 0


if __name__ == "__main__":
    sys.exit(main())
