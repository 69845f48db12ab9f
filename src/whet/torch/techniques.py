"""Techniques inside a training that is not ours: pruning, a teacher and early stopping in Lightning and in Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from whet.errors import ModelError, SpecError
from whet.graph.teacher_store import StoredOutputs
from whet.graph.views import Masks
from whet.graph.watching import Watch
from whet.numerics.stopping import Decision
from whet.specs import Distill, EarlyStopping, Prune, Train
from whet.specs.training import GroupLasso
from whet.torch.distill import Teacher, teaching
from whet.torch.interception import interceptor_of
from whet.torch.learner import Learner
from whet.torch.model import device_of, to_numpy
from whet.torch.prune import Masker, Pruner, inside
from whet.torch.regularizers import group_lasso


class Techniques:
    """What `apply` asks for, in a loop that is not ours, on `network`, which is trained in place.

    The loop calls `step()` after every optimizer step, `see()` with its metrics, `end()` at the end and `close()` in any case.
    What the network is called with in training mode is seen by hooks; `loss` is then what its own loss becomes.
    """

    def __init__(
        self,
        network: Any,
        apply: Iterable[Prune | Distill | GroupLasso] = (),
        *,
        steps: float,
        teacher: Any = None,
        masks: Masks | None = None,
        data: Any = None,
        watch: Watch | None = None,
        labels: Callable[[Mapping[str, Any]], Any] = lambda keywords: None,
    ) -> None:
        """steps: all optimizer steps, on which a schedule is laid. data: batches for criteria that look at some.

        labels: the targets among the keyword arguments of a call, which the teacher is not given; of others set `targets`.

        Raises:
            SpecError: the schedule does not fit, or the number of steps is not known.
            ModelError: nothing to prune, or a teacher that cannot teach.
        """
        self.network, self._spec, self._watch, self._labels = inside(network), Train(apply=tuple(apply)), watch, labels
        if self._spec.prune is not None and steps in (float("inf"), -1):
            raise SpecError("The number of training steps is not known, so no pruning schedule fits: pass steps=.")
        self._settled = _observed(self.network)
        self.targets: Any = None  # of the batch that is under way
        self._steps_done, self._is_heard = 0, False
        self._call: tuple[Any, Any] | None = None  # inputs and outputs of the last forward pass
        self._optimizer: Any = None  # of the maps that losses on layers train
        self._saved: Mapping[str, Any] | None = None
        self._is_begun = False
        self._stack = ExitStack()
        spec = self._spec
        self.pruner = None if spec.prune is None else Pruner(self.network, spec.prune, int(steps), masks=masks, data=data)
        self._masker = Masker(self.network, None, masks or {}) if spec.prune is None else None
        given = tuple(
            getattr(one, "float_model", one) for one in (teacher if isinstance(teacher, tuple | list) else (teacher,))
        )
        self._stored = any(isinstance(one, StoredOutputs) for one in given)
        self._tutor: Teacher | None = self._stack.enter_context(
            teaching(spec.distill, given, self.network, device_of(self.network))
        )
        if self._tutor is not None:
            before = self.network.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
            after = self.network.register_forward_hook(self._after, with_kwargs=True)
            self._stack.callback(before.remove)
            self._stack.callback(after.remove)

    # ------------------------------------------------------------------ the loss

    def loss(self, own: Any, scale: float = 1.0) -> Any:
        """`student_weight · own + (1 - student_weight) · scale · distillation` of the last forward pass, and the group lasso.

        `scale` is what a mean over this batch counts in the loop's step.

        Raises:
            ModelError: the network was not called since the loss was asked for last.
        """
        spec = self._spec
        if spec.distill is not None and self._tutor is not None:
            if self._call is None:
                raise ModelError(
                    f"The {type(self.network).__name__} that is to learn from the teacher was not called in this training "
                    "step. Name the network that is, by network=."
                )
            (inputs, outputs), self._call = self._call, None
            taught = scale * self._tutor.loss(outputs, inputs, self.targets)
            if taught.requires_grad and not self._is_heard:
                taught.register_hook(self._heard)
            own = spec.distill.student_weight * own + (1 - spec.distill.student_weight) * taught
        if spec.group_lasso is not None:
            own = own + scale * group_lasso(self.network, spec.group_lasso.strength)
        return own

    def _heard(self, gradient: Any) -> None:
        self._is_heard = True

    def _before(self, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first pass the teacher and the losses look at its batch."""
        if self._is_begun or not self._is_training() or self._tutor is None:
            return
        self._is_begun = True
        inputs = self._inputs(args, kwargs)
        self._tutor.begin(network, inputs, self.targets)
        groups = self._tutor.groups(1.0)
        if groups:
            self._agree(self._maps(groups), torch.distributed.broadcast, src=0)
            self._optimizer = torch.optim.AdamW([{**group, "lr": group["relative"]} for group in groups])
        if self._saved is not None:
            self._tutor.load(self._saved["maps"])
            if self._optimizer is not None and self._saved["optimizer"] is not None:
                self._optimizer.load_state_dict(self._saved["optimizer"])

    def _after(self, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        if self._is_training():
            self._call = self._inputs(args, kwargs), outputs

    def _is_training(self) -> bool:
        return bool(self.network.training) and torch.is_grad_enabled()

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the teacher is called with: as the network was, without labels. Sets the targets where they are among them."""
        if not kwargs:
            inputs: Any = args[0] if len(args) == 1 else args
        else:
            named = dict(inspect.signature(self.network.forward).bind_partial(*args).arguments) | kwargs if args else kwargs
            labels = self._labels(named)
            self.targets = self.targets if labels is None else labels
            inputs = {name: item for name, item in named.items() if name not in NOT_INPUTS}
            inputs = {name: to_numpy(item) if name.endswith("_mask") else item for name, item in inputs.items()}
        return to_numpy(inputs) if self._stored else inputs

    # ------------------------------------------------------------------ steps and epochs

    def step(self) -> None:
        """An optimizer step was taken, and gradients are still there: hold the masks, renew them, train the losses' maps.

        Raises:
            ModelError: the teacher's loss is not what was trained with.
        """
        self._steps_done += 1
        if self._tutor is not None and not self._is_heard:
            raise ModelError(
                "A step was taken and nothing of the teacher's loss was in it: this loop computes its loss elsewhere (manual "
                "optimization, label smoothing, a loss function of its own), or not from this network. Add "
                "whet.torch.distillation_loss(…) to that loss, or use whet.distill."
            )
        if self.pruner is not None:
            self.pruner.step()
        elif self._masker is not None:
            self._masker.hold()
        if self._optimizer is not None:
            gradients = [map_.grad for map_ in self._maps(self._optimizer.param_groups) if map_.grad is not None]
            self._agree(gradients, torch.distributed.all_reduce)
            if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):  # scaled losses overflow
                self._optimizer.step()
            self._optimizer.zero_grad()

    @staticmethod
    def _maps(groups: Iterable[Mapping[str, Any]]) -> list[Any]:
        return [parameter for group in groups for parameter in group["params"]]

    @staticmethod
    def _agree(tensors: list[Any], collective: Any, **options: Any) -> None:
        """Processes that train together have the first one's maps; a common factor of gradients does not matter to Adam."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for tensor in tensors:
                collective(tensor.data, **options)

    @property
    def is_done(self) -> bool:
        """Whether the final sparsity is in force and no quantizer observes ranges any more: only then compare epochs."""
        return self._steps_done >= self._settled and (self.pruner is None or self.pruner.is_done)

    @property
    def sparsity(self) -> float:
        """The fraction removed now, of the weights that are pruned."""
        return 0.0 if self.pruner is None else self.pruner.sparsity

    @property
    def masks(self) -> Masks:
        """The masks by parameter name of the network: 1 where kept."""
        holder = self.pruner or self._masker
        return {} if holder is None else holder.masks if isinstance(holder, Pruner) else holder.masks()

    def see(self, told: Mapping[str, Any]) -> Decision:
        """An epoch has ended with these metrics."""
        if self._watch is None:
            return Decision(False, False, "")
        return self._watch.see(told, self.is_done, self._snapshot)

    def _snapshot(self) -> dict[str, Any]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.network.state_dict().items()}

    def end(self) -> None:
        """Training has ended: the best weights come back, and what is removed is zero."""
        if self._watch is not None and self._watch.best is not None:
            self.network.load_state_dict(self._watch.best)
        for holder in (self.pruner, self._masker):
            if holder is not None:
                holder.hold()
        self.close()

    def close(self) -> None:
        """Take all hooks away."""
        self._stack.close()

    # ------------------------------------------------------------------ to go on later

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, in plain values and tensors (`torch.load` with `weights_only`)."""
        return {
            "steps": self._steps_done,
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
            "maps": {} if self._tutor is None else {name: map_.detach().clone() for name, map_ in self._tutor.state().items()},
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "watch": None if self._watch is None else self._watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; the loop loads the network and its own optimizer."""
        self._steps_done, self._saved = int(state["steps"]), state
        if self.pruner is not None and state["pruner"] is not None:
            self.pruner.load_state_dict(state["pruner"])
        if self._watch is not None and state["watch"] is not None:
            self._watch.load_state_dict(state["watch"])


