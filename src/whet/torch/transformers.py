"""Pruning, distillation and early stopping inside the user's own Hugging Face `Trainer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from whet.errors import ModelError, SpecError, require
from whet.graph.views import Masks
from whet.specs import Distill, EarlyStopping, Prune, Train
from whet.specs.training import GroupLasso
from whet.torch.distill import IGNORED
from whet.torch.prune import inside
from whet.torch.techniques import Around, Techniques, watch_for

_transformers: Any = require("transformers", "transformers", "whet.torch.transformers")
STATE_FILE = "whet.pt"


class WhetCallback(Around, _transformers.TrainerCallback):  # type: ignore[misc]
    """Prune, distill and stop while a Hugging Face `Trainer` trains a model that returns its loss.

    ```python
    callback = WhetCallback([Prune(0.8, schedule=Cubic()), Distill([SoftTargets(2.0)])], teacher=teacher)
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    prepared = whet.torch.prepare(model, Quantize(qat=QAT()), calibration=batches, masks=callback.masks)
    ```
    A forward pass in training mode with labels returns `student_weight` times the model's own loss and the teacher's in the
    place of its loss, until training ends. Schedules count optimizer steps. For quantization-aware training give Trainer
    a model that `whet.torch.prepare` made, and `whet.finish` it afterwards.

    With `early_stopping`, `monitor` is watched in every evaluation; neither the best nor patience counts before the ramp is
    done and ranges are observed, and the best weights come back at the end (`load_best_model_at_end` knows nothing of
    ramps: leave it off). Every checkpoint of the Trainer gets a file `whet.pt`, which `resume_from_checkpoint` in
    `output_dir` finds.
    """

    def __init__(
        self,
        apply: Iterable[Prune | Distill | GroupLasso] = (),
        *,
        teacher: Any = None,
        masks: Masks | None = None,
        data: Any = None,
        early_stopping: EarlyStopping | None = None,
        monitor: str = "eval_loss",
        higher_is_better: bool = False,
    ) -> None:
        """masks: from before, held. data: batches for criteria that look at some.

        Raises:
            SpecError: a technique given twice.
        """
        Train(apply=tuple(apply), early_stopping=early_stopping)
        self._apply = tuple(apply)
        self._given: dict[str, Any] = {"teacher": teacher, "masks": masks, "data": data}
        self._early, self._monitor, self._higher = early_stopping, monitor, higher_is_better
        self._hook: Any = None
        self._is_causal = False
        self._state: Mapping[str, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Lay the schedule on all steps of the Trainer, and let the teacher into the loss.

        Raises:
            SpecError: label smoothing, or a training that is resumed without its state.
            ModelError: nothing to prune, or a teacher that cannot teach.
        """
        if args.label_smoothing_factor and any(isinstance(item, Distill | GroupLasso) for item in self._apply):
            raise SpecError("With label_smoothing_factor the Trainer passes over the model's loss, and so over the teacher's.")
        self.close()
        network = inside(model)
        self._is_causal = _predicts_next(network)
        self._techniques = Techniques(
            network,
            self._apply,
            steps=state.max_steps,
            watch=watch_for(self._early, self._monitor, self._higher),
            labels=self._labels,
            **self._given,
        )
        self._resume(args, state)
        if any(isinstance(item, Distill | GroupLasso) for item in self._apply):
            self._hook = network.register_forward_hook(self._joined, with_kwargs=True)

    def _resume(self, args: Any, state: Any) -> None:
        file = _file(args, state)
        if self._state is None and state.global_step and file.exists():
            self._state = torch.load(file, map_location="cpu", weights_only=True)
        if self._state is not None:
            self._running().load_state_dict(self._state)
            self._state = None
        elif state.global_step and self._apply:
            raise SpecError(
                f"Training goes on at step {state.global_step}, and there is no {file} to go on from. Where the checkpoint is "
                f"elsewhere, call load_state_dict(torch.load('…/{STATE_FILE}')) before train()."
            )

    def _labels(self, named: Mapping[str, Any]) -> Any:
        """The targets of the rows of the logits: of causal models the next token's."""
        labels = named.get("labels", named.get("label"))
        if labels is None or not self._is_causal:
            return labels
        return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def _joined(self, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        """The outputs with the joint loss in the place of the model's own."""
        if not (network.training and torch.is_grad_enabled()) or self._techniques is None:
            return None
        found = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if found is None:
            raise ModelError(
                f"{type(network).__name__} returned no loss to join the teacher's to. Give its batches labels, and leave "
                "return_dict on."
            )
        scale, labels, items = 1.0, self._techniques.targets, kwargs.get("num_items_in_batch")
        if items is not None and labels is not None:  # the model's loss is a sum over this batch by the items of the step
            scale = float((labels != IGNORED).sum()) / float(items)
        outputs["loss"] = self._techniques.loss(found, scale)
        return outputs

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After an optimizer step: hold the masks, and renew them where the schedule says so."""
        self._running().step()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Decide whether to go on."""
        if self._early is not None and self._techniques is not None and self._running().see(metrics or {}).stop:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state beside the Trainer's checkpoint."""
        if state.is_world_process_zero:
            torch.save(self.state_dict(), _file(args, state))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the best weights back, and leave the model as it was."""
        self._running().end()
        self.close()

    def close(self) -> None:
        """Leave the model as it was; only after a training that an error ended is it yours to call."""
        if self._techniques is not None:
            self._techniques.close()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict[str, Any]:
        """What goes into `whet.pt`."""
        return self._running().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next `train` goes on from here."""
        self._state = state


def _predicts_next(network: Any) -> bool:
    """Whether the loss inside `network` compares the logits of a token with the next one."""
    is_causal = getattr(network, "loss_type", None) == "ForCausalLM" or "LMHead" in type(network).__name__
    return is_causal and not getattr(getattr(network, "config", None), "is_encoder_decoder", False)


def _file(args: Any, state: Any) -> Path:
    """Where the state of a checkpoint is."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
