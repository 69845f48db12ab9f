"""Real removal: smaller tensors and attributes that say so, checked against the original with the same channels silenced."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from whet.data import leaves
from whet.errors import DataError, ModelError
from whet.graph.cutting import difference
from whet.graph.groups import Family, Gone
from whet.graph.ids import IntArray
from whet.torch.attributes import Change, candidates, own_changes
from whet.torch.borrowing import Silence, zeroed
from whet.torch.groups import Reading
from whet.torch.model import call, device_of, dtype_of, evaluating, to_numpy, to_tensors

SIZES = "_whet_sizes"  # an attribute of the model: {module path: {attribute: value}} that removal has changed
GRAPH = "_whet_graph"  # of a rebuilt model: what each rebuilding needs to be done again
TOLERANCE = 1e-4  # of the largest output; float arithmetic in another order
_HALF_TOLERANCE = 3e-2  # of 16-bit models
_NAMED_APART = 4  # so many attribute names are tried in every combination


@dataclass(slots=True)
class Undo:
    """What a cut replaced, so that it can be put back."""

    entries: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)

    def set(self, where: dict[str, Any], key: str, value: Any) -> None:
        """Replace an entry and remember the old one."""
        self.entries.append((where, key, where[key]))
        where[key] = value

    def back(self, to: int = 0) -> None:
        """Put everything back that was replaced after the first `to` entries."""
        while len(self.entries) > to:
            where, key, value = self.entries.pop()
            where[key] = value


@dataclass(frozen=True, slots=True, eq=False)
class Refused:
    """Families whose removal the model's own code does not allow, and the operations that hold the sizes."""

    family: str
    reason: str


