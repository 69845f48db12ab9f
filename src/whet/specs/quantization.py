"""What to quantize, and by which algorithms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field

from whet.errors import SpecError
from whet.specs.base import MAPPING, check_integer, check_number, check_type, name_patterns, spec
from whet.specs.budget import Budget
from whet.specs.schemes import SCHEMES, Dynamic, Float, Int, PerGroup, PerTensor, Scheme


@spec
@dataclass(frozen=True, slots=True)
class MinMax:
    """Ranges are the least and greatest value seen."""


@spec
@dataclass(frozen=True, slots=True)
class MovingAverage:
    """Ranges are exponential moving averages of each batch's least and greatest value (Jacob et al. 2018, §3.1).

    `momentum` is the weight of what was seen before.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_number("MovingAverage.momentum", self.momentum, low=0, high=1, open_high=True)


@spec
@dataclass(frozen=True, slots=True)
class Percentile:
    """Ranges hold `percentile` per cent of the values seen; what lies outside is clipped."""

    percentile: float = 99.99

    def __post_init__(self) -> None:
        check_number("Percentile.percentile", self.percentile, low=50, high=100, open_low=True)


@spec
@dataclass(frozen=True, slots=True)
class MSE:
    """Ranges minimise the mean squared error of what was seen."""


@spec
@dataclass(frozen=True, slots=True)
class Entropy:
    """Ranges minimise the Kullback-Leibler divergence between what was seen and its codes (Migacz 2017, TensorRT)."""


@spec
@dataclass(frozen=True, slots=True)
class HQQ:
    """Weight ranges by half-quadratic splitting with an l_p error, from the weights alone (Badri & Shaji 2023)."""

    p: float = 0.7
    steps: int = 20

    def __post_init__(self) -> None:
        check_number("HQQ.p", self.p, low=0, high=1, open_low=True)
        check_integer("HQQ.steps", self.steps, low=1)


Observer = MinMax | MovingAverage | Percentile | MSE | Entropy
OBSERVERS = (MinMax, MovingAverage, Percentile, MSE, Entropy)


@spec
@dataclass(frozen=True, slots=True)
class Nearest:
    """Each weight to its nearest code."""


@spec
@dataclass(frozen=True, slots=True)
class AdaRound:
    """Weights up or down, whichever keeps the outputs (Nagel et al. 2020, arXiv:2004.10568).

    Layer by layer on the second moments of each layer's inputs; with `blocks=True` then block by block, by gradient descent
    on the outputs of each block (Li et al. 2021, BRECQ, arXiv:2102.05426), `steps` steps each.
    """

    _: KW_ONLY
    steps: int = 1000
    blocks: bool = False

    def __post_init__(self) -> None:
        check_integer("AdaRound.steps", self.steps, low=1)
        check_type("AdaRound.blocks", self.blocks, bool)


@spec
@dataclass(frozen=True, slots=True)
class GPTQ:
    """Columns one after another, each rounding error spread over the columns to come (Frantar et al. 2022, arXiv:2210.17323).

    `order=True` takes columns by falling input power. `damping` is a fraction of the mean diagonal, raised until the
    factorisation succeeds.
    """

    _: KW_ONLY
    order: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_type("GPTQ.order", self.order, bool)
        check_number("GPTQ.damping", self.damping, low=0, high=1, open_low=True)


Rounding = Nearest | AdaRound | GPTQ


@spec
@dataclass(frozen=True, slots=True)
class CrossLayer:
    """Equal ranges in the channels between two layers (Nagel et al. 2019, arXiv:1906.04721, eq. 11)."""


