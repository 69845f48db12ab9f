"""How long and how to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from whet.errors import SpecError
from whet.specs.base import check_integer, check_number, check_type, spec
from whet.specs.distillation import Distill
from whet.specs.pruning import Prune

FIND = "find"  # a learning rate that is to be found


@spec
@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """Stop after `patience` epochs without an improvement of more than `min_delta`; the best weights are restored.

    With `relative` an improvement is a change of more than `min_delta · |best|`. In the first `warmup` epochs the best is
    tracked and patience does not count. Training also stops as soon as the value reaches `threshold` (good enough), and as
    soon as it is worse than `divergence` or, where that is given, not finite. What is better, the metric says.

    With a pruning schedule, all of this begins when the schedule is done: a best is never at a lower sparsity.
    """

    _: KW_ONLY
    patience: int = 3
    min_delta: float = 0.0
    relative: bool = False
    warmup: int = 0
    threshold: float | None = None
    divergence: float | None = None

    def __post_init__(self) -> None:
        check_integer("EarlyStopping.patience", self.patience, low=1)
        check_type("EarlyStopping.relative", self.relative, bool)
        check_number("EarlyStopping.min_delta", self.min_delta, low=0, high=1 if self.relative else 1e12)
        check_integer("EarlyStopping.warmup", self.warmup, low=0)
        for name, bound in (("threshold", self.threshold), ("divergence", self.divergence)):
            if bound is not None:
                check_number(f"EarlyStopping.{name}", bound, low=-1e12, high=1e12)


@spec
@dataclass(frozen=True, slots=True)
class GroupLasso:
    """Sparse training: `strength · Σ √|g| ‖w_g‖₂` joins the loss, over the outputs `g` of every weight (Wen et al. 2016,
    arXiv:1608.03665, eq. 1; Yuan & Lin 2006).

    It drives whole channels towards zero, which `Prune(…, granularity=Channel())` then removes at little loss.
    """

    strength: float = 1e-4

    def __post_init__(self) -> None:
        check_number("GroupLasso.strength", self.strength, low=0, high=1e3, open_low=True)


@spec
@dataclass(frozen=True, slots=True)
class Train:
    """Train with Adam (Kingma & Ba 2015), a cosine learning-rate decay unless `decay=None`, and the given techniques.

    `loss(outputs, targets)` returns a scalar in the model's own framework; by default it is cross-entropy on logits for
    integer targets and the mean squared error for floating-point targets.

    accumulate: batches whose mean gradient is one optimizer step; schedules still count batches. clip: the greatest 2-norm of
    all gradients together, to which they are scaled down (Pascanu et al. 2013, arXiv:1211.5063, alg. 1). precision: "bfloat16"
    or "float16" runs the forward pass in it where that is safe (PyTorch's autocast, with a scaled loss for float16); Keras
    models say so themselves, by their dtype policy.

    learning_rate: "find" asks `whet.learning_rate` first. compile: the forward passes of model and teacher by `torch.compile`,
    with the backend of that name, or inductor for True; in Keras True compiles the step by XLA. shard: where processes of
    torch.distributed train together, each keeps a part of the parameters, of the gradients and of Adam's moments (FSDP:
    Rajbhandari et al. 2020, arXiv:1910.02054, section 5.3).
    """

    _: KW_ONLY
    epochs: int = 10
    learning_rate: float | str = 1e-3
    weight_decay: float = 0.0
    decay: str | None = "cosine"
    loss: Callable[..., Any] | None = None
    apply: tuple[Prune | Distill | GroupLasso, ...] = ()
    early_stopping: EarlyStopping | None = None
    accumulate: int = 1
    clip: float | None = None
    precision: str | None = None
    compile: bool | str = False
    shard: bool = False

    def __post_init__(self) -> None:
        check_integer("Train.epochs", self.epochs, low=1)
        check_integer("Train.accumulate", self.accumulate, low=1)
        if self.clip is not None:
            check_number("Train.clip", self.clip, low=0, high=1e12, open_low=True)
        if self.precision not in ("bfloat16", "float16", None):
            raise SpecError(f"Train.precision must be 'bfloat16', 'float16' or None, got {self.precision!r}.")
        if self.learning_rate != FIND:
            check_number("Train.learning_rate", self.learning_rate, low=0, high=1e3, open_low=True, words=f" or {FIND!r}")
        check_type("Train.compile", self.compile, bool, str)
        check_type("Train.shard", self.shard, bool)
        check_number("Train.weight_decay", self.weight_decay, low=0, high=1e3)
        if self.decay not in ("cosine", None):
            raise SpecError(f"Train.decay must be 'cosine' or None, got {self.decay!r}.")
        if self.loss is not None and not callable(self.loss):
            raise SpecError(f"Train.loss must be a function of (outputs, targets), got {self.loss!r}.")
        check_type("Train.early_stopping", self.early_stopping, EarlyStopping, None)
        applied = tuple(self.apply) if isinstance(self.apply, list | tuple) else (self.apply,)
        for item in applied:
            check_type("Train.apply", item, Prune, Distill, GroupLasso)
        for kind in (Prune, Distill, GroupLasso):
            if sum(isinstance(item, kind) for item in applied) > 1:
                raise SpecError(
                    f"Train.apply takes at most one {kind.__name__}, got {sum(isinstance(i, kind) for i in applied)}."
                )
        object.__setattr__(self, "apply", applied)

    @property
    def rate(self) -> float:
        """The learning rate as a number.

        Raises:
            SpecError: it is to be found yet.
        """
        if isinstance(self.learning_rate, str):
            raise SpecError(
                "Train(learning_rate='find') is found by whet.fit, distill, prune and compress; here give a number, such as "
                "whet.learning_rate(model, train=…).suggestion."
            )
        return self.learning_rate

    @property
    def prune(self) -> Prune | None:
        """The pruning applied while training, if any."""
        return next((item for item in self.apply if isinstance(item, Prune)), None)

    @property
    def distill(self) -> Distill | None:
        """The distillation applied while training, if any."""
        return next((item for item in self.apply if isinstance(item, Distill)), None)

    @property
    def group_lasso(self) -> GroupLasso | None:
        """The group lasso that joins the loss, if any."""
        return next((item for item in self.apply if isinstance(item, GroupLasso)), None)
