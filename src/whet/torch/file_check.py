"""The last step of every export of a PyTorch model: the file runs, at two batch sizes, and returns what the model does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from whet.errors import ExportError
from whet.formats.agreement import check_output
from whet.torch.interception import tensors_in
from whet.torch.model import call, to_numpy
from whet.torch.program import row_count, take_rows


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
            check_output(reference, its, where, quantized=quantized)
