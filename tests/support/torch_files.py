"""Files of the zoo's PyTorch models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whet.data import Batches
from whet.specs import Target
from whet.torch import export, quantize
from zoo_torch import CASES


class Exports:
    """Models of the zoo as files of one target."""

    def __init__(self, target: Target, suffix: str) -> None:
        self.target, self.suffix = target, suffix

    def write(self, folder: Path, name: str, spec: Any = None, *, dynamic: Any = None) -> Any:
        """The model `name`, its inputs, the plan of `spec`, and the file in `folder`."""
        model, inputs = CASES[name]()
        plan = None
        if spec is not None:
            plan, _ = quantize(model, spec, self.target, calibration=Batches(inputs), example=inputs, progress=False)
        path = folder / f"{name}.{self.suffix}"
        export(model, plan, self.target, path, example=inputs, dynamic=dynamic)
        return model, inputs, plan, path

    def once(self, folders: Any) -> Any:
        """`write` in a folder of its own, once for each way to be written: nobody changes what it returns."""
        made: dict[Any, Any] = {}

        def written(name: str, spec: Any = None, *, dynamic: Any = None) -> Any:
            key = (name, repr(spec), repr(dynamic))
            if key not in made:
                made[key] = self.write(folders.mktemp(name), name, spec, dynamic=dynamic)
            return made[key]

        return written
