"""A pruning schedule in the user's own training loop, for both sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from whet.data import Batches
from whet.errors import SpecError
from whet.graph.masking import Masker
from whet.graph.views import Masks
from whet.numerics.schedules import Ramp, lay
from whet.specs import Prune, from_dict, to_dict
from whet.specs.base import check_integer


class ScheduledPruner:
    """A schedule laid on the user's own loop: the masks are renewed where it says so and held after every step."""

    _masker_class: ClassVar[type[Masker]]

    def __init__(
        self, model: Any, spec: Prune, steps: int, *, masks: Masks | None = None, data: Any = None, optimizer: Any = None
    ) -> None:
        """`steps` is the number of training steps that the schedule is laid on; `masks` are those from before.

        data: batches for criteria that look at some; they look anew whenever masks are renewed. optimizer: the one that trains
        the model, whose moments of weights that `RigL` grows become zero.

        Raises:
            SpecError: the schedule does not fit into `steps`.
            ModelError: nothing would change.
        """
        check_integer("Pruner.steps", steps, low=1)
        self._spec, self._steps = spec, steps
        self._ramp: Ramp = lay(spec, steps)
        self._masker = self._masker_class(model, spec, masks or {}, None if data is None else Batches(data, "data"))
        self._masker.optimizer = optimizer
        self._step = 0
        self._masker.follow(self._ramp, self._step)

    def step(self) -> None:
        """One training step was taken: hold the masks, and renew them where the schedule says so."""
        self._step += 1
        self._masker.observe()
        self._masker.hold()
        self._masker.follow(self._ramp, self._step)

    def hold(self) -> None:
        """Set removed weights to zero, as after weights were loaded."""
        self._masker.hold()

    @property
    def sparsity(self) -> float:
        """The fraction removed now, of the weights that are pruned."""
        return self._masker.sparsity

    @property
    def is_done(self) -> bool:
        """Whether the final sparsity is in force: only then compare epochs, or begin early stopping's patience."""
        return self._ramp.is_done(self._step)

    @property
    def masks(self) -> Masks:
        """The masks by weight name: 1 where kept."""
        return self._masker.masks()

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on, in plain values and NumPy arrays."""
        return {"spec": to_dict(self._spec), "steps": self._steps, "step": self._step, **self._masker.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; the model's own weights are loaded by you, before or after.

        Raises:
            SpecError: `state` belongs to another spec or number of steps.
            ModelError: its masks do not fit this model.
        """
        if from_dict(state["spec"]) != self._spec or state["steps"] != self._steps:
            raise SpecError(
                f"This state belongs to {from_dict(state['spec'])} over {state['steps']} steps, "
                f"but the Pruner was made with {self._spec} over {self._steps}. Make it with the same."
            )
        self._masker.restore(state)
        self._step = int(state["step"])
