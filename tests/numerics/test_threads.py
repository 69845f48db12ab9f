"""Small products run on one thread, and nothing is left changed."""

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from whet.numerics.threads import LARGE, threads_for


def threads():
    """The threads of the libraries that multiply matrices."""
    return {item["num_threads"] for item in threadpool_info() if item["user_api"] == "blas"}


@pytest.fixture(autouse=True)
def two():
    with threadpool_limits(2, user_api="blas"):
        yield


def test_small_products_have_one_thread_and_large_ones_all():
    with threads_for(8192 * 576**2):
        small = threads()
    with threads_for(LARGE):
        large = threads()
    assert small == {1} and large == {2} and threads() == {2}


def test_an_error_inside_restores_the_threads():
    with pytest.raises(ZeroDivisionError), threads_for(1):
        assert threads() == {1}
        _ = 1 // 0
    assert threads() == {2}


def test_blocks_nest():
    with threads_for(1):
        with threads_for(1):
            np.ones((4, 4)) @ np.ones((4, 4))
        assert threads() == {1}
    assert threads() == {2}
