"""Early stopping in a training loop that is the user's own: what is best, kept, and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from whet.errors import MetricError
from whet.numerics.stopping import Decision, StoppingState, update
from whet.specs.training import EarlyStopping


class Watch:
    """The values of one metric, epoch by epoch; keeps a copy of the weights of the best.

    monitor: the metric's name in what the user's loop tells. Nothing is best, and no patience begins, while a pruning ramp
    rises or quantizers still observe ranges.
    """

    def __init__(self, spec: EarlyStopping, monitor: str, higher_is_better: bool) -> None:
        self._spec, self._monitor, self._higher = spec, monitor, higher_is_better
        self.state = StoppingState()
        self.best: Any = None  # a snapshot

    def see(self, told: Mapping[str, Any], eligible: bool, snapshot: Callable[[], Any]) -> Decision:
        """One epoch has ended; `snapshot` copies the weights if it was the best so far.

        Raises:
            MetricError: the metric is not among what was told.
        """
        if self._monitor not in told:
            raise MetricError(
                f"monitor={self._monitor!r} is not among what this training tells: {', '.join(sorted(told)) or 'nothing'}."
            )
        value = float(told[self._monitor])
        self.state, decision = update(self.state, value, self._spec, higher_is_better=self._higher, eligible=eligible)
        if decision.is_best:
            self.best = snapshot()
        return decision

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs."""
        return {"stopping": asdict(self.state), "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.state, self.best = StoppingState(**state["stopping"]), state["best"]