@spec
@dataclass(frozen=True, slots=True)
class SmoothQuant:
    """Outliers of activations moved into weights: `max|x| ** alpha / max|w| ** (1 - alpha)` (Xiao et al. 2022, eq. 4)."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        check_number("SmoothQuant.alpha", self.alpha, low=0, high=1)


@spec
@dataclass(frozen=True, slots=True)
class AWQ:
    """Input channels scaled by a power of their activations, searched per layer (Lin et al. 2023, arXiv:2306.00978)."""

    points: int = 20

    def __post_init__(self) -> None:
        check_integer("AWQ.points", self.points, low=2, high=100)


Equalize = CrossLayer | SmoothQuant | AWQ


@spec
@dataclass(frozen=True, slots=True)
class BiasCorrection:
    """Biases take back what rounding shifts each channel's mean by (Nagel et al. 2019, §4.2).

    From calibration data, layer after layer; `analytic=True` from batch-norm statistics instead, without data.
    `batch_norm=True` re-estimates each channel's deviation too, where a batch norm was folded.
    """

    _: KW_ONLY
    analytic: bool = False
    batch_norm: bool = False

    def __post_init__(self) -> None:
        check_type("BiasCorrection.analytic", self.analytic, bool)
        check_type("BiasCorrection.batch_norm", self.batch_norm, bool)
        if self.analytic and self.batch_norm:
            raise SpecError("BiasCorrection.batch_norm=True measures deviations on data, which analytic=True does without.")


@spec
@dataclass(frozen=True, slots=True)
class QAT:
    """Quantization-aware training, from the post-training solution on (Jacob et al. 2018).

    `learn_scale=True` trains the scales too (LSQ, Esser et al. 2020, arXiv:1902.08153). Ranges are observed while the first
    `observe` of all steps lasts, then frozen. `teacher=True` adds the original's outputs as soft targets.
    """

    _: KW_ONLY
    epochs: int = 3
    learning_rate: float = 3e-4
    learn_scale: bool = True
    observe: float = 0.0
    teacher: bool = False

    def __post_init__(self) -> None:
        check_integer("QAT.epochs", self.epochs, low=1)
        check_number("QAT.learning_rate", self.learning_rate, low=0, high=1e3, open_low=True)
        check_type("QAT.learn_scale", self.learn_scale, bool)
        check_number("QAT.observe", self.observe, low=0, high=1)
        check_type("QAT.teacher", self.teacher, bool)


@spec
@dataclass(frozen=True, slots=True)
class Adaptive:
    """One of `candidates` for each layer, from its distribution and its measured sensitivity.

    The choice is an exact knapsack: the least expected damage within `budget`, a Budget with `bits` (on average), `size`
    (bytes of the weights, or a fraction of their float bytes) or `max_drop`.
    """

    candidates: tuple[Scheme, ...] = (Int(8), Int(6), Int(4), Int(3))
    _: KW_ONLY
    budget: Budget = field(default_factory=lambda: Budget(bits=4.5))

    def __post_init__(self) -> None:
        candidates = tuple(self.candidates) if isinstance(self.candidates, list | tuple) else (self.candidates,)
        if len(candidates) < 2:
            raise SpecError(f"Adaptive.candidates needs at least two schemes to choose from, got {candidates!r}.")
        for item in candidates:
            check_type("Adaptive.candidates", item, *SCHEMES)
        check_type("Adaptive.budget", self.budget, Budget)
        object.__setattr__(self, "candidates", candidates)


def _activations() -> Int:
    return Int(8, symmetric=False, granularity=PerTensor())


@spec
@dataclass(frozen=True, slots=True)
class Quantize:
    """Store weights, and compute activations, in fewer bits.

    `activations=None` quantizes weights only, `Dynamic()` activations at run time. `observer` ranges activations,
    `weight_observer` weights. `keep` and `include` are layer names or `fnmatch` patterns, or layer classes; a kept layer
    stays float. `overrides` gives layers, named in the same way, another weight scheme; the first match counts, and what
    such a layer reads (and the model's outputs that it makes) has at least as many bits as its Int weights. The target may
    change the *sign* of activation codes (uint8 and int8 are one lattice shifted by 128), never their scale.

    What serves best at 4 bits and fewer, from some hundred to a thousand images without labels (layers at both ends keep 8):

        Quantize(
            Int(4), rounding=GPTQ(), weight_observer=MSE(), correct_bias=BiasCorrection(),
            overrides={"conv1": Int(8), "linear": Int(8)},
        )

    There `MSE()` chooses the scales by the error of each layer's output. With `Nearest()`, or without data, it is that of the
    weights. At 8 bits the defaults do.

    In order: batch norms are folded; `equalize`; ranges; `rounding`; `correct_bias`; `qat`. With `max_drop` the layers that
    cost most are put back to float until the drop measured on the exported file (the upper end of the paired interval)
    holds.
    """

    weights: Scheme | Adaptive = field(default_factory=Int)
    activations: Int | Dynamic | None = field(default_factory=_activations)
    _: KW_ONLY
    observer: Observer = field(default_factory=MinMax)
    weight_observer: MinMax | MSE | HQQ = field(default_factory=MinMax)
    equalize: Equalize | None = None
    rounding: Rounding = field(default_factory=Nearest)
    correct_bias: BiasCorrection | None = None
    qat: QAT | None = None
    keep: tuple[str | type, ...] = ()
    include: tuple[str | type, ...] | None = None
    overrides: Mapping[str, Scheme] = field(default_factory=dict, metadata=MAPPING)
    max_drop: float | None = None

    def __post_init__(self) -> None:
        check_type("Quantize.weights", self.weights, *SCHEMES, Adaptive)
        check_type("Quantize.activations", self.activations, Int, Dynamic, None)
        check_type("Quantize.observer", self.observer, *OBSERVERS)
        check_type("Quantize.weight_observer", self.weight_observer, MinMax, MSE, HQQ)
        check_type("Quantize.equalize", self.equalize, CrossLayer, SmoothQuant, AWQ, None)
        check_type("Quantize.rounding", self.rounding, Nearest, AdaRound, GPTQ)
        check_type("Quantize.correct_bias", self.correct_bias, BiasCorrection, None)
        check_type("Quantize.qat", self.qat, QAT, None)
        object.__setattr__(self, "keep", name_patterns("Quantize.keep", self.keep))
        if self.include is not None:
            object.__setattr__(self, "include", name_patterns("Quantize.include", self.include))
        if self.max_drop is not None:
            check_number("Quantize.max_drop", self.max_drop, low=0, high=1e12)
        check_type("Quantize.overrides", self.overrides, Mapping)
        if isinstance(self.activations, Int) and not isinstance(self.activations.granularity, PerTensor):
            raise SpecError("Quantize.activations must use granularity=PerTensor(): no runtime takes per-channel activations.")
        for owner, scheme in self._schemes():
            check_type(owner, scheme, *SCHEMES)
            self._check_scheme(owner, scheme)
        object.__setattr__(self, "overrides", dict(self.overrides))  # the caller's mapping may change later

    def _schemes(self) -> list[tuple[str, Scheme]]:
        """Every weight scheme, with the name of the field it stands in."""
        chosen = self.weights.candidates if isinstance(self.weights, Adaptive) else (self.weights,)
        owner = "Quantize.weights" if not isinstance(self.weights, Adaptive) else "Adaptive.candidates"
        for name in self.overrides:
            check_type("The layer name in Quantize.overrides", name, str)
        named = [(f"Quantize.overrides[{name!r}]", scheme) for name, scheme in self.overrides.items()]
        return [*((owner, scheme) for scheme in chosen), *named]

    def _check_scheme(self, owner: str, scheme: Scheme) -> None:
        if self.activations is None:
            return
        if isinstance(scheme, Float) and scheme.bits == 16:
            raise SpecError(
                f"{owner}=Float(…) casts weights only and needs activations=None: write Quantize({scheme!r}, None)."
            )
        if isinstance(scheme, Int) and not scheme.symmetric:
            raise SpecError(
                f"{owner} must be symmetric: the int8 kernels of every target need weight zero points of 0. "
                "Asymmetric weights go with activations=None."
            )
        if isinstance(scheme, Int) and isinstance(scheme.granularity, PerGroup):
            raise SpecError(
                f"{owner} with PerGroup goes with activations=None: integer kernels sum over a whole row at one scale."
            )
