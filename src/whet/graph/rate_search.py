"""Losses at rising learning rates, whatever the framework: a few steps of its own loop, undone afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from whet.data import Batches
from whet.errors import DataError
from whet.graph.epochs import Epochs, TrainingRun
from whet.numerics.learning_rates import diverged
from whet.progress import task
from whet.specs import Prune, Train


def search_spec(spec: Train, rate: float) -> Train:
    """`spec` without what a search does not ask: one epoch at a constant rate, nothing pruned, nothing stopped."""
    apply = tuple(item for item in spec.apply if not isinstance(item, Prune))
    return replace(spec, epochs=1, learning_rate=rate, decay=None, apply=apply, early_stopping=None)


def search_run(run: TrainingRun) -> TrainingRun:
    """`run` without validation, checkpoint and log."""
    return replace(run, val=None, metric=None, checkpoint=None, log=None)


def search(loop: Epochs, rates: Sequence[float]) -> list[float]:
    """The loss of a step at each of `rates`, until it diverges; the model has its weights and statistics back afterwards.

    Steps that a side leaves out (a batch of one example) take no rate.
    """
    given, losses = loop.given, list[float]()
    begun = loop.snapshot()
    with loop.training_mode(), task("Learning rate", len(rates), enabled=given.progress) as shown:
        try:
            for inputs, targets in _endless(given.train, given.seed):
                loop.set_rate(rates[len(losses)])
                loss = loop.train_on(inputs, targets, f"step {loop.step} at learning rate {rates[len(losses)]:.3g}")
                loop.step += 1
                if loss is None:
                    if not losses and loop.step >= len(given.train):
                        raise DataError("No batch of train can be trained on alone. Use larger batches.")
                    continue
                losses.append(loss)
                loop.masker.hold()
                shown.advance(1, f"rate {rates[len(losses) - 1]:.2g}, loss {loss:.3g}")
                if len(losses) == len(rates) or diverged(losses):
                    break
        finally:
            loop.restore(begun)
    return losses if math.isfinite(losses[-1]) else losses[:-1]


def _endless(train: Batches, seed: int) -> Iterator[tuple[Any, Any]]:
    """One shuffled epoch after another."""
    while True:
        yield from train.shuffled(seed)
        seed += 1
