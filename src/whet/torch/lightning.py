"""Pruning, distillation and early stopping inside the user's own `lightning.Trainer`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from whet.data import split
from whet.errors import ModelError, require
from whet.graph.views import Masks
from whet.specs import Distill, EarlyStopping, Prune, Train
from whet.specs.training import GroupLasso
from whet.torch.techniques import Around, Techniques, watch_for

_pytorch: Any = require("lightning.pytorch", "lightning", "whet.torch.lightning")


class WhetCallback(Around, _pytorch.Callback):  # type: ignore[misc]
    """Prune, distill and stop while `lightning.Trainer` trains a LightningModule that was not written for it.

    ```python
    callback = WhetCallback([Prune(0.8, schedule=Cubic()), Distill([SoftTargets(4.0)])], teacher=teacher)
    lightning.Trainer(max_epochs=10, callbacks=[callback]).fit(module, loader)
    prepared = whet.torch.prepare(module.network, Quantize(qat=QAT()), calibration=x, masks=callback.masks)
    ```
    The loss of `training_step` becomes `student_weight` times itself and the teacher's; what the network is called with is
    seen by hooks. Schedules count optimizer steps, so gradient accumulation, clipping, precision and DDP are the Trainer's.
    For quantization-aware training give the module a network that `whet.torch.prepare` made, and `whet.finish` it afterwards.

    With `early_stopping` neither the best nor patience counts before the ramp is done and ranges are observed, and the best
    weights come back at the end; Lightning's own EarlyStopping knows nothing of ramps. State goes into Lightning's checkpoints.
    """

    def __init__(
        self,
        apply: Iterable[Prune | Distill | GroupLasso] = (),
        *,
        network: str | None = None,
        teacher: Any = None,
        masks: Masks | None = None,
        data: Any = None,
        targets: Callable[[Any], Any] | None = None,
        steps: int | None = None,
        early_stopping: EarlyStopping | None = None,
        monitor: str = "val_loss",
        higher_is_better: bool = False,
    ) -> None:
        """network: the attribute of the LightningModule that is pruned and taught; needed where several hold parameters.

        masks: from before, held. data: batches for criteria that look at some. targets: of a batch of the Trainer, for losses
        that read labels; by default the second of a pair, and "labels" of a dict. steps: all optimizer steps, where the Trainer
        cannot tell. monitor: the logged metric that early stopping watches.

        Raises:
            SpecError: a technique given twice.
        """
        super().__init__()
        Train(apply=tuple(apply), early_stopping=early_stopping)
        self._apply, self._network, self._targets, self._steps = tuple(apply), network, targets, steps
        self._given: dict[str, Any] = {"teacher": teacher, "masks": masks, "data": data}
        self._early, self._monitor, self._higher = early_stopping, monitor, higher_is_better
        self._state: Mapping[str, Any] | None = None
        self._seen_step = 0
        self._undo: Callable[[], None] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the network.

        Raises:
            ModelError: the module has several, or none of that name.
        """
        if stage == "fit":
            self._find(pl_module)

    def _find(self, module: Any) -> Any:
        own = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
        name = self._network if self._network is not None else next(iter(own), "")
        if name not in own or (self._network is None and len(own) > 1):
            raise ModelError(
                f"{type(module).__name__} holds parameters in {', '.join(map(repr, own)) or 'no submodule'}: say which is to "
                f"be compressed with WhetCallback(network=…)" + (f", not {self._network!r}." if self._network else ".")
            )
        return own[name]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lay the schedule on all steps of the Trainer, and let the teacher into the loss.

        Raises:
            SpecError: the number of steps is unknown or too small for the schedule.
            ModelError: nothing to prune, or a teacher that cannot teach.
        """
        steps = self._steps if self._steps is not None else trainer.estimated_stepping_batches
        watch = watch_for(self._early, self._monitor, self._higher)
        self._close()
        self._techniques = Techniques(self._find(pl_module), self._apply, steps=steps, watch=watch, **self._given)
        if self._state is not None:
            self._techniques.load_state_dict(self._state)
            self._state = None
        self._seen_step = trainer.global_step
        if any(isinstance(item, Distill | GroupLasso) for item in self._apply):
            self._enter(pl_module)

    def _enter(self, module: Any) -> None:
        """*In place*: `training_step` returns the joint loss, until `_close`."""
        own, before = module.training_step, vars(module).get("training_step")

        @functools.wraps(own)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            found = self._running()
            found.targets = self._targets(batch) if self._targets is not None else _labels(batch)
            result = own(batch, *args, **kwargs)
            if isinstance(result, Mapping):
                return {**result, "loss": found.loss(result["loss"])}
            return result if result is None else found.loss(result)

        module.training_step = training_step

        def undo() -> None:
            if before is None:
                del module.training_step
            else:
                module.training_step = before

        self._undo = undo

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an optimizer step: hold the masks, and renew them where the schedule says so."""
        if trainer.global_step > self._seen_step:
            self._seen_step = trainer.global_step
            self._running().step()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Decide whether to go on."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._see(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Decide whether to go on, where nothing is validated."""
        if not trainer.enable_validation:
            self._see(trainer)

    def _see(self, trainer: Any) -> None:
        if self._early is not None:
            decision = self._running().see(trainer.callback_metrics)
            if trainer.strategy.reduce_boolean_decision(decision.stop, all=False):
                trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the best weights back, and leave the module as it was."""
        self._running().end()
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        self._close()

    def _close(self) -> None:
        if self._techniques is not None:
            self._techniques.close()
        if self._undo is not None:
            self._undo()
            self._undo = None

    def state_dict(self) -> dict[str, Any]:
        """What Lightning writes into its checkpoints."""
        return {} if self._techniques is None else self._techniques.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next `fit` goes on from here."""
        self._state = state_dict or None


def _labels(batch: Any) -> Any:
    """The targets of a batch as Lightning hands it over; None where its form does not say."""
    if isinstance(batch, Mapping) or (isinstance(batch, tuple | list) and len(batch) == 2):
        found = split(batch)[1]
        return found if isinstance(found, torch.Tensor) else None
    return None
