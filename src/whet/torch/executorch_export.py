"""ExecuTorch programs (.pte) from PyTorch models, for the XNNPACK kernels: float, or quantized as a plan says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from whet.errors import ExportError, WhetError, require
from whet.graph.placement import Plan
from whet.specs import Target
from whet.torch.file_check import check_runs, output_names
from whet.torch.interception import tensors_in
from whet.torch.model import to_numpy, to_tensors
from whet.torch.program import (
    arguments,
    at_least_two,
    check_sites,
    first_line,
    quietly,
    ready,
    row_count,
    take_rows,
    trace_program,
)

LARGEST_AXIS = 64  # ExecuTorch plans its memory for the largest size of a dynamic axis
_TRACED_ROWS = 16
SIGNATURE = "whet_signature"  # a method beside `forward` that returns the names and free axes as JSON
_POOLS = (torch.ops.aten.avg_pool2d.default, torch.ops.aten.adaptive_avg_pool2d.default)


def export_executorch(model: Any, plan: Plan | None, target: Target, path: Path, *, example: Any, dynamic: Any = None) -> None:
    """Write `model` as an ExecuTorch program at `path`: float without a plan, else as `convert` stores it.

    What XNNPACK takes is delegated to it; the rest runs in ExecuTorch's portable kernels. dynamic: as in `export`; a dynamic
    axis holds at most 64, or the example's size if that is larger; `{input name: {axis: (name, largest)}}` says how many.

    Raises:
        ExportError: the model cannot be traced, an operator has no ExecuTorch kernel, or the file does not do what it must.
        MissingExtraError: the extra `executorch` is not installed.
    """
    with quietly():
        for module in ("executorch.runtime", "executorch.kernels.quantized"):  # the second brings kernels for quantizers
            require(module, "executorch", "Exporting to ExecuTorch")
    if plan is not None and plan.weights and not plan.values:
        raise ExportError(
            "XNNPACK takes integer weights only beside integer activations, and this plan quantizes weights alone. Quantize "
            "activations too (activations=Int(8, symmetric=False)), or store 16 bits: Quantize(Float('float16'), None)."
        )
    work = ready(model, plan, target)
    inputs = _enough_rows(to_tensors(example, torch.device("cpu"), torch.float32), dynamic)
    program = trace_program(work, inputs, dynamic, largest=LARGEST_AXIS)
    check_sites(work, plan)
    program = _for_xnnpack(program, inputs, dynamic)
    buffer = _lower(program, _signature(program, inputs), type(model).__name__)
    path.write_bytes(buffer)
    check_runs(work, lambda batch: _run_file(path, batch), path, inputs, dynamic, quantized=plan is not None)


def _enough_rows(inputs: Any, dynamic: Any) -> Any:
    """The example repeated to 16 rows where the batch varies: traced with fewer, convolutions bound it to 15 (a rule of a
    library that PyTorch asks, NNPACK's, which would end in the file)."""
    names, rows = list(arguments(inputs)[1]), row_count(inputs)
    if isinstance(dynamic, Mapping):
        names = names or [f"input:{i}" for i in range(len(arguments(inputs)[0]))]
        varies = all(0 in dynamic.get(name, {}) for name in names)
    else:
        varies = dynamic is None
    if not varies:
        return at_least_two(inputs)
    return take_rows(inputs, rows, [row % rows for row in range(max(rows, _TRACED_ROWS))])


def _for_xnnpack(program: Any, inputs: Any, dynamic: Any) -> Any:
    """The program in the forms that XNNPACK's partitioner knows: float biases that are exact multiples of their scale,
    which it stores as int32 again; zero points of weights; a dequantizer per reader; averages over all pixels as means."""
    with quietly():
        module = program.module(check_guards=False)
        graph = module.graph
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            name = str(node.target)
            if name.startswith("quantized_decomposed.dequantize") and node.args[0].op == "get_attr":
                _treat_constant(module, node, per_channel="per_channel" in name)
            elif node.target in _POOLS and _is_global(node):
                with graph.inserting_before(node):
                    mean = graph.call_function(torch.ops.aten.mean.dim, (node.args[0], [-2, -1], True))
                node.replace_all_uses_with(mean)
                graph.erase_node(node)
        for node in list(graph.nodes):
            if str(node.target).startswith("quantized_decomposed.dequantize"):
                _one_per_reader(node)
        graph.eliminate_dead_code()
        _drop_unread(module)
        module.recompile()
    return trace_program(module, inputs, dynamic, largest=LARGEST_AXIS)


def _treat_constant(module: Any, node: Any, *, per_channel: bool) -> None:
    graph = node.graph
    codes = _attribute(module, node.args[0].target)
    if codes.dtype == torch.int32:
        values = [_attribute(module, arg.target) if isinstance(arg, torch.fx.Node) else arg for arg in node.args]
        name = f"_float_{node.name}"
        module.register_parameter(name, torch.nn.Parameter(node.target(*values, **node.kwargs), requires_grad=False))
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(name))
        graph.erase_node(node)
    elif per_channel and node.args[2] is None:
        name = f"_zero_point_{node.name}"
        scale = _attribute(module, node.args[1].target)
        module.register_buffer(name, torch.zeros(scale.shape, dtype=torch.int64))
        with graph.inserting_before(node):
            node.update_arg(2, graph.get_attr(name))


