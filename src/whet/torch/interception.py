"""Seeing every function call of a model's forward pass, without changing the model's code or its modules.

Hooks on the user's own submodules enter a `TorchFunctionMode` when none is active for this model on this thread. There is
no wrapper module, so `state_dict` keys, the forward signature, deepcopy, pickle, threads and any batch size keep working.

A *site* is one function call of a forward pass: `module.path/function:index`, where `index` counts the calls of that
function with floating-point operands within this call of the module; the second call of the module itself is
`module.path@1/…`. A site's name is also the name of the value it produces (`site#k` for the k-th of several).
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode

from whet.errors import ModelError

Tensor = Any
_local = threading.local()  # .sessions: the open session of every interceptor, by id
_PROPERTIES = frozenset({"T", "mT", "H", "mH", "real", "data"})  # getters that compute a tensor
_INQUIRIES = frozenset({"size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "get_device", "element_size"})


class Call:
    """One call of one function, with the operands it will be given."""

    def __init__(self, run: Callable[..., Any], function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.run, self.function, self.args, self.kwargs = run, function, args, kwargs

    def __call__(self) -> Any:
        return self.run(*self.args, **self.kwargs)

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """The argument at position `index`, or called `name`."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def with_argument(self, index: int, name: str, value: Any) -> Call:
        """The call with another value at position `index`, or for the argument called `name`."""
        if index < len(self.args):
            return Call(self.run, self.function, (*self.args[:index], value, *self.args[index + 1 :]), self.kwargs)
        return Call(self.run, self.function, self.args, {**self.kwargs, name: value})

    def tensors(self) -> list[Tensor]:
        """Every tensor among the operands."""
        return list(tensors_in((self.args, self.kwargs)))

    @property
    def target(self) -> Tensor | None:
        """The tensor that the call works on in place, if it does."""
        if "out" in self.kwargs and isinstance(self.kwargs["out"], torch.Tensor):
            return self.kwargs["out"]
        in_place = self.function == "setitem" or self.kwargs.get("inplace") or self.function.endswith("_")
        return next(iter(tensors_in(self.args)), None) if in_place else None


@dataclass(slots=True)
class Frame:
    """One call of one module that is under way."""

    path: str
    module: Any
    label: str
    counts: dict[str, int] = field(default_factory=dict)


class Session(TorchFunctionMode):  # type: ignore[misc]  # torch is Any to the type checker
    """One forward pass: the modules under way, and what is known about its tensors."""

    def __init__(self, interceptor: Interceptor) -> None:
        super().__init__()
        self.interceptor = interceptor
        self.stack: list[Frame] = []
        self.calls: dict[str, int] = {}
        # Tensors are known by id; each is kept alive beside its entry, so that no id is used twice.
        self.parameters: dict[int, tuple[Tensor, str]] = {}
        self.values: dict[int, tuple[Tensor, Any]] = {}
        self.replaced: dict[int, tuple[Tensor, Tensor]] = {}
        self.raw: dict[int, tuple[Tensor, str]] = {}
        self.busy = False  # in a hook of ours, whose own calls are no sites
        for name, tensor in named_tensors(interceptor.model):
            self.parameters.setdefault(id(tensor), (tensor, name))

    def push(self, path: str, module: Any) -> None:
        """A call of the module at `path` begins."""
        count = self.calls.get(path, 0)
        self.calls[path] = count + 1
        self.stack.append(Frame(path, module, f"{path}@{count}" if count else path))
        for own, tensor in module._parameters.items():
            if tensor is not None and id(tensor) not in self.parameters:  # FSDP puts whole parameters there for one call
                self.parameters[id(tensor)] = (tensor, f"{path}.{own}" if path else own)

    @property
    def path(self) -> str:
        """The path of the innermost module under way."""
        return self.stack[-1].path if self.stack else ""

    @property
    def module(self) -> Any:
        """The innermost module under way."""
        return self.stack[-1].module if self.stack else self.interceptor.model

    def site(self, function: str) -> str:
        """The name of the next call of `function`."""
        frame = self.stack[-1]
        index = frame.counts.get(function, 0)
        frame.counts[function] = index + 1
        return f"{frame.label}/{function}:{index}"

    def parameter(self, tensor: Tensor) -> str | None:
        """The name of a parameter or buffer of the model."""
        found = self.parameters.get(id(tensor))
        return None if found is None else found[1]

    def redirect(self, old: Tensor, new: Tensor) -> None:
        """From now on calls that are given `old` get `new`."""
        self.replaced[id(old)] = (old, new)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        function = function_name(func)
        if self.busy:
            return func(*args, **kwargs)
        if function is None or not self.stack:
            return self.interceptor.inquire(self, func, args, kwargs)
        return self.interceptor.intercept(self, Call(func, function, tuple(args), dict(kwargs)))


