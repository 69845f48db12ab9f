"""Schemes: what numbers a tensor may hold, and how finely its scales lie."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

from whet.errors import SpecError
from whet.specs.base import check_integer, check_type, spec


@spec
@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor."""


@spec
@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale for each output channel."""


@spec
@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale for each output channel and each `size` input features in a row; a last group may be shorter."""

    size: int = 128

    def __post_init__(self) -> None:
        check_integer("PerGroup.size", self.size, low=2)


Granularity = PerTensor | PerChannel | PerGroup
GRANULARITIES = (PerTensor, PerChannel, PerGroup)


@spec
@dataclass(frozen=True, slots=True)
class Int:
    """Uniform quantization to integers: `x ≈ scale * (q - zero_point)`.

    Symmetric codes are signed with zero point 0; asymmetric codes are unsigned. `narrow` leaves out the lowest signed
    code, so that the range is symmetric too: the default for symmetric codes of 5 bits and more.
    """

    bits: int = 8
    _: KW_ONLY
    symmetric: bool = True
    granularity: Granularity = field(default_factory=PerChannel)
    narrow: bool | None = None

    def __post_init__(self) -> None:
        check_integer("Int.bits", self.bits, low=2, high=16)
        check_type("Int.symmetric", self.symmetric, bool)
        check_type("Int.granularity", self.granularity, *GRANULARITIES)
        check_type("Int.narrow", self.narrow, bool, None)
        if self.narrow and not self.symmetric:
            raise SpecError("Int.narrow=True needs symmetric=True: unsigned codes have no lowest negative code.")

    @property
    def qmin(self) -> int:
        """The lowest code."""
        if not self.symmetric:
            return 0
        narrow = self.narrow if self.narrow is not None else self.bits >= 5
        return -(1 << (self.bits - 1)) + (1 if narrow else 0)

    @property
    def qmax(self) -> int:
        """The highest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1


FLOAT_DTYPES = ("float16", "bfloat16", "float8_e4m3")


@spec
@dataclass(frozen=True, slots=True)
class Float:
    """A smaller floating-point type: a cast to `"float16"` or `"bfloat16"`, or `"float8_e4m3"` with a scale per channel."""

    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_DTYPES:
            raise SpecError(f"Float.dtype must be one of {', '.join(FLOAT_DTYPES)}, got {self.dtype!r}.")

    @property
    def bits(self) -> int:
        """Bits of one value."""
        return 8 if self.dtype == "float8_e4m3" else 16


@spec
@dataclass(frozen=True, slots=True)
class KMeans:
    """`2 ** bits` levels that minimise the squared error: the optimal one-dimensional clustering (Wang & Song 2011)."""

    bits: int = 4
    _: KW_ONLY
    granularity: Granularity = field(default_factory=PerChannel)

    def __post_init__(self) -> None:
        check_integer("KMeans.bits", self.bits, low=1, high=8)
        check_type("KMeans.granularity", self.granularity, *GRANULARITIES)


@spec
@dataclass(frozen=True, slots=True)
class NF4:
    """16 levels at the quantiles of a normal distribution, times the greatest value (Dettmers et al. 2023, QLoRA)."""

    _: KW_ONLY
    granularity: Granularity = field(default_factory=lambda: PerGroup(64))

    def __post_init__(self) -> None:
        check_type("NF4.granularity", self.granularity, *GRANULARITIES)

    @property
    def bits(self) -> int:
        """Bits of one value."""
        return 4


@spec
@dataclass(frozen=True, slots=True)
class PowerOfTwo:
    """Signed powers of two; with `terms` of 2 and more, sums of that many (additive powers of two, Li et al. 2020)."""

    bits: int = 4
    _: KW_ONLY
    terms: int = 1
    granularity: Granularity = field(default_factory=PerChannel)

    def __post_init__(self) -> None:
        check_integer("PowerOfTwo.bits", self.bits, low=2, high=8)
        check_integer("PowerOfTwo.terms", self.terms, low=1, high=4)
        check_type("PowerOfTwo.granularity", self.granularity, *GRANULARITIES)


@spec
@dataclass(frozen=True, slots=True)
class Piecewise:
    """Two intervals with a step each, finer around zero; the breakpoint minimises the error (Fang et al. 2020, PWLQ)."""

    bits: int = 4
    _: KW_ONLY
    granularity: Granularity = field(default_factory=PerChannel)

    def __post_init__(self) -> None:
        check_integer("Piecewise.bits", self.bits, low=3, high=8)
        check_type("Piecewise.granularity", self.granularity, *GRANULARITIES)


Scheme = Int | Float | KMeans | NF4 | PowerOfTwo | Piecewise  # what the weights of one layer may be stored in
SCHEMES = (Int, Float, KMeans, NF4, PowerOfTwo, Piecewise)


@spec
@dataclass(frozen=True, slots=True)
class Dynamic:
    """Activations quantized at run time, from the range of each tensor as it comes: no calibration.

    The target says how: per tensor and asymmetric on ONNX Runtime, per row on others.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        check_integer("Dynamic.bits", self.bits, low=4, high=8)