def _drop_unread(module: Any) -> None:
    """Remove the stored tensors that nothing reads any more: they would be written to the file."""
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    stored = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name in [name for name, _ in stored if name not in read]:
        owner, _, last = name.rpartition(".")
        delattr(module.get_submodule(owner), last)


def _one_per_reader(node: Any) -> None:
    """A dequantizer of its own for every reader, so that each reads integers wherever the delegate is cut."""
    for reader in list(node.users)[1:]:
        with node.graph.inserting_before(reader):
            reader.replace_input_with(node, node.graph.node_copy(node))


def _attribute(module: Any, target: str) -> Any:
    for part in target.split("."):
        module = getattr(module, part)
    return module.detach() if isinstance(module, torch.Tensor) else module


def _is_global(node: Any) -> bool:
    """Whether a pool over two axes returns one pixel that is the mean of all."""
    given, returned = node.args[0].meta["val"].shape, node.meta["val"].shape
    if len(given) != 4 or any(not isinstance(size, int) for size in (*given[2:], *returned[2:])):
        return False
    if tuple(returned[2:]) != (1, 1):
        return False
    if node.target is _POOLS[1]:
        return True
    padding = node.args[3] if len(node.args) > 3 else [0, 0]
    return list(node.args[1]) == list(given[2:]) and not any(padding) and len(node.args) <= 6


def _signature(program: Any, inputs: Any) -> str:
    """Names of inputs and outputs, and for each input the axes whose size may vary."""
    placeholders = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    names = list(placeholders)
    if isinstance(inputs, Mapping) and len(inputs) == len(names):
        names = [str(key) for key in inputs]
    spec = program.call_spec.out_spec
    outputs = output_names(pytree.tree_unflatten([None] * spec.num_leaves, spec))
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    shapes = [nodes[name].meta["val"].shape for name in placeholders]
    free = [[axis for axis, size in enumerate(shape) if not isinstance(size, int)] for shape in shapes]
    return json.dumps({"inputs": names, "outputs": outputs, "free": free})


def _lower(program: Any, signature: str, name: str) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    with quietly():
        try:
            edge = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
                constant_methods={SIGNATURE: signature},
            )
            written: bytes = edge.to_executorch(ExecutorchBackendConfig()).buffer
        except WhetError:
            raise
        except Exception as cause:
            raise ExportError(
                f"{name} was traced, but ExecuTorch cannot lower it: {type(cause).__name__}: {first_line(cause)}"
            ) from cause
    return bytes(written)


def _run_file(path: Path, inputs: Any) -> list[Any]:
    from executorch.runtime import Runtime

    with quietly():
        try:
            method = Runtime.get().load_program(path).load_method("forward")
            found = method.execute([tensor.contiguous() for tensor in tensors_in(inputs)])
        except Exception as cause:
            lacking = missing_kernels(path)
            why = f"it lacks the kernels {', '.join(lacking)}" if lacking else first_line(cause)
            raise ExportError(f"ExecuTorch cannot run the exported file: {why}.") from cause
    return [to_numpy(item) for item in found]


def missing_kernels(path: Path) -> list[str]:
    """The operators in a .pte file that the ExecuTorch installed here has no kernel for."""
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.runtime import Runtime

    known = Runtime.get().operator_registry.operator_names
    plans = deserialize_pte_binary(path.read_bytes()).program.execution_plan
    named = [f"{operator.name}.{operator.overload or 'default'}" for plan in plans for operator in plan.operators]
    return sorted({name for name in named if name not in known and name.removesuffix(".default") not in known})
