"""Exported programs of PyTorch (.pt2): float, or with the integers and quantizers of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from whet.errors import ExportError
from whet.graph.placement import Plan
from whet.specs import Target
from whet.torch.file_check import check_runs
from whet.torch.interception import map_tensors, tensors_in
from whet.torch.model import to_numpy, to_tensors
from whet.torch.program import arguments, at_least_two, check_sites, first_line, quietly, ready, trace_program


def export_pt2(model: Any, plan: Plan | None, target: Target, path: Path, *, example: Any, dynamic: Any = None) -> None:
    """Write `model` as `torch.export.save` does at `path`: float without a plan, else as `convert` stores it.

    The program stores integers and computes in float; other tools lower it further. `whet.load` never reads it.

    Raises:
        ExportError: the model cannot be traced, or the file does not do what it must.
    """
    work = ready(model, plan, target)
    inputs = at_least_two(to_tensors(example, torch.device("cpu"), torch.float32))
    program = trace_program(work, inputs, dynamic)
    check_sites(work, plan)
    with quietly():
        try:
            torch.export.save(program, path)
            written = torch.export.load(path).module(check_guards=False)
        except OSError:
            raise
        except Exception as cause:
            raise ExportError(
                f"{type(model).__name__} was traced, but cannot be written: {type(cause).__name__}: {first_line(cause)}"
            ) from cause

    def run(batch: Any) -> list[Any]:
        args, kwargs = arguments(map_tensors(batch, lambda tensor: tensor.clone()))
        with quietly(), torch.no_grad():
            return [to_numpy(tensor) for tensor in tensors_in(written(*args, **kwargs))]

    check_runs(work, run, path, inputs, dynamic, quantized=plan is not None)
