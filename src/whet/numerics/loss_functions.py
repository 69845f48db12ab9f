"""Distillation losses as functions, for Whet's loop and for your own: the same ones on the arrays of any framework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from whet.numerics.losses_layers import layer_loss as compare
from whet.numerics.losses_table import logit_loss
from whet.numerics.namespace import Namespace
from whet.specs import DIST, DKD, BinarySoftTargets, LogitsMSE, Regression, SoftTargets
from whet.specs.distillation import LayerLoss, Loss


@dataclass(frozen=True)
class LossFunctions:
    """The losses on the tensors of one framework; its side offers the methods as functions.

    xp: its namespace. wide: its tensors, 16-bit floats as float32. tensor: labels and masks as it wants them.

    Everywhere: student and teacher (…, classes), classes last; 16-bit outputs are computed in float32; `mask` (…) is False
    where a row is padding and counts in no mean. The result is a scalar. No gradient flows to the teacher.
    """

    xp: Namespace
    wide: Callable[[Any], Any]
    tensor: Callable[[Any], Any]

    def soft_targets(
        self, student_logits: Any, teacher_logits: Any, temperature: float = 4.0, *, standardize: bool = False, mask: Any = None
    ) -> Any:
        """`T² · KL(softmax(t/T) ‖ softmax(s/T))` in nats, mean over the rows (Hinton et al. 2015, eq. 1-4).

        Shapes: both (…, classes), classes last; `mask` (…) is False where a row is padding and counts in no mean. 16-bit logits
        are computed in float32. No gradient flows to the teacher. `standardize`: each row of logits is first brought to mean 0
        and deviation 1 (Sun et al. 2024, eq. 6).

        Raises:
            ModelError: the shapes differ. SpecError: the temperature is not positive.
        """
        return self.distillation_loss(
            SoftTargets(temperature, standardize=standardize), student_logits, teacher_logits, mask=mask
        )

    def binary_soft_targets(
        self, student_logits: Any, teacher_logits: Any, temperature: float = 4.0, *, mask: Any = None
    ) -> Any:
        """`T² · KL(σ(t/T) ‖ σ(s/T))` in nats, mean over all logits (…, labels), each of which answers its own question.

        Raises:
            ModelError: the shapes differ. SpecError: the temperature is not positive.
        """
        return self.distillation_loss(BinarySoftTargets(temperature), student_logits, teacher_logits, mask=mask)

    def logits_mse(self, student_logits: Any, teacher_logits: Any, *, mask: Any = None) -> Any:
        """`mean((s - t)²)` over classes and rows (Ba & Caruana 2014, eq. 1, without its ½). Shapes: both (…, classes).

        Raises:
            ModelError: the shapes differ.
        """
        return self.distillation_loss(LogitsMSE(), student_logits, teacher_logits, mask=mask)

    def regression(self, student_outputs: Any, teacher_outputs: Any, *, mask: Any = None) -> Any:
        """`mean((s - t)²)` over outputs that are numbers. Shapes: both (…, outputs), also of one output.

        Raises:
            ModelError: the shapes differ.
        """
        return self.distillation_loss(Regression(), student_outputs, teacher_outputs, mask=mask)

    def dkd(
        self,
        student_logits: Any,
        teacher_logits: Any,
        labels: Any,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        *,
        mask: Any = None,
    ) -> Any:
        """`T² · (α · TCKD + β · NCKD)`: the target class apart from the others (Zhao et al. 2022, eq. 7).

        Shapes: both (…, classes); `labels` (…) integers.

        Raises:
            ModelError: the shapes do not fit. SpecError: a number is out of range.
        """
        return self.distillation_loss(DKD(alpha, beta, temperature), student_logits, teacher_logits, labels, mask=mask)

    def dist(
        self,
        student_logits: Any,
        teacher_logits: Any,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 4.0,
        *,
        mask: Any = None,
    ) -> Any:
        """`T² · (β · inter + γ · intra)`: 1 - correlation of rows and of columns (Huang et al. 2022, eq. 8-10).

        Shapes: both (…, classes). Columns are correlated over the batch: take one of dozens.

        Raises:
            ModelError: the shapes differ. SpecError: a number is out of range.
        """
        return self.distillation_loss(DIST(beta, gamma, temperature), student_logits, teacher_logits, mask=mask)

    def distillation_loss(self, spec: Loss, student: Any, teacher: Any, labels: Any = None, *, mask: Any = None) -> Any:
        """The scalar of any loss on outputs that `Distill` takes, its weight not applied.

        Raises:
            ModelError: the shapes do not fit, or `spec` needs labels and there are none.
        """
        labels, mask = (None if rows is None else self.tensor(rows) for rows in (labels, mask))
        return logit_loss(spec, self.wide(student), self.wide(teacher), labels, xp=self.xp, real=mask)

    def layer_loss(self, spec: LayerLoss, student: Any, teacher: Any) -> Any:
        """The scalar of a loss on features or relations: `Features`, `AttentionTransfer`, `RKD`, `SimilarityPreserving`, `PKT`.

        Shapes: (n, positions…, channels), channels last; of two resolutions the finer is averaged to the coarser. `Features`
        takes equal channels here: project the student's first. Layer names in `spec` are not read, nor its weight applied.

        Raises:
            ModelError: the shapes do not fit each other.
        """
        return compare(spec, self.wide(student), self.wide(teacher), xp=self.xp)