class Surgeon:
    """Removes groups from one model, which it changes, and checks the result on `example`."""

    def __init__(self, model: Any, reading: Reading, example: Any) -> None:
        self._model, self._groups = model, reading.groups
        self._nodes = {node.name: node for node in reading.program.graph.nodes}
        self._inputs = to_tensors(example, device_of(model), dtype_of(model))
        self._names, self._modules = holders(model), dict(model.named_modules())
        self.departure = math.inf  # of the last comparison: the largest difference, of the largest output

    def outputs(self) -> list[Any]:
        """The model's outputs on the example, in inference mode."""
        return _outputs(self._model, self._inputs)

    def _zeros(self, gone: Gone) -> dict[int, tuple[Any, list[tuple[int, Any]]]]:
        """The weights that read these groups, by id, and at which positions."""
        found = {}
        for name, axes in self._groups.read(gone).items():
            tensor = self._tensor(name)
            found[id(tensor)] = tensor, [(d, torch.from_numpy(at).to(tensor.device)) for d, at in axes.items()]
        return found

    @contextmanager
    def silenced(self, gone: Gone) -> Iterator[None]:
        """The original with other weights in the place of those that read these groups, zero there."""
        kept = [(tensor, tensor.data, zeros) for tensor, zeros in self._zeros(gone).values()]
        try:
            for tensor, values, zeros in kept:
                tensor.data = zeroed(values, zeros)
            yield
        finally:
            for tensor, values, _ in kept:
                tensor.data = values

    def references(self, gone: Gone) -> Iterator[list[Any]]:
        """The outputs with these groups silenced: as functions get the weights, which needs little memory, and if that is not
        the same with the weights exchanged, for code that torch's modes do not see or that goes another way under them."""
        with Silence(self._zeros(gone)):
            first = self.outputs()
        yield first
        with self.silenced(gone):
            second = self.outputs()
        if not equal(second, first):
            yield second

    def _tensor(self, name: str) -> Any:
        where, key = self._names[name][0]
        return where[key]

    def refusals(self, families: tuple[Family, ...]) -> list[Refused]:
        """Try families whose removal changes a size written into an operation; one group of each, alike ones together."""
        alike: dict[Any, list[Family]] = {}
        for family in families:
            if family.sites:
                alike.setdefault(self._likeness(family), []).append(family)
        refused = []
        for found in alike.values():
            tried = [family for family in found if len(family) > 1]
            gone = self._groups.gone([family.roots[:1] for family in tried])
            if tried and not self._groups.is_empty(gone) and self._attempt(gone) is None:
                refused += [Refused(family.name, self._why(family)) for family in found]
        return refused

    def _likeness(self, family: Family) -> Any:
        """Equal for families that the same code holds."""
        kinds = [(self._target(name), self._owner_class(name)) for name in family.sites]
        return (family.kind, tuple(kinds), tuple((m.axis, m.contracted, m.positions.shape[1]) for m in family.members))

    def _target(self, name: str) -> str:
        return str(self._nodes[name].target)

    def _owner_class(self, name: str) -> str:
        return type(self._owners(name)[0]).__qualname__

    def _owners(self, name: str) -> list[Any]:
        """The modules around an operation, the innermost first."""
        stack = self._nodes[name].meta.get("nn_module_stack") or {}
        paths = [str(path).removeprefix("L__self__").lstrip(".") for path, _ in reversed(stack.values())]
        return [self._modules[path] for path in paths if path in self._modules] or [self._model]

    def _why(self, family: Family) -> str:
        places = [f"{self._nodes[n].target._schema.name.split('::')[-1]} in {self._where(n)}" for n in family.sites]
        return f"the model's code fixes its size ({', '.join(dict.fromkeys(places))})"

    def _where(self, name: str) -> str:
        owner = self._owners(name)[0]
        path = next((path for path, module in self._modules.items() if module is owner), "")
        return path or type(self._model).__name__

    def _attempt(self, gone: Gone) -> list[Change] | None:
        """Cut, compare and put back; the attribute changes that make it right, None if none do."""
        undo = Undo()
        for expected in self.references(gone):
            try:
                self._cut(gone, undo)
                changes = self._fitting(gone, undo, expected)
            finally:
                undo.back()
            if changes is not None:
                return changes
        return None

    def remove(self, gone: Gone) -> list[Change]:
        """Remove these groups for good; the attributes that were changed.

        Raises:
            ModelError: the result is not the original with these groups silenced.
        """
        undo = Undo()
        for expected in self.references(gone):
            self._cut(gone, undo)
            changes = self._fitting(gone, undo, expected)
            if changes is not None:
                return changes
            undo.back()
        raise ModelError(
            f"Removing these channels does not give the original with them silenced: {self._compare(gone)} "
            "Name the layers in keep=, or use rebuild='graph'."
        )

    def _compare(self, gone: Gone) -> str:
        touched = set(np.flatnonzero(gone).tolist())
        sites = [f for f in self._groups.families if f.sites and touched.intersection(f.roots.tolist())]
        names = sorted({f"{self._target(n)} in {self._where(n)}" for family in sites for n in family.sites})
        return (
            f"sizes are written into {', '.join(names)}." if names else "an operation is followed wrongly (please report it)."
        )

    def _fitting(self, gone: Gone, undo: Undo, expected: list[Any]) -> list[Change] | None:
        """The attributes of layers whose kind is known, and of others as far as the outputs agree with `expected`."""
        own = own_changes(self._model, self._groups, gone)
        self._write(own, undo)
        sure = len(undo.entries)
        for extra in _combinations(self._guesses(gone, {(id(c.module), c.name) for c in own})):
            self._write(extra, undo)
            if self._agrees(expected):
                return [*own, *extra, *self._told(gone, {(id(c.module), c.name) for c in (*own, *extra)}, undo, expected)]
            undo.back(sure)
        return None

    def _told(self, gone: Gone, known: set[tuple[int, str]], undo: Undo, expected: list[Any]) -> list[Change]:
        """Numbers of heads that modules hold and these operations do not need (views with -1); set where it changes nothing."""
        found: dict[tuple[int, str], Change] = {}
        for site in self._groups.structure.sites:
            module = self._owners(site.name)[0] if site.free else None
            for change in candidates(module, self._pairs(site.free, gone)) if site.free else ():
                if "head" in change.name and (id(module), change.name) not in known:
                    found.setdefault((id(module), change.name), change)
        changes, before, was = list(found.values()), len(undo.entries), self.departure
        self._write(changes, undo)
        if not changes or self._agrees(expected):
            return changes
        undo.back(before)
        self.departure = was
        return []

    def _pairs(self, pieces: tuple[Any, ...], gone: Gone) -> set[tuple[int, int]]:
        """Sizes before and after, of those that change."""
        ids = self._groups.structure.ids
        pairs = {(len(piece), int((~gone[ids.find(piece)]).sum())) for piece in pieces}
        return {(old, new) for old, new in pairs if old != new}

    def _write(self, changes: list[Change], undo: Undo) -> None:
        for change in changes:
            undo.set(vars(change.module), change.name, change.value)

    def _guesses(self, gone: Gone, known: set[tuple[int, str]]) -> list[Change]:
        """Attributes that hold a size which changes, in the modules around the operations where it is written."""
        found: dict[tuple[int, str], Change] = {}
        for site in self._groups.structure.sites:
            pairs = self._pairs(site.pieces, gone)
            for module in self._owners(site.name) if pairs else ():
                for change in candidates(module, pairs):
                    if (id(module), change.name) not in known:
                        found.setdefault((id(module), change.name), change)
        return list(found.values())

    def _agrees(self, expected: list[Any]) -> bool:
        self.departure = departure(self._model, self._inputs, expected)
        return self.departure <= tolerance_of(self._model)

    def _cut(self, gone: Gone, undo: Undo) -> None:
        for name, axes in self._groups.kept(gone).items():
            places = self._names[name]
            old = places[0][0][places[0][1]]
            new = sliced(old.detach(), axes)
            if isinstance(old, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
            for where, key in places:
                undo.set(where, key, new)
        for module, flat in flat_weights(self._model):
            undo.set(vars(module), "_flat_weights", flat)


def _outputs(model: Any, inputs: Any) -> list[Any]:
    with evaluating(model), torch.no_grad():
        return leaves(to_numpy(call(model, inputs)))


def agree(model: Any, inputs: Any, expected: list[Any]) -> bool:
    """Whether `model` runs on `inputs` and gives `expected`, to 1e-4 of the largest output (16-bit models: 3e-2)."""
    return departure(model, inputs, expected) <= tolerance_of(model)


def departure(model: Any, inputs: Any, expected: list[Any]) -> float:
    """The `difference` between what `model` gives for `inputs` and `expected`; infinite where it does not run."""
    try:
        return difference(_outputs(model, to_tensors(inputs, device_of(model), dtype_of(model))), expected)
    except (DataError, ModelError):
        return math.inf


def tolerance_of(model: Any) -> float:
    """How far its outputs may be from what is expected, of the largest output."""
    return _HALF_TOLERANCE if dtype_of(model) in (torch.float16, torch.bfloat16) else TOLERANCE


def equal(found: list[Any], expected: list[Any], tolerance: float = TOLERANCE) -> bool:
    """Whether the outputs have the same shapes and differ by at most `tolerance` of the largest value."""
    return difference(found, expected) <= tolerance


def sliced(tensor: Any, axes: Mapping[int, IntArray]) -> Any:
    """`tensor` with only these positions of its axes, in memory of its own."""
    if not axes:
        return tensor.clone()
    for axis, positions in axes.items():
        tensor = tensor.index_select(axis, torch.from_numpy(np.ascontiguousarray(positions)).to(tensor.device))
    return tensor


def slice_optimizer(optimizer: Any, replaced: Mapping[int, tuple[Any, Mapping[int, IntArray]]]) -> None:
    """*In place*: an optimizer's parameters and their state (momenta) lose the same positions.

    replaced: for the id of an old parameter, the new one and the positions it kept.
    """
    for group in optimizer.param_groups:
        for i, old in enumerate(group["params"]):
            if id(old) not in replaced:
                continue
            new, axes = replaced[id(old)]
            group["params"][i] = new
            if old in optimizer.state:
                state = optimizer.state.pop(old)
                optimizer.state[new] = {
                    key: sliced(value, axes) if isinstance(value, torch.Tensor) and value.shape == old.shape else value
                    for key, value in state.items()
                }


def resize(model: Any, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, Mapping[str, Any]]) -> None:
    """*In place*: give a model the smaller tensors and the attributes that removal gave another of its kind.

    Values are lost: load them next. Tied tensors stay tied.

    Raises:
        ModelError: the model has no such module.
    """
    names = holders(model)
    for name, shape in shapes.items():
        for where, key in names.get(name, ())[:1]:
            old = where[key]
            if tuple(old.shape) == shape or old.ndim != len(shape):
                continue
            new = old.detach().new_zeros(shape)
            new = torch.nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
            for place, own in names[name]:
                place[own] = new
    for module, flat in flat_weights(model):
        module._flat_weights = flat
    modules = dict(model.named_modules())
    for path, row in sizes.items():
        if path not in modules:
            raise ModelError(f"The model given has no module {path!r}, of which channels were removed before it was saved.")
        for key, value in row.items():
            attributes: dict[str, Any] = modules[path].__dict__
            attributes[key] = tuple(value) if isinstance(attributes.get(key), tuple) else value
    note(model, SIZES, {path: dict(row) for path, row in sizes.items()})


