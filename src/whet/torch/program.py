"""What every export of a PyTorch model begins with: a float32 copy, converted, and the program of torch.export."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from whet.errors import ExportError, WhetError
from whet.graph.placement import Plan
from whet.specs import Quantize, Target
from whet.torch.convert import Converter, convert
from whet.torch.interception import contained, interceptor_of, map_tensors, tensors_in
from whet.torch.model import copy, describe

BATCH_AXIS = "batch"
_HALF = (torch.float16, torch.bfloat16)


def ready(model: Any, plan: Plan | None, target: Target) -> Any:
    """A float32 copy on the CPU, converted."""
    if plan is not None and plan.target != target.name:
        raise ExportError(
            f"This plan places quantizers for {plan.target!r} and cannot be written for {target.name!r}. Quantize again with "
            f"target={target.name!r}."
        )
    work = copy(model).eval().cpu()
    halves = {name: str(p.dtype).removeprefix("torch.") for name, p in work.named_parameters() if p.dtype in _HALF}
    work = work.float()
    if plan is None and not halves:
        work.register_forward_hook(_return_plain)
        return work
    plan = plan if plan is not None else Plan(Quantize(), target.name, {}, {}, {})
    folded = {f"{layer}.{name}" for _, layer in plan.folds for name in ("weight", "bias")}
    kept = {*plan.weights, *plan.biases, *folded}
    casts = {name: dtype for name, dtype in halves.items() if name not in kept} | plan.casts
    converted = convert(work, replace(plan, casts=casts))
    converted.register_forward_hook(_return_plain)
    return converted


def _plain(outputs: Any) -> Any:
    """Dataclasses and special mappings as dicts, which torch.export knows; entries without a tensor are left out."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    if is_dataclass(outputs) and not isinstance(outputs, Mapping | type):
        outputs = {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    if isinstance(outputs, Mapping):
        return {str(key): _plain(item) for key, item in outputs.items() if any(True for _ in tensors_in(item))}
    if isinstance(outputs, tuple | list):
        return tuple(_plain(item) for item in outputs if any(True for _ in tensors_in(item)))
    return outputs


def _return_plain(module: Any, args: Any, outputs: Any) -> Any:
    return _plain(outputs)


def trace_program(model: Any, inputs: Any, dynamic: Any, *, largest: int | None = None) -> Any:
    """The exported program of torch.export.

    largest: the greatest size of a dynamic axis that names none itself, if it must have one; at least the example's.
    """
    args, kwargs = arguments(inputs)
    try:
        shapes = dynamic_shapes(inputs, dynamic, largest)
        with quietly(), contained(), torch.no_grad():
            return torch.export.export(_called(model), args, kwargs, dynamic_shapes=shapes, strict=False)
    except WhetError:
        raise
    except Exception as cause:
        raise ExportError(_why_not_traced(model, inputs, cause)) from cause


def _called(model: Any) -> Any:
    """`model` as torch.export must be given it: of a GraphModule it runs the graph alone, and would pass over our hooks.

    One without our hooks stays: exported programs, made into modules, are GraphModules whose own hooks read the graph.
    """
    if not isinstance(model, torch.fx.GraphModule):
        return model
    if interceptor_of(model) is None and _return_plain not in model._forward_hooks.values():
        return model
    made: Any = type(type(model).__name__, (torch.nn.Module,), {"forward": type(model).forward})
    shell = made.__new__(made)
    shell.__dict__ = model.__dict__  # the same modules, tensors and hooks
    return shell


def _why_not_traced(model: Any, inputs: Any, cause: Exception) -> str:
    name, text = type(model).__name__, f"{type(cause).__name__}: {cause}"
    if "ata-dependent" in text or "DataDependent" in text or "unbacked" in text:
        return (
            f"{name} cannot be written to a file: its forward takes decisions that depend on the values of tensors "
            f"({first_line(cause)}). It can be simulated. Replace the decision by torch.where, or export the part without it."
        )
    if "specialized" in text or "Constraints violated" in text or "ConstraintViolation" in type(cause).__name__:
        return (
            f"{name} fixes an axis in its code that was to stay dynamic ({first_line(cause)}). Write its forward with "
            "x.shape[0] in place of a number, or export with dynamic=False for the example's shapes only."
        )
    return f"torch.export cannot trace {name} on {describe(inputs)}: {type(cause).__name__}: {first_line(cause)}"


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def at_least_two(inputs: Any) -> Any:
    """Two rows or more: torch.export takes a size of 1 for a constant."""
    rows = row_count(inputs)
    return take_rows(inputs, rows, [0, 0]) if rows == 1 else inputs


def row_count(inputs: Any) -> int:
    """The number of examples in `inputs`."""
    sizes = [int(tensor.shape[0]) for tensor in tensors_in(inputs) if tensor.ndim]
    if not sizes:
        raise ExportError(f"The example must hold a tensor with a batch axis, got {describe(inputs)}.")
    return sizes[0]


def take_rows(inputs: Any, rows: int, index: list[int]) -> Any:
    """The examples at `index`, from every input that has `rows` of them."""
    return map_tensors(inputs, lambda t: t[index] if t.ndim and t.shape[0] == rows else t)


def dynamic_shapes(inputs: Any, dynamic: Any, largest: int | None = None) -> Any:
    """What torch.export is told of axes that vary, in the structure of `inputs`; None where none does."""
    if dynamic is False:
        return None
    rows = row_count(inputs)
    batch = torch.export.Dim(BATCH_AXIS, max=None if largest is None else max(largest, rows))
    named = {} if dynamic is None else _named_axes(inputs, dynamic, largest)

    def axes(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            default = {0: batch} if value.ndim and value.shape[0] == rows else {}
            return default if dynamic is None else named.get(name, {})
        if isinstance(value, Mapping):
            return {key: axes(item, str(key)) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(axes(item, name) for item in value)
        return None

    args, kwargs = arguments(inputs)
    return axes(kwargs, "") if kwargs else tuple(axes(item, f"input:{i}") for i, item in enumerate(args))


def _named_axes(inputs: Any, dynamic: Any, largest: int | None) -> dict[str, dict[int, Any]]:
    args, kwargs = arguments(inputs)
    known = kwargs if kwargs else {f"input:{i}": item for i, item in enumerate(args)}
    if not isinstance(dynamic, Mapping) or any(name not in known for name in dynamic):
        raise ExportError(
            f"dynamic must be None (the batch axis), False, or a mapping of inputs to {{axis: name}}; inputs: "
            f"{', '.join(known)}; got {dynamic!r}."
        )
    dims: dict[str, Any] = {}

    def dim(label: Any, name: str, axis: int) -> Any:
        label, most = label if isinstance(label, tuple) else (label, largest)
        sizes = [int(tensor.shape[axis]) for tensor in tensors_in(known[name]) if tensor.ndim > axis]
        return dims.setdefault(label, torch.export.Dim(label, max=None if most is None else max(most, *sizes)))

    return {name: {int(axis): dim(label, name, int(axis)) for axis, label in axes.items()} for name, axes in dynamic.items()}


def check_sites(model: Any, plan: Plan | None) -> None:
    """Every value of the plan must have been produced while tracing."""
    converter = interceptor_of(model)
    if plan is None or not isinstance(converter, Converter):
        return
    missing = sorted(set(plan.values) - converter.reached)
    if missing:
        raise ExportError(
            f"While exporting, the model did not run {missing[0]!r}, which it ran in calibration ({len(missing)} such values): "
            "its forward takes another way when traced. Export with an example like the calibration data."
        )


def first_line(cause: BaseException) -> str:
    """The first line of an error's text, or its type."""
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(cause).__name__


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the exporter's warnings, logging and printing."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
