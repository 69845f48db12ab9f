"""What to quantize, and how finely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field

from whet.errors import SpecError
from whet.specs.base import MAPPING, check_integer, check_type, name_patterns, spec


@spec
@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor."""


@spec
@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale for each output channel."""


Granularity = PerTensor | PerChannel


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
        check_type("Int.granularity", self.granularity, PerTensor, PerChannel)
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


FLOAT_DTYPES = ("float16", "bfloat16")


@spec
@dataclass(frozen=True, slots=True)
class Float:
    """A cast to a smaller floating-point type: `"float16"` or `"bfloat16"`."""

    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_DTYPES:
            raise SpecError(f"Float.dtype must be one of {', '.join(FLOAT_DTYPES)}, got {self.dtype!r}.")


@spec
@dataclass(frozen=True, slots=True)
class MinMax:
    """Ranges are the least and greatest value seen in calibration."""


def _activations() -> Int:
    return Int(8, symmetric=False, granularity=PerTensor())


@spec
@dataclass(frozen=True, slots=True)
class Quantize:
    """Store weights, and compute activations, in fewer bits.

    `activations=None` quantizes weights only. `keep` and `include` are layer names or `fnmatch` patterns; a kept layer
    stays float. `overrides` gives layers, named in the same way, another weight spec; the first match counts. The target
    may change the *sign* of activation codes (uint8 and int8 are one lattice shifted by 128), never their scale.
    """

    weights: Int | Float = field(default_factory=Int)
    activations: Int | None = field(default_factory=_activations)
    _: KW_ONLY
    observer: MinMax = field(default_factory=MinMax)
    keep: tuple[str, ...] = ()
    include: tuple[str, ...] | None = None
    overrides: Mapping[str, Int] = field(default_factory=dict, metadata=MAPPING)

    def __post_init__(self) -> None:
        check_type("Quantize.weights", self.weights, Int, Float)
        check_type("Quantize.activations", self.activations, Int, None)
        check_type("Quantize.observer", self.observer, MinMax)
        object.__setattr__(self, "keep", name_patterns("Quantize.keep", self.keep))
        if self.include is not None:
            object.__setattr__(self, "include", name_patterns("Quantize.include", self.include))
        if isinstance(self.activations, Int) and not isinstance(self.activations.granularity, PerTensor):
            raise SpecError("Quantize.activations must use granularity=PerTensor(): no runtime takes per-channel activations.")
        if isinstance(self.weights, Float) and self.activations is not None:
            raise SpecError(
                "Quantize(weights=Float(…)) casts weights only and needs activations=None: "
                f"write Quantize({self.weights!r}, None)."
            )
        _check_weights("Quantize.weights", self.weights)
        check_type("Quantize.overrides", self.overrides, Mapping)
        for name, override in self.overrides.items():
            check_type("The layer name in Quantize.overrides", name, str)
            check_type(f"Quantize.overrides[{name!r}]", override, Int)
            _check_weights(f"Quantize.overrides[{name!r}]", override)
        if self.overrides and isinstance(self.weights, Float):
            raise SpecError("Quantize.overrides needs integer weights: Quantize(weights=Float(…)) casts every layer alike.")
        object.__setattr__(self, "overrides", dict(self.overrides))  # the caller's mapping may change later


def _check_weights(owner: str, weights: Int | Float) -> None:
    if isinstance(weights, Int) and not weights.symmetric:
        raise SpecError(f"{owner} must be symmetric: the int8 kernels of every target need weight zero points of 0.")
