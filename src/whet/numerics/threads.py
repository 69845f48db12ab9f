"""How many threads NumPy's matrix products run on.

The solvers make thousands of products of some milliseconds each. OpenBLAS hands every one of them to all cores and has its
threads wait for the next one in a busy loop, and the product for the slowest thread: where anything else runs on these cores,
the framework's own threads among it, learning the rounding of one layer took 11.6 s with two threads and 0.26 s with one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

LARGE = 1 << 32  # multiplications from which on a product (a tenth of a second on one core) gains more than it waits


@contextlib.contextmanager
def threads_for(multiplications: int) -> Iterator[None]:
    """A block of products of at most `multiplications` (`m n k`) each runs on one thread, if that is less than `LARGE`.

    The number of threads is the process's: it is what it was before when the block ends.
    """
    with contextlib.nullcontext() if multiplications >= LARGE else _controller().limit(limits=1, user_api="blas"):
        yield


@cache
def _controller() -> Any:
    """Of the libraries that are loaded by now, NumPy's own certainly among them."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
