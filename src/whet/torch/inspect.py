"""What a PyTorch model is made of: layers, shapes, parameters, multiply-accumulates and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from whet.data import rows
from whet.errors import ModelError
from whet.graph.summary import LayerRow, Summary
from whet.torch.model import call, device_of, dtype_of, evaluating, primary, to_tensors

_INDEXED = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterList, torch.nn.ParameterDict)


def inspect(model: Any, example: Any) -> Summary:
    """Run `model` on `example` (a batch of inputs) and count; the model is unchanged.

    A row is a module without children, or one that reads parameters or multiplies in its own forward. MACs are those of
    convolutions, matrix products and attention, whoever calls them, for one example. Layers that never ran and own
    parameters have a row too (0 MACs), so that the totals are the model's.

    Raises:
        DataError: the model cannot run on `example`.
        ModelError: `model` is no module, or `example` is None.
    """
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"inspect needs a torch.nn.Module, got a {type(model).__name__}.")
    if example is None:
        raise ModelError("inspect needs example=, a batch of inputs to run the model on.")
    watch = _Watch(model)
    inputs = to_tensors(example, device_of(model), dtype_of(model))
    with evaluating(model), _composed(), watch.hooked(), torch.no_grad(), _Counter(watch):
        call(model, inputs)
    return watch.summary(max(rows(example), 1))


class _Watch:
    """What ran: per module its output shape and its own MACs, and which storages were read."""

    def __init__(self, model: Any) -> None:
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.macs: dict[str, int] = {}
        self.order: list[str] = []
        self.stack: list[str] = []
        self.read: set[int] = set()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on every module while the block runs."""
        with ExitStack() as stack:
            for path, module in self.modules.items():
                stack.callback(module.register_forward_pre_hook(self._entering(path)).remove)
                stack.callback(module.register_forward_hook(self._leaving(path), always_call=True).remove)
            yield

    def _entering(self, path: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            if path not in self.macs:
                self.macs[path] = 0
                self.order.append(path)
            self.stack.append(path)

        return hook

    def _leaving(self, path: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.stack.pop()
            tensor = primary(output) if output is not None else None
            if isinstance(tensor, torch.Tensor):
                self.shapes[path] = tuple(tensor.shape)

        return hook

    def count(self, function: Any, args: Any, kwargs: Any, output: Any) -> None:
        """One operation ran."""
        for leaf in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self.read.add(_storage(leaf))
        flops = flop_registry.get(function.overloadpacket)
        if flops is not None and self.stack:
            self.macs[self.stack[-1]] += int(flops(*args, **kwargs, out_val=output)) // 2

    def summary(self, batch: int) -> Summary:
        """Rows in the order in which modules began; a module that its parent reads comes after it, what never ran last."""
        counted: set[int] = set()
        found: list[LayerRow] = []
        never: list[str] = []
        for path in self._ordered():
            module = self.modules[path]
            own = list(module.parameters(recurse=False))
            fresh = [p for p in own if id(p) not in counted]
            counted.update(id(p) for p in own)
            is_leaf = next(module.children(), None) is None
            if path not in self.macs and not any(_storage(p) in self.read for p in own):
                if not own and (not is_leaf or isinstance(module, _INDEXED)):
                    continue  # a container that is only indexed: its children ran, or are named themselves
                never.append(path or type(module).__name__)
            macs = self.macs.get(path, 0)
            if own or macs or (is_leaf and path in self.macs):
                found.append(_row(path, module, self.shapes.get(path, ()), fresh, macs // batch, batch))
        return Summary(tuple(found), tuple(never))

    def _ordered(self) -> list[str]:
        late = [path for path in self.modules if path not in self.macs]
        ordered: list[str] = []
        for path in self.order:
            ordered.append(path)
            ordered += [other for other in late if other.rpartition(".")[0] == path and self._is_read(other)]
        return ordered + [path for path in late if path not in ordered]

    def _is_read(self, path: str) -> bool:
        return any(_storage(p) in self.read for p in self.modules[path].parameters(recurse=False))


class _Counter(TorchDispatchMode):  # type: ignore[misc]
    """Tells a watch of every operation."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._watch.count(func, args, kwargs or {}, output)
        return output


@contextmanager
def _composed() -> Iterator[None]:
    """Without the fused kernels that hide their matrix products: recurrent layers and transformer layers show them."""
    fast, mkldnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags also sets TF32 and warns where there is none
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(mkldnn)


def _row(path: str, module: Any, shape: tuple[int, ...], parameters: list[Any], macs: int, batch: int) -> LayerRow:
    batched: tuple[int | None, ...] = (None, *shape[1:]) if shape and shape[0] == batch else shape
    count = sum(p.numel() for p in parameters)
    size = sum(p.numel() * p.element_size() for p in parameters)
    return LayerRow(path or type(module).__name__, type(module).__name__, batched, count, macs, size)


def _storage(tensor: Any) -> int:
    return int(tensor.untyped_storage().data_ptr())
