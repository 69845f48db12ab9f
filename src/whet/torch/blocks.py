"""Whole blocks of a PyTorch model: modules around which a shortcut leads, found, tried without, and removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from whet.data import leaves
from whet.errors import DataError, ModelError
from whet.graph.groups import Size
from whet.graph.shortcuts import ADD, OTHER, PASS, Block, Flow, shortcut
from whet.graph.views import Masks
from whet.numerics.layers import influence
from whet.torch.calls import shapes
from whet.torch.groups import Reading, read_model
from whet.torch.interception import tensors_in
from whet.torch.model import call, device_of, dtype_of, evaluating, predict, to_numpy, to_tensors
from whet.torch.surgery import SIZES, agree, note, noted

SKIPPED = "_whet_skipped"  # an attribute of the model: {module path: `Passing` as plain values} of the blocks that have left
_KEEPS = {"layer_norm", "native_layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm", "dropout", "contiguous"}
_KEEPS |= {"clone", "to", "_to_copy", "detach", "alias", "float", "type_as", "relu6", "hardswish"}


@dataclass(frozen=True, slots=True)
class Passing:
    """What a block does without its branch. source: the argument that it returns, a position or a keyword.

    outputs: None where it returns that alone; else one entry for each item of its tuple: `{"input": position or keyword}` or
    `{"value": None, a flag or a number}`. alone: whether that is its only argument.
    """

    source: int | str
    outputs: Sequence[dict[str, Any]] | None = None
    alone: bool = False

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The outputs of a call with these arguments."""

        def given(where: int | str) -> Any:
            return args[where] if isinstance(where, int) else kwargs[where]

        if self.outputs is None:
            return given(self.source)
        return tuple(given(item["input"]) if "input" in item else item["value"] for item in self.outputs)

    def module(self) -> torch.nn.Module:
        """A module that does this."""
        return torch.nn.Identity() if self.alone else Skip(self)


class Skip(torch.nn.Module):  # type: ignore[misc]
    """In the place of a block: returns what the block got."""

    def __init__(self, passing: Passing) -> None:
        super().__init__()
        self.passing = passing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's input, in the structure of its outputs."""
        return self.passing(args, kwargs)


def blocks(model: Any, example: Any) -> TorchBlocks:
    """The blocks of `model`, traced in inference mode on `example`, a batch of inputs.

    Raises:
        ModelError: torch.export cannot draw the model's graph.
        DataError: the model cannot run on `example`.
    """
    return TorchBlocks(model, example)