def note(model: Any, key: str, value: Any) -> None:
    """Keep what was done with the model, through copies. A GraphModule keeps only its `meta` when it is copied."""
    if isinstance(model, torch.fx.GraphModule):
        model.meta[key] = value
    else:
        setattr(model, key, value)


def noted(model: Any, key: str) -> Any:
    """What `note` kept; None without."""
    return model.meta.get(key) if isinstance(model, torch.fx.GraphModule) else getattr(model, key, None)


def flat_weights(model: Any) -> Iterator[tuple[Any, list[Any]]]:
    """torch's recurrent layers, and the list of their weights, which they keep besides and must hold what they hold now."""
    for module in model.modules():
        if isinstance(module, torch.nn.RNNBase):
            yield module, [getattr(module, name, None) for name in module._flat_weights_names]


def holders(model: Any) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """Where every parameter and buffer is held: the dictionaries of modules, several for a tied one."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    first: dict[str, list[tuple[dict[str, Any], str]]] = {}
    for path, module in model.named_modules():
        for where in (module._parameters, module._buffers):
            for key, tensor in where.items():
                if tensor is not None:
                    found = places.setdefault(id(tensor), [])
                    found.append((where, key))
                    first[f"{path}.{key}" if path else key] = found
    return first


def _combinations(guesses: list[Change]) -> Iterator[list[Change]]:
    """None, all, then all changes of some attribute names: few names in every combination, many one at a time."""
    yield []
    names = list(dict.fromkeys(change.name for change in guesses))
    if not names:
        return
    yield guesses
    some = range(1, len(names)) if len(names) <= _NAMED_APART else (1,)
    for count in some:
        for chosen in itertools.combinations(names, count):
            yield [change for change in guesses if change.name in chosen]
