"""What a student learns from its teacher."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from whet.errors import SpecError
from whet.specs.base import check_integer, check_number, check_type, spec

HIGHEST = 1e6  # of temperatures and weights


def _check(loss: Any) -> None:
    """Check the weight, and the temperature or the layers' names, if it has them."""
    name = type(loss).__name__
    check_number(f"{name}.weight", loss.weight, low=0, high=HIGHEST, open_low=True)
    if isinstance(loss, SoftTargets | BinarySoftTargets | DKD | DIST):
        check_number(f"{name}.temperature", loss.temperature, low=0, high=HIGHEST, open_low=True)
    if isinstance(loss, LAYER_LOSSES):
        needs = isinstance(loss, Features | AttentionTransfer | AttentionMatrices | AttentionRelations)
        for side, value in (("student", loss.student), ("teacher", loss.teacher)):
            if not (isinstance(value, str) and value) and (needs or value is not None):
                raise SpecError(f"{name}.{side} must name a layer or be a pattern of names, got {value!r}.")
        if (loss.student is None) != (loss.teacher is None):
            raise SpecError(f"{name} takes layers of both models or of none, got {loss.student!r} and {loss.teacher!r}.")


class _Checked:
    """A loss with nothing to check but what all have."""

    __slots__ = ()

    def __post_init__(self) -> None:
        _check(self)


@spec
@dataclass(frozen=True, slots=True)
class SoftTargets:
    """`T² · KL(softmax(teacher/T) ‖ softmax(student/T))` (Hinton et al. 2015, arXiv:1503.02531).

    With `standardize` each row of logits is first shifted and scaled to mean 0 and deviation 1, so that the student learns
    their relations and not their size (Sun et al. 2024, arXiv:2403.01427). Then a temperature of about 2 fits.
    """

    temperature: float = 4.0
    _: KW_ONLY
    standardize: bool = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        check_type("SoftTargets.standardize", self.standardize, bool)


@spec
@dataclass(frozen=True, slots=True)
class BinarySoftTargets(_Checked):
    """Soft targets of sigmoid outputs, where each logit answers a question of its own: one logit, or several labels."""

    temperature: float = 4.0
    _: KW_ONLY
    weight: float = 1.0


@spec
@dataclass(frozen=True, slots=True)
class LogitsMSE(_Checked):
    """`mean((student - teacher)²)` over logits (Ba & Caruana 2014, arXiv:1312.6184)."""

    _: KW_ONLY
    weight: float = 1.0


@spec
@dataclass(frozen=True, slots=True)
class Regression(_Checked):
    """`mean((student - teacher)²)` over the outputs of a model that predicts numbers; they need not be logits."""

    _: KW_ONLY
    weight: float = 1.0


