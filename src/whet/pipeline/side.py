"""What the pipeline asks of a framework side: `whet.torch` and `whet.keras` are two modules with these functions.

Both are plain modules; this protocol is how the type checker holds them to the same verbs. Models are the user's own
objects. Functions marked *in place* are only ever given Whet's own copy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from whet.data import Batches
from whet.errors import ModelError, require
from whet.graph.epochs import TrainingRun
from whet.graph.groups import Groups
from whet.graph.placement import Plan
from whet.graph.removable import Removable, TimedLayer
from whet.graph.shortcuts import Blocks
from whet.graph.summary import Summary
from whet.graph.variants import Variants
from whet.graph.views import Masks
from whet.records import Step
from whet.specs import Prune, Quantize, Target, Train

Model = Any


class Side(Protocol):
    """The functions of `whet.torch` and `whet.keras` that the verbs are made of."""

    FRAMEWORK: str

    def validate(self, model: Model) -> None:
        """Raise `ModelError` for NaN or Inf weights (naming tensor and index), no weights, or an already quantized model."""

    def copy(self, model: Model) -> Model:
        """An independent copy: training it never changes the original."""

    def borrow(self, model: Model) -> Model:
        """What `remove` may be given in place of a copy. It may share weights with `model`, which stay as they are."""

    def own(self, model: Model, lender: Model) -> None:
        """*In place*: give `model`, which was removed from what `lender` lent, memory of its own."""

    def adopt(self, model: Model) -> Masks:
        """*In place*: make masks that another tool has put on `model` ours, and give them; none where there are none."""

    def predict(self, model: Model, inputs: Any) -> Any:
        """Outputs in inference mode as NumPy arrays in the model's own structure; `inputs` as `Batches` yields them."""

    def prune(self, model: Model, spec: Prune, *, masks: Masks, data: Batches | None = None) -> tuple[Masks, Step]:
        """*In place*: zero the least important weights. Weights masked before stay masked and count as removed."""

    def remove(
        self,
        model: Model,
        spec: Prune,
        *,
        example: Any,
        masks: Masks,
        data: Batches | None = None,
        progress: bool = False,
    ) -> tuple[Model, Masks, Step]:
        """*In place* where it can be: remove channels or heads. The smaller model, masks without them, and what was done."""

    def removable(self, model: Model, spec: Prune, *, example: Any, data: Batches | None) -> Removable:
        """The families of `model` that may lose groups, with their scores; `model` is unchanged."""

    def kept(self, model: Model) -> AbstractContextManager[None]:
        """*In place*: all weights of `model` have the same values after the block as before it."""

    def timed_layers(self, model: Model, example: Any) -> Sequence[TimedLayer]:
        """The layers with weights that can be built alone at any width."""

    def blocks(self, model: Model, example: Any) -> Blocks:
        """The whole layers of `model` that can leave."""

    def groups(self, model: Model, example: Any) -> Groups:
        """What leaves the model together, what it holds and costs, and what stays and why."""

    def train(self, model: Model, spec: Train, run: TrainingRun) -> tuple[Masks, Step]:
        """*In place*: train with the techniques in `spec.apply`, masks held after every step, best weights restored."""

    def search_rates(self, model: Model, spec: Train, run: TrainingRun, rates: Sequence[float]) -> list[float]:
        """The loss of a step of `spec` at each of `rates` until it diverges; `model` is afterwards as it was."""

    def quantize(
        self, model: Model, spec: Quantize, target: Target, *, calibration: Batches | None, example: Any, progress: bool
    ) -> tuple[Plan, Step]:
        """Trace, calibrate, place and solve. `model` is untouched; `example` is a batch's inputs to trace with."""

    def quantize_aware(self, model: Model, spec: Quantize, plan: Plan, fit: Train, run: TrainingRun) -> tuple[Plan, Step]:
        """*In place*: train `model` from `plan` on as `fit` says, masks held; the plan with the trained scales."""

    def finish(self, prepared: Model) -> tuple[Model, Plan]:
        """The float model and the plan of a model that the side's `prepare` made and the user trained."""

    def simulate(self, model: Model, plan: Plan) -> Model:
        """A copy of `model` that computes, in float, what the target's integers will: batch norm folded as planned."""

    def variants(self, model: Model, plan: Plan, example: Any) -> Variants:
        """A copy of `model` that computes any part of `plan`, one after another."""

    def convert(self, model: Model, plan: Plan) -> Model:
        """A copy of the float `model` that stores integer weights and int32 biases, with no weight quantization left."""

    def export(self, model: Model, plan: Plan | None, target: Target, path: Path, *, example: Any, dynamic: Any = None) -> None:
        """Write the file of `target` at `path` (which does not exist): float without a plan, else through `convert`."""

    def save_model(self, model: Model, folder: Path) -> dict[str, Any]:
        """Write the float model's weights into `folder`, without pickle. The result is kept in whet.json for `load_model`."""

    def load_model(self, folder: Path, kept: dict[str, Any], model: Any) -> Model:
        """The float model that `save_model` wrote; `model` is an instance or a callable that builds the original."""

    def inspect(self, model: Model, example: Any) -> Summary:
        """Layers, shapes, parameters, MACs and bytes."""


def side_of(model: Model) -> Side:
    """The side that `model` belongs to, found without importing a framework that is not in use.

    Raises:
        ModelError: neither a torch.nn.Module nor a keras.Model (tf_keras models are named as such).
        MissingExtraError: the framework's extra is not installed.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module) and not _is_keras(model):
        return side_named("torch")
    if _is_keras(model):
        return side_named("keras")
    module = type(model).__module__
    if module.split(".")[0] == "tf_keras" or module.startswith("tensorflow.python.keras"):
        raise ModelError(
            f"This is a Keras 2 model of the package tf_keras ({module}.{type(model).__name__}); Whet takes models of the "
            "package keras, version 3. Save it with model.save('model.keras') and load it with keras.models.load_model, "
            "or rebuild it with `import keras`."
        )
    raise ModelError(f"model must be a torch.nn.Module or a keras.Model, got a {module}.{type(model).__name__}.")


def side_named(framework: str) -> Side:
    """`whet.torch` or `whet.keras`."""
    side: Any = require(f"whet.{framework}", framework, f"Working with {framework} models")
    return side  # type: ignore[no-any-return]


def _is_keras(model: Model) -> bool:
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(model, keras.Model)
