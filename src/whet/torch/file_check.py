"""The last step of every export of a PyTorch model: the file runs, at two batch sizes, and returns what the model does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from whet.errors import ExportError
from whet.torch.interception import tensors_in
from whet.torch.model import call, to_numpy
from whet.torch.program import row_count, take_rows

_TOLERANCE = 1e-3  # of the largest output: what float kernels may differ by


def output_names(outputs: Any, prefix: str = "") -> list[str]:
    """A name for every array in a model's outputs: keys of dicts, positions in tuples, "output" for a single one."""
    if isinstance(outputs, Mapping):
        parts = [output_names(item, f"{prefix}_{key}" if prefix else str(key)) for key, item in outputs.items()]
    elif isinstance(outputs, tuple | list):
        parts = [output_names(item, f"{prefix or 'output'}_{i}") for i, item in enumerate(outputs)]
    else:
        return [prefix or "output"]
    return [name for part in parts for name in part]


def check_runs(model: Any, run: Callable[[Any], list[Any]], path: Path, inputs: Any, dynamic: Any, *, quantized: bool) -> None:
    """Run the file on one example and on three (or on the example's own shapes) and compare with the model.

    run: the file's outputs as arrays, in order, for one batch of tensors.

    Raises:
        ExportError: another number of outputs, other shapes, NaN, or values that differ by more than kernels do.
    """
    rows = row_count(inputs)
    for index in ([0], [0, 1, 0]) if dynamic is None else (list(range(rows)),):
        batch = take_rows(inputs, rows, index)
        with torch.no_grad():
            expected = list(tensors_in(call(model, batch)))
        got = run(batch)
        if len(got) != len(expected):
            raise ExportError(f"{path.name}: the file returns {len(got)} outputs, the model {len(expected)}.")
        for number, (mine, its) in enumerate(zip(expected, got, strict=True)):
            reference = to_numpy(mine)
            where = f"{path.name}, output {number}, batch of {len(index)}"
            if its.shape != reference.shape:
                raise ExportError(f"{where}: the file returns the shape {its.shape}, the model {reference.shape}.")
            _compare(reference, its, where, quantized)


def _compare(reference: Any, got: Any, where: str, quantized: bool) -> None:
    if reference.dtype.kind != "f" or reference.size == 0:
        return
    if not np.isfinite(got).all():
        raise ExportError(f"{where}: the file returns NaN or Inf, the model does not.")
    error = np.abs(reference.astype(np.float64) - got)
    largest = float(np.abs(reference).max())
    # Integer kernels round differently by a step here and there; a file that is wrong is off by the size of the outputs.
    wrong = (
        quantized
        and float(np.sqrt((error**2).mean())) > 0.5 * float(np.sqrt((reference.astype(np.float64) ** 2).mean())) + 1e-6
    )
    if wrong or (not quantized and float(error.max()) > _TOLERANCE * max(largest, 1e-3)):
        raise ExportError(
            f"{where}: the file differs from the model by up to {error.max():.3g} (outputs reach {largest:.3g}). "
            "Please report this model; the file was not kept."
        )