@spec
@dataclass(frozen=True, slots=True)
class DKD:
    """`T² · (alpha · TCKD + beta · NCKD)`: the target class apart from the others (Zhao et al. 2022, arXiv:2203.08679).

    Needs integer targets. The paper's `beta` grows with the teacher's confidence: 1 to 10, of which 8 is its choice for
    CIFAR-100's ResNets.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    _: KW_ONLY
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        check_number("DKD.alpha", self.alpha, low=0, high=HIGHEST)
        check_number("DKD.beta", self.beta, low=0, high=HIGHEST)


@spec
@dataclass(frozen=True, slots=True)
class DIST:
    """`T² · (beta · inter + gamma · intra)`: correlations of rows and of columns (Huang et al. 2022, arXiv:2205.10536)."""

    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = 4.0
    _: KW_ONLY
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        check_number("DIST.beta", self.beta, low=0, high=HIGHEST)
        check_number("DIST.gamma", self.gamma, low=0, high=HIGHEST)


@spec
@dataclass(frozen=True, slots=True)
class Features:
    """`mean((r(student) - teacher)²)` between the outputs of two layers (FitNets; Romero et al. 2015, arXiv:1412.6550).

    `student` and `teacher` name layers, or are patterns of names that match as many in both, paired in order. Where the
    channels differ, `r` is a linear map of the channels, trained beside the student at `learning_rate` and thrown away.
    """

    student: str
    teacher: str
    _: KW_ONLY
    weight: float = 1.0
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        _check(self)
        check_number("Features.learning_rate", self.learning_rate, low=0, high=1e3, open_low=True)


@spec
@dataclass(frozen=True, slots=True)
class AttentionTransfer(_Checked):
    """Where the features of two convolutional layers are strong (Zagoruyko & Komodakis 2017, arXiv:1612.03928)."""

    student: str
    teacher: str
    _: KW_ONLY
    weight: float = 1000.0


@spec
@dataclass(frozen=True, slots=True)
class RKD:
    """`distance · L_D + angle · L_A`: distances and angles between examples (Park et al. 2019, arXiv:1904.05068).

    Without names, between the models' outputs. An angle costs n³ numbers for a batch of n.
    """

    student: str | None = None
    teacher: str | None = None
    _: KW_ONLY
    distance: float = 25.0
    angle: float = 50.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        for name, value in (("distance", self.distance), ("angle", self.angle)):
            check_number(f"RKD.{name}", value, low=0, high=HIGHEST)
        if self.distance == self.angle == 0:
            raise SpecError("RKD.distance and RKD.angle are both 0: there is nothing to learn.")


@spec
@dataclass(frozen=True, slots=True)
class SimilarityPreserving(_Checked):
    """Which examples of a batch activate a layer alike (Tung & Mori 2019, arXiv:1907.09682). Without names, the outputs."""

    student: str | None = None
    teacher: str | None = None
    _: KW_ONLY
    weight: float = 3000.0


@spec
@dataclass(frozen=True, slots=True)
class PKT(_Checked):
    """The probabilities of an example's neighbours (Passalis & Tefas 2018, arXiv:1803.10837). Without names, of outputs."""

    student: str | None = None
    teacher: str | None = None
    _: KW_ONLY
    weight: float = 100.0


@spec
@dataclass(frozen=True, slots=True)
class CRD:
    """Tell the teacher's view of an example from its views of the others (contrastive; Tian et al. 2020, arXiv:1910.10699).

    Both features are mapped to `dimension` numbers by linear maps trained beside the student and thrown away, the student's
    and the teacher's; positions are averaged first. The other examples of the batch are the negatives, where the paper keeps
    a memory of thousands: take batches of dozens at least. Without names, the outputs.
    """

    student: str | None = None
    teacher: str | None = None
    _: KW_ONLY
    temperature: float = 0.07
    dimension: int = 128
    weight: float = 0.8
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        _check(self)
        check_number("CRD.temperature", self.temperature, low=0, high=HIGHEST, open_low=True)
        check_integer("CRD.dimension", self.dimension, low=1, high=1 << 16)
        check_number("CRD.learning_rate", self.learning_rate, low=0, high=1e3, open_low=True)


@spec
@dataclass(frozen=True, slots=True)
class AttentionMatrices:
    """`mean((A_s - A_t)²)`, `A = q·kᵀ/√d` of attention layers (TinyBERT; Jiao et al. 2020, arXiv:1909.10351).

    With `divergent` the distributions behind the softmax, by their divergence (MiniLM; Wang et al. 2020, arXiv:2002.10957).
    `student` and `teacher` name attention layers, or are patterns. Heads may differ in number: the mean of groups is taken.
    """

    student: str
    teacher: str
    _: KW_ONLY
    divergent: bool = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        check_type("AttentionMatrices.divergent", self.divergent, bool)


@spec
@dataclass(frozen=True, slots=True)
class AttentionRelations:
    """Which positions have like values, queries or keys: `KL` of `softmax(x·xᵀ/√d)` (MiniLM, arXiv:2002.10957; MiniLMv2,
    arXiv:2012.15828).

    `of`: any of "value", "query", "key"; the losses of several are added. `heads`: how many relation heads the vectors of each
    model are cut into, by default as many as both have in common; so heads and widths may differ.
    """

    student: str
    teacher: str
    _: KW_ONLY
    of: tuple[str, ...] = ("value",)
    heads: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        given: Any = self.of
        of = (given,) if isinstance(given, str) else tuple(given)
        object.__setattr__(self, "of", of)
        _check(self)
        if not of or len(set(of)) < len(of) or not set(of) <= {"query", "key", "value"}:
            raise SpecError(f"AttentionRelations.of must be of 'value', 'query' and 'key', each once, got {self.of!r}.")
        if self.heads is not None:
            check_integer("AttentionRelations.heads", self.heads, low=1)


