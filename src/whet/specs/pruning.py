"""What to prune, chosen how, and when. Sparsity is the fraction removed."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

from whet.errors import SpecError
from whet.specs.base import check_integer, check_number, check_type, name_patterns, spec


@spec
@dataclass(frozen=True, slots=True)
class Weight:
    """Single weights are removed (unstructured)."""


@spec
@dataclass(frozen=True, slots=True)
class Magnitude:
    """The smallest absolute values go first (Han et al. 2015, arXiv:1506.02626)."""


@spec
@dataclass(frozen=True, slots=True)
class Uniform:
    """Every layer loses the same fraction."""


@spec
@dataclass(frozen=True, slots=True)
class Global:
    """All layers are ranked together: some lose more than others."""


@spec
@dataclass(frozen=True, slots=True)
class OneShot:
    """The whole sparsity at once, before the first training step."""


@spec
@dataclass(frozen=True, slots=True)
class Cubic:
    """`s(t) = s_f + (s_i - s_f) * (1 - t)^3` for `t` from 0 to 1 (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1).

    `begin` and `end` are fractions of the training steps; the masks are renewed every `frequency` steps and at the end
    of the ramp, then stay.
    """

    _: KW_ONLY
    initial: float = 0.0
    begin: float = 0.0
    end: float = 0.6
    frequency: int = 10

    def __post_init__(self) -> None:
        check_number("Cubic.initial", self.initial, low=0, high=1, open_high=True)
        check_number("Cubic.begin", self.begin, low=0, high=1, open_high=True)
        check_number("Cubic.end", self.end, low=0, high=1, open_low=True)
        check_integer("Cubic.frequency", self.frequency, low=1)
        if self.end <= self.begin:
            raise SpecError(f"Cubic.end must be greater than begin={self.begin:g}, got {self.end:g}.")


@spec
@dataclass(frozen=True, slots=True)
class Prune:
    """Set the least important weights to zero, and keep them there."""

    sparsity: float
    _: KW_ONLY
    granularity: Weight = field(default_factory=Weight)
    criterion: Magnitude = field(default_factory=Magnitude)
    allocation: Uniform | Global = field(default_factory=Uniform)
    schedule: OneShot | Cubic = field(default_factory=OneShot)
    keep: tuple[str, ...] = ()
    include: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_number("Prune.sparsity", self.sparsity, low=0, high=1, open_high=True)
        check_type("Prune.granularity", self.granularity, Weight)
        check_type("Prune.criterion", self.criterion, Magnitude)
        check_type("Prune.allocation", self.allocation, Uniform, Global)
        check_type("Prune.schedule", self.schedule, OneShot, Cubic)
        object.__setattr__(self, "keep", name_patterns("Prune.keep", self.keep))
        if self.include is not None:
            object.__setattr__(self, "include", name_patterns("Prune.include", self.include))
        if isinstance(self.schedule, Cubic) and self.schedule.initial > self.sparsity:
            raise SpecError(f"Cubic.initial must be at most sparsity={self.sparsity:g}, got {self.schedule.initial:g}.")
