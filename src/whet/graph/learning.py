"""What quantization-aware training does to a plan, whatever the framework: what can train, where it begins, where it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from whet.errors import SpecError
from whet.graph.nodes import Graph
from whet.graph.placement import Plan
from whet.numerics.affine import QParams, fit_scale_to_bias
from whet.specs.quantization import QAT

Floats = npt.NDArray[np.float32]

MARGIN = 1e-3  # of a step: how far from the edge of its code's interval a weight begins
MOVES = frozenset({"max_pool", "reshape", "flatten", "transpose", "identity", "concat", "pad"})


def observed_steps(qat: QAT, steps: int | None) -> int:
    """For how many of all training steps ranges are observed.

    Raises:
        SpecError: the number of steps is needed and not known.
    """
    if not qat.observe:
        return 0
    if steps is None:
        raise SpecError(f"QAT(observe={qat.observe:g}) is a part of all training steps: pass steps=epochs * batches.")
    return max(1, round(qat.observe * steps))


def check_trainable(plan: Plan) -> None:
    """Raise `SpecError` for a scheme that has no scale to train."""
    for name, params in plan.weights.items():
        if not isinstance(params, QParams):
            raise SpecError(
                f"QAT trains weights in Int(…), and {name!r} is stored as {params.spec!r}: quantize it after training, or give "
                "it Int(…) in overrides=."
            )
    if plan.casts:
        name, dtype = next(iter(plan.casts.items()))
        raise SpecError(f"QAT trains weights in Int(…), and {name!r} is cast to {dtype}: cast it after training.")
    if plan.dynamic:
        raise SpecError("QAT trains with ranges that are known, and Dynamic() has none: use Int(8, symmetric=False, …).")


def into_bins(array: Floats, params: QParams, codes: npt.NDArray[np.int32]) -> Floats:
    """The values nearest to `array` whose nearest codes are `codes`, as a post-training algorithm chose them."""
    scale, zero = params.broadcast(array.shape)
    middle = (codes - zero).astype(np.float32)
    reach = np.float32(0.5 - MARGIN)
    low = np.where(codes == params.spec.qmin, -np.inf, (middle - reach) * scale)
    high = np.where(codes == params.spec.qmax, np.inf, (middle + reach) * scale)
    return np.clip(array, low, high).astype(np.float32)


def moved_values(graph: Graph, groups: Mapping[str, str]) -> set[str]:
    """The values that hold codes which were only moved there: nothing is rounded again. groups: value -> its group."""
    return {
        node.name
        for node in graph.nodes
        if node.op in MOVES and node.name in groups and all(groups.get(value) == groups[node.name] for value in node.inputs)
    }


def with_room(plan: Plan, biases: Mapping[str, Floats]) -> Plan:
    """`plan` with weight scales at which the trained `biases` fit into int32."""
    weights = dict(plan.weights)
    for bias, (source, weight) in plan.biases.items():
        params = weights[weight]
        if isinstance(params, QParams):
            spread = np.broadcast_to(params.scale, biases[bias].shape)
            wider = fit_scale_to_bias(spread, float(plan.values[source].scale), biases[bias])
            scale = np.asarray(wider if params.axis is not None else wider.max(), np.float32)
            weights[weight] = replace(params, scale=scale)
    return replace(plan, weights=weights)
