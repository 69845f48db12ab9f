"""What to prune, chosen how, and when. Sparsity is the fraction removed."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

from whet.errors import SpecError
from whet.specs.base import check_integer, check_number, check_type, name_patterns, spec
from whet.specs.blocks import BLOCK_CRITERIA, BlockInfluence, LossChange, OutputChange
from whet.specs.budget import check_latency
from whet.specs.criteria import CHANNELS_ONLY, CRITERIA, Criterion, Magnitude, SparseGPT
from whet.specs.granularity import MASKED, NM, REMOVED, Granularity, Group, Layer, Weight

# --- how much where


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
class ERK:
    """Erdős-Rényi kernel: a layer keeps `∝ (Σ sizes) / (Π sizes)` of its weights (Evci et al. 2020, arXiv:1911.11134)."""


@spec
@dataclass(frozen=True, slots=True)
class Isomorphic:
    """Channels are ranked together with those of layers built alike (Fang et al. 2024, arXiv:2407.04616)."""


@spec
@dataclass(frozen=True, slots=True)
class BySensitivity:
    """Layers lose as much as they bear: each alone is tried at several sparsities, and the least sum of damages is taken.

    The damage is `Σ (r - a)² / Σ r²` of the model's outputs on the first `batches` of the data, which needs no targets. trials:
    how many sparsities between 0 and `most` each layer is tried at.
    """

    _: KW_ONLY
    batches: int = 2
    trials: int = 4
    most: float = 0.9

    def __post_init__(self) -> None:
        check_integer("BySensitivity.batches", self.batches, low=1)
        check_integer("BySensitivity.trials", self.trials, low=1, high=64)
        check_number("BySensitivity.most", self.most, low=0, high=1, open_low=True, open_high=True)


# --- when


@dataclass(frozen=True, slots=True)
class Ramped:
    """A sparsity that rises from `initial` over the steps from `begin` to `end`, both fractions of the training steps.

    The masks are renewed every `frequency` steps and at the end of the ramp, then stay.
    """

    _: KW_ONLY
    initial: float = 0.0
    begin: float = 0.0
    end: float = 0.6
    frequency: int = 10

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_number(f"{name}.initial", self.initial, low=0, high=1, open_high=True)
        check_number(f"{name}.begin", self.begin, low=0, high=1, open_high=True)
        check_number(f"{name}.end", self.end, low=0, high=1, open_low=True)
        check_integer(f"{name}.frequency", self.frequency, low=1)
        if self.end <= self.begin:
            raise SpecError(f"{name}.end must be greater than begin={self.begin:g}, got {self.end:g}.")


@spec
@dataclass(frozen=True, slots=True)
class OneShot:
    """The whole sparsity at once, before the first training step."""


@spec
@dataclass(frozen=True, slots=True)
class Linear(Ramped):
    """`s(t) = s_i + (s_f - s_i) · t` for `t` from 0 to 1."""


@spec
@dataclass(frozen=True, slots=True)
class Cubic(Ramped):
    """`s(t) = s_f + (s_i - s_f) · (1 - t)³` for `t` from 0 to 1 (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1)."""


@spec
@dataclass(frozen=True, slots=True)
class Cosine(Ramped):
    """`s(t) = s_f + (s_i - s_f) · (1 + cos πt) / 2` for `t` from 0 to 1."""


@spec
@dataclass(frozen=True, slots=True)
class Exponential(Ramped):
    """`1 - s(t) = (1 - s_i)^(1-t) · (1 - s_f)^t`: the same fraction of what is left goes at every renewal."""


@spec
@dataclass(frozen=True, slots=True)
class Iterative(Ramped):
    """Exponential in `rounds` equal rounds with training to recover in between (Han et al. 2015; Frankle & Carbin 2019)."""

    _: KW_ONLY
    rounds: int = 5

    def __post_init__(self) -> None:
        Ramped.__post_init__(self)
        check_integer("Iterative.rounds", self.rounds, low=1)


@spec
@dataclass(frozen=True, slots=True)
class RigL:
    """The whole sparsity at once, then masks move: the smallest weights go, as many grow (Evci et al. 2020, arXiv:1911.11134).

    Every `frequency` steps until `end`, a fraction of the training steps, `fraction/2 · (1 + cos(π t / end))` of the weights
    of each layer go, and those grow, from zero, whose gradient is largest. The paper begins with `criterion=Random()` and
    `allocation=ERK()`.
    """

    _: KW_ONLY
    fraction: float = 0.3
    frequency: int = 100
    end: float = 0.75

    def __post_init__(self) -> None:
        check_number("RigL.fraction", self.fraction, low=0, high=1, open_low=True)
        check_integer("RigL.frequency", self.frequency, low=1)
        check_number("RigL.end", self.end, low=0, high=1, open_low=True)


Schedule = OneShot | Linear | Cubic | Cosine | Exponential | Iterative | RigL


# --- and then


@spec
@dataclass(frozen=True, slots=True)
class Reconstruct:
    """What stays is solved anew, layer after layer, so that it gives again what the original gave (no training, no targets).

    `min_W E|t - W x̂ - b|² + λ |W - W₀|²` over the weights W behind what was removed: x̂ are their inputs in the model as it is
    so far, t the original's outputs there, and λ is `damping + columns / rows` of the mean E[x̂²] (least squares on what is
    left: He et al. 2017, arXiv:1707.06168, eq. 3). A batch norm behind W gets the statistics, scale and shift that belong to
    it. Looks at `batches` batches of the data.
    """

    _: KW_ONLY
    batches: int = 8
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_integer("Reconstruct.batches", self.batches, low=1)
        check_number("Reconstruct.damping", self.damping, low=0, high=1e6)


Allocation = Uniform | Global | ERK | Isomorphic | BySensitivity
_ALLOCATIONS = (Uniform, Global, ERK, Isomorphic, BySensitivity)
AMOUNTS = ("sparsity", "macs", "parameters", "bytes", "latency")
_DEFAULT = Magnitude()  # told by identity from one that was asked for


@spec
@dataclass(frozen=True, slots=True)
class Prune:
    """Remove the least important part of a model.

    Masked (`Weight`, `NM`, `Block`): set to zero, and kept there. Removed (`Channel`, `Head`, `Layer`, `Group`): tensors become
    smaller.

    sparsity: the fraction removed. For removal a budget may stand in its place: macs, parameters, bytes, what is left at most,
    a fraction of the original below 1, else a count; latency, the time of the exported file, measured, a fraction of the
    original's or a text as "2 ms". criterion: by default Magnitude(), for Layer() BlockInfluence(). round_to: how many channels
    are left is a multiple of it, as far as that leaves any. rebuild: None keeps the model's class; "graph" gives a
    torch.fx.GraphModule, in which sizes that the model's own code fixes can change too. reconstruct: solve the weights behind
    what was removed anew; needs data.
    """

    sparsity: float | None = None
    _: KW_ONLY
    macs: float | None = None
    parameters: float | None = None
    bytes: float | None = None
    latency: float | str | None = None
    granularity: Granularity = field(default_factory=Weight)
    criterion: Criterion | OutputChange | LossChange | BlockInfluence = field(default_factory=lambda: _DEFAULT)
    allocation: Allocation = field(default_factory=Uniform)
    schedule: Schedule = field(default_factory=OneShot)
    keep: tuple[str, ...] = ()
    include: tuple[str, ...] | None = None
    round_to: int = 8
    rebuild: str | None = None
    reconstruct: Reconstruct | None = None

    def __post_init__(self) -> None:
        self._check_amount()
        check_type("Prune.granularity", self.granularity, *MASKED, *REMOVED)
        if isinstance(self.granularity, Layer) and self.criterion is _DEFAULT:
            object.__setattr__(self, "criterion", BlockInfluence())
        check_type("Prune.criterion", self.criterion, *CRITERIA, *BLOCK_CRITERIA)
        check_type("Prune.allocation", self.allocation, *_ALLOCATIONS)
        check_type("Prune.schedule", self.schedule, OneShot, Linear, Cubic, Cosine, Exponential, Iterative, RigL)
        check_integer("Prune.round_to", self.round_to, low=1)
        object.__setattr__(self, "keep", name_patterns("Prune.keep", self.keep))
        if self.include is not None:
            object.__setattr__(self, "include", name_patterns("Prune.include", self.include))
        if self.rebuild not in (None, "graph"):
            raise SpecError(f"Prune.rebuild must be None or 'graph', got {self.rebuild!r}.")
        if isinstance(self.schedule, Ramped) and self.schedule.initial > self.fraction:
            name = type(self.schedule).__name__
            raise SpecError(f"{name}.initial must be at most sparsity={self.fraction:g}, got {self.schedule.initial:g}.")
        self._check_pairs()

    def _check_amount(self) -> None:
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        own = self._own_amount()
        if own is not None:
            if given:
                raise SpecError(f"{own} says how much is removed; leave out {given[0]}=.")
            return
        if not given:
            raise SpecError("Prune needs a value for 'sparsity', or a budget: macs=, parameters=, bytes= or latency=.")
        if len(given) > 1:
            raise SpecError(f"Prune takes one of {'=, '.join(AMOUNTS)}=; got {', '.join(given)}.")
        if self.sparsity is not None:
            check_number("Prune.sparsity", self.sparsity, low=0, high=1, open_high=True)
            return
        if self.latency is not None:
            check_latency("Prune.latency", self.latency)
        else:
            check_number(f"Prune.{given[0]}", getattr(self, given[0]), low=0, high=float(2**63), open_low=True)
        if not isinstance(self.granularity, REMOVED):
            raise SpecError(
                f"Prune({given[0]}=…) is met by real removal: write granularity=Channel(). A mask takes sparsity=; it makes no "
                "tensor smaller."
            )

    def _own_amount(self) -> str | None:
        """The granularity, where it says itself how much is removed."""
        if isinstance(self.granularity, NM):
            return f"NM({self.granularity.n}, {self.granularity.m})"
        if isinstance(self.granularity, Layer) and self.granularity.count is not None:
            return f"Layer({self.granularity.count})"
        return "Group(…)" if isinstance(self.granularity, Group) else None

    def _check_pairs(self) -> None:
        """Refuse what has no meaning together."""
        name = type(self.granularity).__name__
        if self.removes and isinstance(self.allocation, ERK):
            raise SpecError("ERK distributes masks; for Channel() and Head() take Uniform(), Global() or Isomorphic().")
        if not self.removes and isinstance(self.allocation, Isomorphic):
            raise SpecError("Isomorphic ranks channels; for masks take Uniform(), Global() or ERK().")
        if isinstance(self.granularity, Layer | Group | NM) and isinstance(self.allocation, BySensitivity):
            raise SpecError(
                f"BySensitivity says how much each layer loses, and {name} leaves no choice: leave allocation= out."
            )
        if isinstance(self.allocation, BySensitivity) and self.sparsity is None:
            raise SpecError("BySensitivity distributes a sparsity: write sparsity= in the place of the budget.")
        if self.latency is not None and getattr(self.criterion, "greedy", False):
            raise SpecError("Prune(latency=…) chooses all layers together: leave greedy= out.")
        if self.removes and not isinstance(self.schedule, OneShot):
            raise SpecError(
                f"{name}() is removed at once: leave schedule= out, then train what is left; Recipe([Prune(…), Train(…)])."
            )
        if not self.removes and isinstance(self.criterion, CHANNELS_ONLY):
            raise SpecError(
                f"{type(self.criterion).__name__} ranks channels: write granularity=Channel(), or take Magnitude()."
            )
        if isinstance(self.granularity, Layer) != isinstance(self.criterion, BLOCK_CRITERIA):
            allowed = ", ".join(f"{kind.__name__}()" for kind in (BLOCK_CRITERIA if name == "Layer" else CRITERIA))
            raise SpecError(f"{type(self.criterion).__name__} does not rank what {name} removes; take one of: {allowed}.")
        if isinstance(self.criterion, SparseGPT):
            self._check_sparsegpt()
        if isinstance(self.schedule, RigL) and not isinstance(self.granularity, Weight):
            raise SpecError(f"RigL moves single weights: leave granularity=Weight(), got {self.granularity!r}.")
        if isinstance(self.allocation, BySensitivity) and not isinstance(self.schedule, OneShot):
            raise SpecError("BySensitivity is measured once: leave schedule= out, then train what is left.")
        if self.rebuild is not None and (not self.removes or isinstance(self.granularity, Layer)):
            raise SpecError("Prune.rebuild is for Channel(), Head() and Group(…); masks and Layer() change no code.")
        if self.reconstruct is not None:
            self._check_reconstruct()

    def _check_sparsegpt(self) -> None:
        """Layer by layer, at once."""
        if not isinstance(self.granularity, Weight | NM):
            raise SpecError(
                f"SparseGPT sets single weights to zero and changes the others; {type(self.granularity).__name__}() takes "
                "OBS(), which ranks by the same loss."
            )
        if isinstance(self.allocation, Global):
            raise SpecError("SparseGPT goes layer by layer and compares no two: take allocation=Uniform() or ERK().")
        if not isinstance(self.schedule, OneShot):
            raise SpecError("SparseGPT prunes at once, after training: leave schedule= out, or ramp with OBS().")

    def _check_reconstruct(self) -> None:
        """Weights that read what was removed are solved, where only some of their inputs are gone."""
        check_type("Prune.reconstruct", self.reconstruct, Reconstruct)
        if isinstance(self.granularity, Layer):
            raise SpecError("Reconstruct() solves what reads removed channels; Layer() removes none: leave reconstruct= out.")
        if not self.removes:
            raise SpecError(
                f"Reconstruct() follows a removal, and {type(self.granularity).__name__} is a mask: take "
                "criterion=SparseGPT(), which changes the weights that remain."
            )

    @property
    def fraction(self) -> float:
        """The sparsity: as given, or of the n:m pattern; 0 where a budget decides."""
        if isinstance(self.granularity, NM):
            return 1 - self.granularity.n / self.granularity.m
        return 0.0 if self.sparsity is None else self.sparsity

    @property
    def removes(self) -> bool:
        """Whether tensors become smaller."""
        return isinstance(self.granularity, REMOVED)