class TorchBlocks:
    """See `whet.graph.shortcuts.Blocks`. A block is the innermost module that holds one of the additions it is made of."""

    def __init__(self, model: Any, example: Any) -> None:
        self._model, self._example = model, example
        self._reading = read_model(model, example)
        found = _modules(self._reading)
        self._passing, skipped = self._observed(found)
        self.blocks = tuple(self._block(name) for name in found if name in self._passing)
        self.skipped = tuple(skipped)

    @property
    def names(self) -> tuple[str, ...]:
        """All names that a pattern may mean."""
        return tuple(name for name, _ in (*self._model.named_modules(), *self._model.named_parameters()) if name)

    def size(self) -> Size:
        """What the whole model costs."""
        return self._reading.groups.size()

    def without(self, names: Sequence[str], inputs: Any) -> Any:
        """The model's outputs on a batch, each of these blocks replaced by its shortcut.

        Raises:
            DataError: the model's own code needs one of the blocks.
        """
        with self._exchanged(names):
            return predict(self._model, inputs)

    def influence(self, inputs: Any) -> dict[str, tuple[float, int]]:
        """For every block `numerics.layers.influence` on a batch."""
        found: dict[str, tuple[float, int]] = {}

        def watch(name: str) -> Any:
            def see(module: Any, args: Any, kwargs: Any, outputs: Any) -> None:
                before = self._passing[name](args, kwargs)
                pair = [next(tensors_in(value)).detach().float().cpu().numpy() for value in (before, outputs)]
                found[name] = influence(*pair)

            return see

        with ExitStack() as stack:
            for block in self.blocks:
                handle = self._model.get_submodule(block.name).register_forward_hook(watch(block.name), with_kwargs=True)
                stack.callback(handle.remove)
            predict(self._model, inputs)
        return found

    def remove(self, names: Sequence[str], masks: Masks, optimizer: Any = None) -> tuple[Any, Masks]:
        """*In place*: these blocks leave; an optimizer forgets their parameters.

        Raises:
            ModelError: the result is not the original with the blocks' shortcuts alone.
        """
        model, expected = self._model, self._hooked(names)
        before = {id(parameter) for parameter in model.parameters()}
        skip(model, {name: self._passing[name] for name in names})
        if not agree(model, self._example, expected):
            raise ModelError(
                f"Without {', '.join(names)} the model does not give what it gives with their shortcuts alone: its own code "
                "looks into these modules. Name them in keep=."
            )
        left = {id(parameter) for parameter in model.parameters()}
        for group in optimizer.param_groups if optimizer is not None else ():
            for parameter in [p for p in group["params"] if id(p) in before - left]:
                optimizer.state.pop(parameter, None)
            group["params"] = [p for p in group["params"] if id(p) not in before - left]
        named = {name for name, _ in model.named_parameters()}
        return model, {name: mask for name, mask in masks.items() if name in named}

    def _hooked(self, names: Sequence[str]) -> list[Any]:
        """The outputs on the example where these blocks run and what they make is put aside."""
        with ExitStack() as stack:
            for name in names:
                passing = self._passing[name]

                def aside(module: Any, args: Any, kwargs: Any, outputs: Any, passing: Passing = passing) -> Any:
                    return passing(args, kwargs)

                handle = self._model.get_submodule(name).register_forward_hook(aside, with_kwargs=True)
                stack.callback(handle.remove)
            return leaves(self._outputs())

    def _outputs(self) -> Any:
        inputs = to_tensors(self._example, device_of(self._model), dtype_of(self._model))
        with evaluating(self._model), torch.no_grad():
            return to_numpy(call(self._model, inputs))

    @contextmanager
    def _exchanged(self, names: Sequence[str]) -> Iterator[None]:
        held = [(*_holder(self._model, name), self._model.get_submodule(name)) for name in names]
        try:
            for (parent, key, _), name in zip(held, names, strict=True):
                parent._modules[key] = self._passing[name].module()
            yield
        finally:
            for parent, key, module in held:
                parent._modules[key] = module

    def _observed(self, found: Sequence[str]) -> tuple[dict[str, Passing], list[tuple[str, str]]]:
        """How each module passes its input on, seen in a call; and why some cannot."""
        seen: dict[str, list[Passing | str]] = {name: [] for name in found}

        def watch(name: str) -> Any:
            def see(module: Any, args: Any, kwargs: Any, outputs: Any) -> None:
                seen[name].append(_passing(args, kwargs, outputs))

            return see

        with ExitStack() as stack:
            for name in found:
                handle = self._model.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True)
                stack.callback(handle.remove)
            self._outputs()
        passing, skipped = {}, []
        for name, calls in seen.items():
            if len(calls) != 1:
                skipped.append((name, f"it is called {len(calls)} times"))
            elif isinstance(calls[0], str):
                skipped.append((name, calls[0]))
            else:
                passing[name] = calls[0]
                self._passing = passing
                try:
                    self.without([name], self._example)
                except DataError as cause:
                    del passing[name]
                    skipped.append((name, f"the model's own code needs it: {cause.__cause__ or cause}"))
        return passing, skipped

    def _block(self, name: str) -> Block:
        module = self._model.get_submodule(name)
        inside, prefix = {id(p): p for p in module.parameters()}, f"{name}."
        shared = {id(p) for path, p in self._model.named_parameters(remove_duplicate=False) if not path.startswith(prefix)}
        own = [p for key, p in inside.items() if key not in shared]
        layers = tuple(path for path, _ in self._model.named_modules() if path == name or path.startswith(prefix))
        macs = self._reading.groups.macs_of(lambda layer: layer == name or layer.startswith(prefix))
        return Block(name, layers, macs, sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own))


def skip(model: Any, passing: Mapping[str, Passing]) -> None:
    """*In place*: these modules are exchanged for what passes their input on, and that is remembered for saving."""
    for name, how in passing.items():
        parent, key = _holder(model, name)
        parent._modules[key] = how.module()
    plain = {name: asdict(how) for name, how in passing.items()}
    note(model, SKIPPED, {**(noted(model, SKIPPED) or {}), **plain})
    if noted(model, SIZES):  # of modules that are there no more
        paths = dict(model.named_modules())
        note(model, SIZES, {path: row for path, row in noted(model, SIZES).items() if path in paths})


def skip_again(model: Any, kept: Mapping[str, Any]) -> None:
    """*In place*: what `skip` remembered, done again to another model of the original's kind.

    Raises:
        ModelError: it has no such module.
    """
    known, done = dict(model.named_modules()), noted(model, SKIPPED) or {}
    missing = [name for name in kept if name not in known]
    if missing:
        raise ModelError(f"The model given has no module {missing[0]!r}, which was removed before it was saved.")
    skip(model, {name: Passing(**row) for name, row in kept.items() if name not in done})