Loss = SoftTargets | BinarySoftTargets | LogitsMSE | Regression | DKD | DIST
AttentionLoss = AttentionMatrices | AttentionRelations
LayerLoss = Features | AttentionTransfer | RKD | SimilarityPreserving | PKT | CRD | AttentionMatrices | AttentionRelations
LOGIT_LOSSES = (SoftTargets, BinarySoftTargets, LogitsMSE, Regression, DKD, DIST)
ATTENTION_LOSSES = (AttentionMatrices, AttentionRelations)
LAYER_LOSSES = (Features, AttentionTransfer, RKD, SimilarityPreserving, PKT, CRD, *ATTENTION_LOSSES)


@spec
@dataclass(frozen=True, slots=True)
class TeacherWeights:
    """Several teachers teach by the mean of their outputs, weighed as given; the weights are divided by their sum."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values) if isinstance(self.values, list | tuple) else (self.values,))
        for value in self.values:
            check_number("TeacherWeights.values", value, low=0, high=HIGHEST)
        if not sum(self.values):
            raise SpecError(f"TeacherWeights.values must have a positive sum, got {self.values!r}.")


@spec
@dataclass(frozen=True, slots=True)
class TeacherConfidence:
    """Of several teachers, those that know an example's class count more (CA-MKD; Zhang et al. 2022, arXiv:2201.00007).

    `(1 - exp(L_k) / Σ exp(L_j)) / (K - 1)` for K teachers with cross-entropies `L`; without labels, entropies.
    """


@spec
@dataclass(frozen=True, slots=True)
class TeacherSubsets:
    """Each teacher teaches the examples of its classes: `classes` are as many tuples of class numbers as teachers.

    A teacher may know its own classes alone, in the tuple's order. An example of no subset is the first teacher's.
    """

    classes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not (isinstance(self.classes, list | tuple) and self.classes):
            raise SpecError(f"TeacherSubsets.classes must hold a tuple of classes for each teacher, got {self.classes!r}.")
        for subset in self.classes:
            if not (isinstance(subset, list | tuple) and subset):
                raise SpecError(f"TeacherSubsets.classes must hold tuples of class numbers, got {subset!r}.")
            for label in subset:
                check_integer("TeacherSubsets.classes", label, low=0)
        object.__setattr__(self, "classes", tuple(tuple(subset) for subset in self.classes))
        known = [label for subset in self.classes for label in subset]
        twice = next((label for label in known if known.count(label) > 1), None)
        if twice is not None:
            raise SpecError(f"TeacherSubsets.classes: the class {twice} is in two subsets. Give each class to one teacher.")


@spec
@dataclass(frozen=True, slots=True)
class Distill:
    """`student_weight · loss(student, targets) + (1 - student_weight) · Σ weight · distillation loss`.

    `teachers` says how several teachers become one: `TeacherWeights`, `TeacherConfidence` or `TeacherSubsets`; None is their
    mean. Teachers run in inference mode; with `teacher_training` they run as in training (dropout, the batch's own
    statistics), on a copy, so that they are still never changed.
    """

    loss: tuple[Loss | LayerLoss, ...] = (SoftTargets(),)
    _: KW_ONLY
    student_weight: float = 0.1
    teachers: TeacherWeights | TeacherConfidence | TeacherSubsets | None = None
    teacher_training: bool = False

    def __post_init__(self) -> None:
        losses = tuple(self.loss) if isinstance(self.loss, list | tuple) else (self.loss,)
        if not losses:
            raise SpecError("Distill.loss must name at least one distillation loss, got none.")
        for loss in losses:
            check_type("Distill.loss", loss, *LOGIT_LOSSES, *LAYER_LOSSES)
        object.__setattr__(self, "loss", losses)
        check_number("Distill.student_weight", self.student_weight, low=0, high=1)
        check_type("Distill.teachers", self.teachers, TeacherWeights, TeacherConfidence, TeacherSubsets, None)
        check_type("Distill.teacher_training", self.teacher_training, bool)

    @property
    def of_outputs(self) -> tuple[Loss, ...]:
        """The losses on the models' outputs."""
        return tuple(loss for loss in self.loss if isinstance(loss, LOGIT_LOSSES))

    @property
    def of_layers(self) -> tuple[LayerLoss, ...]:
        """The losses on what layers inside the models compute, and on relations between examples."""
        return tuple(loss for loss in self.loss if isinstance(loss, LAYER_LOSSES))
