"""`Compressed`: a model, what was done to it, and what can be done with it next."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from whet import htmltext, texts
from whet.data import Batches, concatenate, primary
from whet.errors import DataError, ModelError
from whet.files import replacing
from whet.graph.placement import Plan
from whet.graph.views import Masks
from whet.numerics.metrics import default_metric
from whet.pipeline.side import Model, Side, side_of
from whet.records import FORMAT, Evidence, Report, Step
from whet.runtimes.sessions import companion_of, parts
from whet.specs import Metric, Target, find_target


@dataclass(eq=False, slots=True, repr=False)
class Compressed:
    """The result of every verb. It never shares weights with the model that was given.

    The truth is a float model and, once quantized, a plan: every scale and where it applies. Everything else is derived
    from these two: the simulation in `model`, the integer model of `convert()`, the exported file, the saved folder.
    """

    side: Side
    float_model: Model
    example: Any = None  # the inputs of one batch, as NumPy arrays
    plan: Plan | None = None
    masks: Masks = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    seed: int = 0
    data: dict[str, Any] = field(default_factory=dict)  # the measured part of the report
    _simulated: Model = None

    @property
    def model(self) -> Model:
        """The model in its own framework; quantized models are simulated in float (`is_simulated`)."""
        if self.plan is None:
            return self.float_model
        if self._simulated is None:
            self._simulated = self.side.simulate(self.float_model, self.plan)
        return self._simulated

    @property
    def is_simulated(self) -> bool:
        """Whether `model` imitates integers in float arithmetic. `convert()` and `export()` make them real."""
        return self.plan is not None

    @property
    def target(self) -> str | None:
        """The target whose placement rules the quantization follows; None for a float model."""
        return None if self.plan is None else self.plan.target

    @property
    def report(self) -> Report:
        """What was done, and what was measured of it so far."""
        plain = {"format": FORMAT, "seed": self.seed, **self.data, "steps": [step.to_dict() for step in self.steps]}
        return Report(plain)

    def __repr__(self) -> str:
        """One line: what it is, and the steps that made it."""
        done = " → ".join(next(iter(step.spec)) for step in self.steps)
        return f"<{self._title()}{'; ' + done if done else ''}>"

    def _repr_html_(self) -> str:
        return htmltext.heading(self._title()) + htmltext.report_html(self.report.data)

    def _title(self) -> str:
        kind = type(self.float_model).__name__
        state = "float" if self.plan is None else f"quantized for {self.plan.target}"
        kept, size = sum(int(mask.sum()) for mask in self.masks.values()), sum(mask.size for mask in self.masks.values())
        pruned = f", {texts.percent(1 - kept / size)} of {size:,} masked weights removed" if size else ""
        return f"Compressed {kind}: {state}{pruned}"

    def convert(self) -> Model:
        """A model whose weights are stored as integers.

        Raises:
            ModelError: the model was not quantized.
        """
        if self.plan is None:
            raise ModelError("convert() needs a quantized model, and this one is float. Call whet.quantize first.")
        return self.side.convert(self.float_model, self.plan)

    def export(
        self,
        path: str | os.PathLike[str],
        target: str | Target | None = None,
        *,
        dynamic: Any = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the file of `target` (by default the one it was quantized for, else the framework's own).

        `dynamic` names further dynamic axes than the batch. The file is written whole or not at all.

        Raises:
            TargetError: an unknown target, or another placement than the one it was quantized for.
            OutputError: `path` exists and `overwrite` is false, or cannot be written.
            ExportError: the model cannot be exported.
        """
        rules = find_target(target or self.target, self.side.FRAMEWORK)
        if self.plan is not None and rules.name != self.plan.target:
            raise ModelError(
                f"This model was quantized for {self.plan.target!r}, whose placement {rules.name!r} does not share. "
                f"Quantize it again with target={rules.name!r}."
            )
        if self.example is None:
            raise ModelError("export() traces the model and needs example inputs. Pass example= to the verb that made it.")
        with replacing(path, overwrite=overwrite) as temporary:
            self.side.export(self.float_model, self.plan, rules, temporary, example=self.example, dynamic=dynamic)
            written = {part.name for part in parts(temporary)}
        stale = companion_of(Path(path))
        if stale is not None and stale.name not in written:  # the weights of the larger file that was here before
            stale.unlink(missing_ok=True)
        return Path(path)

    def measure(
        self,
        data: Any,
        metric: Any = None,
        target: str | Target | None = None,
        *,
        batches: int | Sequence[int] = 1,
        threads: int | Sequence[int] = 1,
        progress: bool = True,
    ) -> Evidence:
        """Export to a temporary file and measure that file: see `whet.measure`."""
        from whet.runtimes.evidence import gather

        labelled = Batches(data, "data")
        rules = find_target(target or self.target, self.side.FRAMEWORK)
        with tempfile.TemporaryDirectory() as folder:
            path = self.export(Path(folder) / f"model{rules.suffix}", rules)
            timed: dict[str, Any] = {"batches": batches, "threads": threads, "processes": True}
            measured = gather({"model": path}, labelled, as_metric(metric, labelled), progress=progress, **timed)
            return replace(measured["model"].evidence, placement=placement_record(self.plan))

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a folder that `whet.load` reads: JSON and safetensors, no pickle. The round trip is checked."""
        from whet.pipeline.store import save

        return save(self, Path(folder), overwrite=overwrite)


def placement_record(plan: Plan | None) -> dict[str, Any] | None:
    """The `placement` of an Evidence; None for a float file."""
    if plan is None:
        return None
    return {
        "target": plan.target,
        "quantized_weights": len(plan.weights),
        "quantized_values": len(plan.values),
        "integer_biases": len(plan.biases),
    }


def start(model: Any, *, example: Any = None, seed: int = 0, borrow: bool = False) -> Compressed:
    """A Compressed that holds its own copy of `model`, which may be a Compressed too.

    borrow: the copy may share weights with the model until `side.own`, for a removal and nothing else.

    Raises:
        ModelError: the model cannot be compressed, or was quantized before.
    """
    if isinstance(model, Compressed):
        if model.plan is not None:
            raise ModelError(
                "This model is quantized already; what follows would change the weights its scales were solved for. "
                "Put quantize last, or start again from the float model."
            )
        kept = model.example if example is None else example
        copied = (model.side.borrow if borrow else model.side.copy)(model.float_model)
        return Compressed(model.side, copied, kept, None, dict(model.masks), model.steps, seed)
    side = side_of(model)
    side.validate(model)
    copied = (side.borrow if borrow else side.copy)(model)
    return Compressed(side, copied, example, masks=side.adopt(copied), seed=seed)


def plain_model(model: Any) -> Model:
    """The framework model in `model`, which may be a Compressed."""
    return model.model if isinstance(model, Compressed) else model


def as_metric(metric: Any, data: Batches) -> Metric:
    """`metric` as a `Metric`; accuracy or the mean squared error, by the kind of targets, when None."""
    if isinstance(metric, Metric):
        return metric
    if metric is None:
        _, targets = data.first()
        if targets is None:
            raise DataError(f"A metric needs labelled data, and {data.what} has no targets. Give (inputs, targets) batches.")
        return default_metric(primary(targets))
    return Metric(metric)


def outputs_of(side: Side, model: Model, data: Batches) -> Any:
    """The model's outputs over all of `data`, in its own framework."""
    return concatenate([side.predict(model, inputs) for inputs, _ in data])
