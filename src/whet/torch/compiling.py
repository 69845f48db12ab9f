"""Forward passes compiled by `torch.compile`, and what came of it: never a silent return to plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from whet.errors import ModelError, SpecError

DEFAULT = "inductor"


class Compiler:
    """`torch.compile` with one backend while a training lasts."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(self, model: Any) -> Any:
        """`model` compiled: its weights are the model's own."""
        return torch.compile(model, backend=self.backend)

    @property
    def graphs(self) -> int:
        """How many graphs were compiled so far."""
        return int(_counters()["stats"]["unique_graphs"])

    def check(self) -> None:
        """Raise `ModelError` where a step was taken and nothing of it was compiled."""
        if not self.graphs:
            raise ModelError(f"torch.compile compiled nothing of the model{self._breaks()}. Leave Train.compile out.")

    def notes(self) -> list[str]:
        """What was compiled, in words."""
        return [f"compiled by {self.backend} in {self.graphs} graph{'s' if self.graphs > 1 else ''}{self._breaks()}"]

    def _breaks(self) -> str:
        """How often and why a graph ended before the forward pass did."""
        breaks = _counters()["graph_break"]
        if not breaks:
            return ""
        first = str(next(iter(breaks))).splitlines()[0]
        return f", and what lies between runs as it is ({sum(breaks.values())} graph breaks; the first: {first})"


def _counters() -> Any:
    from torch._dynamo.utils import counters

    return counters


@contextmanager
def compiling(asked: bool | str) -> Iterator[Compiler | None]:
    """The compiler of `Train.compile` in the block; None where none is asked for. What was compiled before is forgotten.

    Raises:
        SpecError: there is no such backend.
        ModelError: a model has to be compiled anew too often, where torch would go on without; or the compiler failed.
    """
    if not asked:
        yield None
        return
    backend = DEFAULT if asked is True else str(asked)
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise SpecError(f"Train.compile names the backend {backend!r}, and torch.compile knows {', '.join(known)}.")
    torch.compiler.reset()  # what other trainings compiled in this process does not count towards the limit
    _counters().clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, suppress_errors=False):
        yield Compiler(backend)


def failed(error: BaseException) -> ModelError | None:
    """What to raise where `error` came of the compiler; None where it did not."""
    from torch._dynamo.exc import TorchDynamoException

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, TorchDynamoException):
        cause = cause.__cause__
    if cause is None:
        return None
    said = " ".join([line for line in str(cause).splitlines() if line.strip()][:2])
    return ModelError(
        f"torch.compile failed ({type(cause).__name__}: {said}). Leave Train.compile out, or name another backend: "
        "compile='aot_eager' needs no C++ compiler."
    )