NOT_INPUTS = frozenset({"labels", "label", "label_ids", "num_items_in_batch"})


def watch_for(spec: EarlyStopping | None, monitor: str, higher_is_better: bool) -> Watch | None:
    """The watch of a callback; None where nothing stops early."""
    return None if spec is None else Watch(spec, monitor, higher_is_better)


def _observed(network: Any) -> int:
    """For how many steps a prepared network observes ranges."""
    found = interceptor_of(network)
    return max((state.observe for state in found.states.values()), default=0) if isinstance(found, Learner) else 0


class Around:
    """What the callbacks for others' trainers have in common: the `Techniques` that run inside, once training has begun."""

    _techniques: Techniques | None = None

    def _running(self) -> Techniques:
        if self._techniques is None:
            raise SpecError(f"{type(self).__name__} has nothing to tell before training has begun.")
        return self._techniques

    @property
    def masks(self) -> Masks:
        """The masks by the network's parameter names: 1 where kept."""
        return {} if self._techniques is None else self._techniques.masks

    @property
    def sparsity(self) -> float:
        """The fraction removed now, of the weights that are pruned."""
        return 0.0 if self._techniques is None else self._techniques.sparsity

    @property
    def is_done(self) -> bool:
        """Whether the final sparsity is in force and ranges are observed: only then compare epochs."""
        return self._techniques is not None and self._techniques.is_done