_uncompiled: list[type[Session]] = []


def _session_class() -> type[Session]:
    """`Session`, or where torch.compile may be at work, one that it runs as it is: it cannot trace what intercepts."""
    if "torch._dynamo" not in sys.modules:
        return Session
    if not _uncompiled:
        # The decorator imports torch._dynamo, which takes a second: not at import time, and not where nobody compiles.
        as_it_is = torch.compiler.disable(Session.__torch_function__)
        _uncompiled.append(type("Session", (Session,), {"__torch_function__": as_it_is}))
    return _uncompiled[0]


class Interceptor:
    """What is done at every site of `model`; subclasses override `enter`, `compute` and `after`.

    folds: batch-norm layer -> convolution layer whose weights already hold it: the batch norm passes its input on.
    """

    def __init__(self, model: Any, folds: Mapping[str, str] | None = None) -> None:
        self.model = model
        self.folds = dict(folds or {})
        self._folded = {convolution: norm for norm, convolution in self.folds.items()}
        for path, module in model.named_modules():
            module.register_forward_pre_hook(_Enter(self, path), with_kwargs=True)
            module.register_forward_hook(_Leave(self, path), always_call=True)

    def __enter__(self) -> Self:
        """For a model that nobody needs after the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the model: it is freed with its last user then, not when Python looks for cycles."""
        self.model = None

    def enter(self, session: Session, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's inputs, on their way in."""
        return args, kwargs

    def compute(self, session: Session, call: Call, site: str | None) -> Any:
        """Run the call."""
        return call()

    def after(self, session: Session, call: Call, site: str, result: Any) -> Any:
        """The result that the caller gets."""
        return result

    def leave(self, session: Session, outputs: Any) -> Any:
        """The model's outputs, on their way out."""
        return map_tensors(outputs, lambda tensor: _latest(session, tensor)) if session.replaced else outputs

    def substitute(self, session: Session, tensor: Tensor) -> Tensor:
        """The tensor that a call reads in place of its operand `tensor`."""
        return tensor

    def inquire(self, session: Session, func: Any, args: Any, kwargs: Any) -> Any:
        """Answer a question about a tensor (its shape, dtype, …)."""
        return func(*args, **kwargs)

    def broken(self, norms: list[str]) -> None:
        """Batch norms whose folded convolution ran without them."""
        raise ModelError(
            f"The batch norm {norms[0]!r} was folded into {self.folds[norms[0]]!r}, and this input ran the one without the "
            "other: the model's control flow took a branch that calibration never saw. Calibrate with data that takes it."
        )

    def intercept(self, session: Session, call: Call) -> Any:
        """One call: substitute its operands, name its site, run it, treat its result."""
        given = call
        call = self._with_substitutes(session, call)
        operands = call.tensors()
        site = session.site(call.function) if any(tensor.is_floating_point() for tensor in operands) else None
        if call.function == "batch_norm" and session.path in self.folds:
            return self._pass_on(session, call)
        result = self.compute(session, call, site)
        if site is None and operands and any(tensor.is_floating_point() for tensor in tensors_in(result)):
            site = session.site(call.function)
        if site is not None:
            result = self._treat(session, given, call, site, result)
            if session.path in self._folded and isinstance(result, torch.Tensor):
                session.raw[id(result)] = (result, self._folded[session.path])
        return result

    def _treat(self, session: Session, given: Call, call: Call, site: str, result: Any) -> Any:
        new = self.after(session, call, site, result)
        target = call.target
        if target is not None and new is not result:
            # `new` stands for the tensor changed in place, under every name the caller knows it by.
            session.redirect(target, new)
            if given.target is not target:
                session.redirect(given.target, new)
            return None if result is None else new
        return new

    def _pass_on(self, session: Session, call: Call) -> Any:
        value = call.argument(0, "input")
        if session.raw.pop(id(value), None) is None:
            self.broken([session.path])
        return value

    def _with_substitutes(self, session: Session, call: Call) -> Call:
        def swap(tensor: Tensor) -> Tensor:
            return self.substitute(session, _latest(session, tensor))

        return Call(call.run, call.function, map_tensors(call.args, swap), map_tensors(call.kwargs, swap))

    def close(self, session: Session, *, failed: bool) -> None:
        """The outermost call ended."""
        if session.raw and not failed:
            self.broken(sorted({norm for _, norm in session.raw.values()}))


def _latest(session: Session, tensor: Tensor) -> Tensor:
    while (found := session.replaced.get(id(tensor))) is not None:
        tensor = found[1]
    return tensor


class _Enter:
    """The forward pre-hook of one module."""

    def __init__(self, interceptor: Interceptor, path: str) -> None:
        self.interceptor, self.path = interceptor, path

    def __call__(self, module: Any, args: Any, kwargs: Any) -> Any:
        sessions = _sessions()
        session = sessions.get(id(self.interceptor))
        if session is None:
            session = _session_class()(self.interceptor)
            session.__enter__()
            sessions[id(self.interceptor)] = session
        session.push(self.path, module)
        if self.path != "":
            return None
        session.busy = True
        try:
            return self.interceptor.enter(session, args, kwargs)
        finally:
            session.busy = False


class _Leave:
    """The forward hook of one module, which also runs when its forward raised (then `output` is None)."""

    def __init__(self, interceptor: Interceptor, path: str) -> None:
        self.interceptor, self.path = interceptor, path

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        sessions = _sessions()
        session = sessions.get(id(self.interceptor))
        if session is None or session.stack[-1].module is not module:
            return output
        try:
            if self.path == "" and output is not None:
                session.busy = True
                output = self.interceptor.leave(session, output)
        finally:
            session.busy = False
            session.stack.pop()
            if not session.stack:
                del sessions[id(self.interceptor)]
                session.__exit__(None, None, None)
        if not session.stack:
            self.interceptor.close(session, failed=output is None)
        return output


def interceptor_of(model: Any) -> Interceptor | None:
    """The interceptor attached to `model`, if any."""
    hooks = (hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _Enter))
    return next((hook.interceptor for hook in hooks), None)