def _holder(model: Any, name: str) -> tuple[Any, str]:
    owner, _, key = name.rpartition(".")
    return model.get_submodule(owner), key


def _passing(args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any) -> Passing | str:
    """How a call's outputs look without the branch; why there is no telling."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    items = outputs if isinstance(outputs, tuple) else (outputs,)
    if not all(item is None or isinstance(item, torch.Tensor | bool | int | float) for item in items):
        return f"it returns a {type(outputs).__name__}, which Whet does not rebuild"
    known = {id(value): where for where, value in given if isinstance(value, torch.Tensor)}
    made = [item for item in items if isinstance(item, torch.Tensor) and id(item) not in known]
    like = [
        w for w, v in given if isinstance(v, torch.Tensor) and made and v.shape == made[0].shape and v.dtype == made[0].dtype
    ]
    if len(made) != 1:
        return f"it makes {len(made)} tensors" if made else "it changes its input in place"
    if not like:
        return "no argument is a tensor of the shape of what it returns"
    if not isinstance(outputs, tuple):
        return Passing(like[0], None, len(args) == 1 and not kwargs)

    def entry(item: Any) -> dict[str, Any]:
        if isinstance(item, torch.Tensor):
            return {"input": like[0] if item is made[0] else known[id(item)]}
        return {"value": item}

    return Passing(like[0], tuple(entry(item) for item in items))


def _modules(reading: Reading) -> list[str]:
    """Modules around which a shortcut leads, the innermost that hold an addition, in execution order."""
    flows, inside = _flows(reading.program)
    order = {flow.name: flow for flow in flows}
    returned = [n.name for node in reading.program.graph.nodes if node.op == "output" for n in node.all_input_nodes]
    held: dict[str, tuple[str, ...]] = {}
    for path, names in inside.items():
        own = [flow for flow in flows if flow.name in names]
        entered = dict.fromkeys(read for flow in own for read in flow.reads if read not in names)
        left = dict.fromkeys(read for flow in flows if flow.name not in names for read in flow.reads if read in names)
        ends = list(left | dict.fromkeys(name for name in returned if name in names))
        if path and len(ends) == 1:
            shape = order[ends[0]].shape
            starts = [name for name in entered if order[name].shape == shape]
            found = [added for name in starts if (added := shortcut(own, name, ends[0]))]
            if len(found) == 1:
                held[path] = found[0]
    chosen: list[str] = []
    for path in sorted((path for path in held if "@" not in path), key=lambda path: (path.count("."), path)):
        nested = {name for other in held if other.startswith(f"{path}.") for name in held[other]}
        if not set(held[path]) <= nested and not any(path.startswith(f"{outer}.") for outer in chosen):
            chosen.append(path)
    chosen.sort(key=lambda path: min(i for i, flow in enumerate(flows) if flow.name in held[path]))
    return chosen


def _flows(program: Any) -> tuple[list[Flow], dict[str, set[str]]]:
    """The operations on values that depend on the inputs, and those of each module."""
    given = set(program.graph_signature.user_inputs)
    flows: list[Flow] = []
    moving: set[Any] = set()
    inside: dict[str, set[str]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in given and isinstance(node.meta.get("val"), torch.Tensor):
            moving.add(node)
            flows.append(Flow(node.name, (), OTHER, shapes(node)[0]))
        reads = [source for source in node.all_input_nodes if source in moving] if node.op == "call_function" else []
        if reads:
            moving.add(node)
            made = shapes(node)
            flows.append(Flow(node.name, tuple(n.name for n in reads), _role(node, reads), made[0] if made else ()))
            for path in _stack(node):
                inside.setdefault(path, set()).add(node.name)
    return flows, inside


def _role(node: Any, reads: list[Any]) -> str:
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(node.meta.get("val"), torch.Tensor):
        return OTHER
    name, shape = node.target._schema.name.split("::")[-1].rstrip("_"), tuple(node.meta["val"].shape)
    if any(not isinstance(n.meta.get("val"), torch.Tensor) or tuple(n.meta["val"].shape) != shape for n in reads):
        return OTHER
    if len(reads) == 2:
        return ADD if name == "add" and node.kwargs.get("alpha", 1) == 1 else OTHER
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return PASS if len(reads) == 1 and (pointwise or name in _KEEPS) else OTHER


def _stack(node: Any) -> list[str]:
    """The paths of all modules whose forward holds this operation; of their second call on with "@1" behind."""
    return [str(key).removeprefix("L__self__").lstrip(".") for key in node.meta.get("nn_module_stack") or {}]
