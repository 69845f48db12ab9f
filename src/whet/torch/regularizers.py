"""Sparse training: a penalty for the loss of your own loop."""

from __future__ import annotations

from typing import Any

from whet.errors import ModelError
from whet.numerics.regularizers import group_lasso as penalty
from whet.torch.namespace import xp
from whet.torch.views import weight_views


def group_lasso(model: Any, strength: float = 1e-4) -> Any:
    """`strength · Σ √|g| ‖w_g‖₂` over the outputs `g` of every convolution and linear weight: a scalar with its history.

    ```python
    loss = cross_entropy(model(x), y) + whet.torch.group_lasso(model, 1e-3)
    ```
    Wen et al. 2016, arXiv:1608.03665, eq. 1. Whole channels move towards zero, and `Prune(…, granularity=Channel())` removes
    them.

    Raises:
        ModelError: the model has no such weight.
    """
    views = weight_views(model).weights
    if not views:
        raise ModelError("group_lasso finds no convolution or linear weight in this model.")
    return strength * sum(penalty(view.array.float(), view.out_axis, xp=xp) for view in views)