@contextmanager
def contained() -> Iterator[None]:
    """Sessions opened inside end with it: a trace that fails (torch.export's) may pass over the hooks that close them."""
    before = set(_sessions())
    try:
        yield
    finally:
        for key in reversed([key for key in _sessions() if key not in before]):
            _sessions().pop(key).__exit__(None, None, None)


def _sessions() -> dict[int, Session]:
    if not hasattr(_local, "sessions"):
        _local.sessions = {}
    found: dict[int, Session] = _local.sessions
    return found


def function_name(func: Any) -> str | None:
    """The name of a torch function; None for a question about a tensor. `x + y`, `torch.add` and `x.add` share one name."""
    name: str = getattr(func, "__name__", "") or ""
    if name in _INQUIRIES:
        return None
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        return name if name in _PROPERTIES else None
    if name.startswith("__") and name.endswith("__"):
        inner = name[2:-2]
        if inner.startswith("i") and hasattr(torch.Tensor, f"__{inner[1:]}__") and inner not in ("index", "invert"):
            return inner[1:] + "_"
        return None if inner in ("set", "len", "bool", "hash", "repr", "format", "contains", "index") else inner
    return name or None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from tensors_in(getattr(value, item.name))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change` applied to every tensor in it; the same object where nothing changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        mapped = {key: map_tensors(item, change) for key, item in value.items()}
        if all(mapped[key] is item for key, item in value.items()):
            return value
        return mapped if type(value) is dict else type(value)(**mapped)
    if isinstance(value, tuple | list):
        items = [map_tensors(item, change) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        mapped = {name: map_tensors(item, change) for name, item in fields.items()}
        return value if all(mapped[name] is item for name, item in fields.items()) else dataclasses.replace(value, **mapped)
    return value


def named_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer with its first name; a tied tensor comes once."""
    yield from model.named_parameters()
    yield from model.named_buffers()
