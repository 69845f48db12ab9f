"""Whole layers removed until the exported file runs in a given time, measured."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from whet.data import Batches
from whet.errors import BudgetError
from whet.graph.block_choice import Left
from whet.graph.shortcuts import Block, Blocks
from whet.numerics.knapsack import cheapest_within
from whet.pipeline.blocks import measured_blocks, step_of
from whet.pipeline.compressed import Compressed
from whet.pipeline.latency import Trial, asked, best_of, exported, impossible, record_of, rounds, time_files
from whet.pipeline.latency_table import Table
from whet.progress import task
from whet.records import Step
from whet.specs import Prune, Target

_NANO = 1e6  # nanoseconds of a millisecond: the knapsack weighs in integers


def remove_blocks_to_latency(
    compressed: Compressed, spec: Prune, data: Batches | None, target: Target, *, progress: bool
) -> Step:
    """*In place*: remove whole layers until the exported file needs `spec.latency` at most: one row, one thread.

    Of layers that are alike (MACs, parameters and bytes) one is removed on trial, and the file timed beside the original. Of
    all choices that save enough by these times the one of least total importance leaves; the file is then measured, and the
    choice made again by what was seen, in at most three rounds.

    Raises:
        SpecError: the criterion needs targets, or the model is fast enough as it is. ModelError: it cannot become so fast.
    """
    started = time.perf_counter()
    found = _fresh(compressed)
    known = measured_blocks(compressed, found, spec, data)
    importance = dict(known.measure(()))
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        file = exported(compressed, compressed.float_model, target, Path(folder) / f"original{target.suffix}")
        original, limit = asked(compressed, spec, file)

        def tried(names: list[str], number: int, loss: float, predicted: float) -> Trial:
            made = _fresh(compressed)
            model, masks = made.remove(names, compressed.masks)
            path = exported(compressed, model, target, Path(folder) / f"{number}{target.suffix}")
            before, after = (float(np.median(times.ms)) for times in time_files(compressed, [file, path]))
            step = step_of(spec, found, known, Left(tuple(names), importance))
            return Trial(model, masks, step, loss, predicted, after, before)

        alike: dict[tuple[int, int, int], list[Block]] = {}
        for block in known.blocks:
            alike.setdefault((block.macs, block.parameters, block.bytes), []).append(block)
        saved: dict[str, float] = {}
        with task("timing layers", len(alike), enabled=progress) as bar:
            for number, group in enumerate(alike.values()):
                trial = tried([group[0].name], -1 - number, 0.0, original)
                saved |= dict.fromkeys((block.name for block in group), max((1 - trial.ms / trial.original) * original, 0.0))
                bar.advance(1)

        def choose(wanted: float) -> tuple[list[str], float, float]:
            names = _least(importance, saved, wanted)
            return names, sum(importance[name] for name in names), original - sum(saved[name] for name in names)

        try:
            trials = rounds(choose, tried, limit / original, original)
        except BudgetError as cause:
            raise impossible(spec, original, limit, original - sum(saved.values())) from cause
    best = best_of(trials, limit / original)
    compressed.float_model, compressed.masks = best.model, best.masks
    table = Table((), tuple({"name": name, "saved_ms": ms} for name, ms in saved.items()), len(alike), target.name)
    told = record_of(target, table, trials, best, original, limit / original)
    control = {**(best.step.control or {}), "latency": told}
    return replace(best.step, seconds=time.perf_counter() - started, control=control)


def _fresh(compressed: Compressed) -> Blocks:
    """The blocks of a copy of the model, which may be cut."""
    side = compressed.side
    found: Blocks = side.blocks(side.copy(compressed.float_model), compressed.example)
    return found


def _least(importance: dict[str, float], saved: dict[str, float], wanted: float) -> list[str]:
    """Of all choices of blocks that save `wanted` ms the one of least total importance.

    Raises:
        BudgetError: all together save less.
    """
    names = list(saved)
    weights = [(round(saved[name] * _NANO), 0) for name in names]
    budget = sum(stays for stays, _ in weights) - int(np.ceil(wanted * _NANO))
    if budget < 0:
        raise BudgetError(f"All layers that can leave save {sum(saved.values()):.3g} ms of {wanted:.3g}.", -budget)
    choice = cheapest_within([(0.0, importance[name]) for name in names], weights, budget)
    return [name for name, leaves in zip(names, choice.options, strict=True) if leaves]
