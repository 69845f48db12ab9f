"""Distillation losses: pure functions of two outputs, in the namespace of their arrays."""

from __future__ import annotations

from whet.numerics.namespace import Array, Namespace


def soft_targets(student_logits: Array, teacher_logits: Array, temperature: float, *, xp: Namespace) -> Array:
    """`T² · KL(softmax(t/T) ‖ softmax(s/T))` in nats, mean over all axes but the classes (Hinton et al. 2015, eq. 1-4).

    Shapes: both (…, classes). The result is a scalar. No gradient flows to the teacher.
    """
    log_s = xp.log_softmax(student_logits / temperature, axis=-1)
    log_t = xp.stop_gradient(xp.log_softmax(teacher_logits / temperature, axis=-1))
    return temperature**2 * xp.mean(xp.sum(xp.exp(log_t) * (log_t - log_s), axis=-1))
