"""Which weights or channels go first: the criteria of importance. The formulas are in `numerics.criteria`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from whet.errors import SpecError
from whet.specs.base import check_integer, check_number, spec


@spec
@dataclass(frozen=True, slots=True)
class Magnitude:
    """The smallest absolute values go first (Han et al. 2015, arXiv:1506.02626). Channels: the smallest Lp norm."""

    _: KW_ONLY
    p: int = 2

    def __post_init__(self) -> None:
        check_integer("Magnitude.p", self.p, low=1, high=2)


@spec
@dataclass(frozen=True, slots=True)
class Random:
    """Drawn by chance: the baseline that every criterion must beat."""

    _: KW_ONLY
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("Random.seed", self.seed, low=0)


@spec
@dataclass(frozen=True, slots=True)
class BatchNormScale:
    """Channels with the smallest batch-norm scale go first (Liu et al. 2017, arXiv:1708.06519)."""


@spec
@dataclass(frozen=True, slots=True)
class GeometricMedian:
    """Filters nearest to all others go first: these can replace them (He et al. 2019, arXiv:1811.00250)."""


@dataclass(frozen=True, slots=True)
class FromData:
    """A criterion that looks at the first `batches` of the data."""

    _: KW_ONLY
    batches: int = 8

    def __post_init__(self) -> None:
        check_integer(f"{type(self).__name__}.batches", self.batches, low=1)


@spec
@dataclass(frozen=True, slots=True)
class Taylor(FromData):
    """`|w · ∂L/∂w|`, the first-order change of the loss (Molchanov et al. 2019, arXiv:1906.10771)."""


@spec
@dataclass(frozen=True, slots=True)
class SNIP(FromData):
    """`|w · ∂L/∂w|` on one batch, meant for models before training (Lee et al. 2019, arXiv:1810.02340, eq. 6).

    The paper ranks all layers together: `allocation=Global()`. Its division by the sum over all weights changes no rank.
    """

    _: KW_ONLY
    batches: int = 1


@spec
@dataclass(frozen=True, slots=True)
class Movement(FromData):
    """`Σ_t w_t · (w_{t+1} - w_t)`: weights that training moves towards zero go first (Sanh et al. 2020, arXiv:2005.07683).

    With plain SGD this is the paper's `-Σ w · ∂L/∂w` (eq. 4) times the learning rate; every optimizer's own steps count. It is
    summed over training, so it needs a schedule that begins to remove after some steps. At once, it is one step of SGD on data.
    """


@spec
@dataclass(frozen=True, slots=True)
class Fisher(FromData):
    """`½ w² E[(∂L/∂w)²]`, the diagonal second-order change of the loss (LeCun et al. 1989, OBD)."""


@spec
@dataclass(frozen=True, slots=True)
class Wanda(FromData):
    """`|w| · ‖x‖₂` with `x` the input that `w` multiplies (Sun et al. 2024, arXiv:2306.11695). Data needs no targets.

    Single weights are compared within the row of one output, as in the paper, unless `allocation=Global()`.
    """


@spec
@dataclass(frozen=True, slots=True)
class Activation(FromData):
    """`‖x‖₂`, the size of what is computed: channels that are nearly silent go first. Data needs no targets.

    A single weight scores as the input that it multiplies.
    """


@dataclass(frozen=True, slots=True)
class Damped(FromData):
    """A criterion that inverts `E[x xᵀ]` of a layer's inputs, with `damping` times its mean diagonal added."""

    _: KW_ONLY
    damping: float = 0.01

    def __post_init__(self) -> None:
        FromData.__post_init__(self)
        check_number(f"{type(self).__name__}.damping", self.damping, low=0, high=10, open_low=True)


@spec
@dataclass(frozen=True, slots=True)
class OBS(Damped):
    """`w² / [H⁻¹]_cc`, the loss of a layer's output when its other weights make up for `w` (Hassibi & Stork 1993).

    `H = 2 E[x xᵀ]` of the layer's inputs. This only ranks; `SparseGPT` also changes the other weights. Data needs no targets.
    """


@spec
@dataclass(frozen=True, slots=True)
class SparseGPT(Damped):
    """Masks by the optimal brain surgeon, row by row, the weights that remain making up for those that go.

    Frantar & Alistarh 2023, arXiv:2301.00774, layer by layer, each on the inputs that it gets in the model pruned so far.
    Data needs no targets. block: columns between two choices of the mask.
    """

    _: KW_ONLY
    block: int = 128

    def __post_init__(self) -> None:
        Damped.__post_init__(self)
        check_integer("SparseGPT.block", self.block, low=1)


@spec
@dataclass(frozen=True, slots=True)
class UserCriterion:
    """`fn(weight, gradient)` returns an importance for each weight, of its shape; `gradient` is None without data."""

    fn: Callable[..., Any]

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise SpecError(f"UserCriterion.fn must be a function of (weight, gradient), got {self.fn!r}.")


Criterion = (
    Magnitude
    | Random
    | BatchNormScale
    | GeometricMedian
    | Taylor
    | SNIP
    | Movement
    | Fisher
    | Wanda
    | Activation
    | OBS
    | SparseGPT
    | UserCriterion
)
FROM_GRADIENTS = (Taylor, SNIP, Movement, Fisher)  # and UserCriterion, where data is given
FROM_INPUTS = (Wanda, Activation, OBS, SparseGPT)
CHANNELS_ONLY = (BatchNormScale, GeometricMedian)
CRITERIA = (Magnitude, Random, *CHANNELS_ONLY, *FROM_GRADIENTS, *FROM_INPUTS, UserCriterion)
