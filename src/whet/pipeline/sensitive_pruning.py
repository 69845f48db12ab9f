"""Sparsities by sensitivity: each layer alone is tried at several, and the least sum of damages is taken."""

from __future__ import annotations

import glob
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from whet.data import Batches, leaves
from whet.errors import BudgetError, ModelError
from whet.graph.removable import Removable
from whet.numerics.knapsack import cheapest_within
from whet.numerics.layers import output_error
from whet.pipeline.compressed import Compressed
from whet.progress import task
from whet.records import Step
from whet.specs import BySensitivity, Prune, Uniform, to_dict

Told = tuple[Step, list[dict[str, Any]]]
_GRID = 64  # parts of a layer between which damages are interpolated


def prune_by_sensitivity(compressed: Compressed, spec: Prune, data: Batches | None, *, progress: bool) -> Step:
    """*In place*: prune every layer as far as it bears it, together to `spec.sparsity`.

    Damage is measured on the first batches of `data`, without it on the example: the error of the model's outputs when this
    layer alone is pruned. Damages are taken to add up; the choice is an exact multiple-choice knapsack.

    Raises:
        ModelError: nothing would change. SpecError: the criterion needs data.
    """
    started = time.perf_counter()
    batches = spec.allocation.batches if isinstance(spec.allocation, BySensitivity) else 1
    inputs = [compressed.example] if data is None else [given for given, _ in itertools.islice(data, batches)]
    step, rows = (_channels if spec.removes else _masks)(compressed, spec, data, inputs, progress)
    control = {"sensitivity": {"layers": rows, "batches": len(inputs)}}
    return replace(step, spec=to_dict(spec), seconds=time.perf_counter() - started, control=control)


def _trials(spec: Prune) -> list[float]:
    """The sparsities that every layer is tried at, rising, without 0."""
    found = spec.allocation if isinstance(spec.allocation, BySensitivity) else BySensitivity()
    return [found.most * (i + 1) / found.trials for i in range(found.trials)]


def _flat(predict: Callable[[Any], Any], inputs: Sequence[Any]) -> list[Any]:
    return [leaf for given in inputs for leaf in map(np.asarray, leaves(predict(given))) if leaf.dtype.kind == "f"]


def _damage(reference: list[Any], found: list[Any], name: str) -> float:
    error = output_error(reference, found)
    if not np.isfinite(error):
        raise ModelError(f"With {name!r} pruned alone the model's outputs are not finite. Name it in keep=.")
    return error


# --- masks


def _masks(compressed: Compressed, spec: Prune, data: Batches | None, inputs: list[Any], progress: bool) -> Told:
    side, trials = compressed.side, _trials(spec)
    plain = replace(spec, allocation=Uniform())

    def pruned(model: Any, name: str, sparsity: float, masks: Any) -> Any:
        one = replace(plain, sparsity=sparsity, include=(glob.escape(name),))
        return side.prune(model, one, masks=masks, data=data)

    work = side.copy(compressed.float_model)
    with side.kept(work):
        _, probe = side.prune(work, plain, masks=compressed.masks, data=data)
    sizes = {row["name"]: int(row["parameters"]) for row in probe.changed if "sparsity" in row}
    reference = _flat(lambda given: side.predict(work, given), inputs)
    damages: dict[str, list[float]] = {}
    with task("Sensitivity", len(sizes) * len(trials), enabled=progress) as bar:
        for name in sizes:
            damages[name] = []
            for sparsity in trials:
                with side.kept(work):
                    pruned(work, name, sparsity, compressed.masks)
                    damages[name].append(_damage(reference, _flat(lambda given: side.predict(work, given), inputs), name))
                bar.advance(note=name)
    counts = _counts(sizes, damages, trials, plain.fraction)
    masks, changed = compressed.masks, dict[str, Any]()
    for name, count in counts.items():
        if count:
            masks, step = pruned(compressed.float_model, name, count / sizes[name], masks)
            changed |= {row["name"]: row for row in step.changed}
    if not changed:
        raise ModelError(
            f"Prune would change nothing: sparsity {plain.fraction:g} removes less than one weight. Raise sparsity=."
        )
    compressed.masks = masks
    rows = [{"name": name, "sparsity": counts[name] / sizes[name], "tried": damages[name]} for name in sizes]
    return replace(probe, changed=tuple(changed.values())), rows


def _counts(sizes: dict[str, int], damages: dict[str, list[float]], trials: list[float], sparsity: float) -> dict[str, int]:
    """How many weights each layer loses, together exactly the sparsity asked for."""
    costs, weights, options = [], [], []
    for name, size in sizes.items():
        steps = sorted({round(trials[-1] * size * i / _GRID) for i in range(_GRID + 1)})
        cost = np.interp([step / size for step in steps], [0.0, *trials], [0.0, *damages[name]])
        costs.append([float(value) for value in cost])
        weights.append([size - step for step in steps])
        options.append(steps)
    total, wanted = sum(sizes.values()), round(sparsity * sum(sizes.values()))
    try:
        choice = cheapest_within(costs, weights, total - wanted)
    except BudgetError as cause:
        raise ModelError(
            f"Sparsity {sparsity:g} is more than BySensitivity(most={trials[-1]:g}) lets all layers lose together: {cause}"
        ) from cause
    counts = [steps[option] for steps, option in zip(options, choice.options, strict=True)]
    excess = sum(counts) - wanted
    for index in sorted(range(len(counts)), key=lambda i: -costs[i][choice.options[i]]):  # the most damaged takes back first
        back = min(excess, counts[index])
        counts[index], excess = counts[index] - back, excess - back
    return dict(zip(sizes, counts, strict=True))


# --- channels and heads


def _channels(compressed: Compressed, spec: Prune, data: Batches | None, inputs: list[Any], progress: bool) -> Told:
    side, trials = compressed.side, _trials(spec)
    found = side.removable(compressed.float_model, spec, example=compressed.example, data=data)
    options = [
        found.options(family, round_to=spec.round_to, most=len(trials) + 1, least_kept=1 - trials[-1])
        for family in found.families
    ]
    reference = _flat(found.predict, inputs)
    costs: list[list[float]] = []
    with task("Sensitivity", sum(map(len, options)), enabled=progress) as bar:
        for index, family in enumerate(found.families):
            costs.append([_silent(found, options, index, option, inputs, reference) for option in range(len(options[index]))])
            bar.advance(len(options[index]), note=family.layer)
    groups = [len(family) for family in found.families]
    wanted = round(spec.fraction * sum(groups))
    kept = [[size - lost for lost in row] for size, row in zip(groups, options, strict=True)]
    try:
        choice = cheapest_within(costs, kept, sum(groups) - wanted)
    except BudgetError as cause:
        raise ModelError(
            f"Sparsity {spec.fraction:g} is more than the layers can lose with round_to={spec.round_to} and "
            f"BySensitivity(most={trials[-1]:g}): {cause}"
        ) from cause
    lost = [row[option] for row, option in zip(options, choice.options, strict=True)]
    if not any(lost):
        raise ModelError(f"Prune would remove nothing at sparsity {spec.fraction:g}. Raise sparsity= or lower round_to=.")
    cut = Prune(granularity=found.named(lost), rebuild=spec.rebuild, reconstruct=spec.reconstruct)
    compressed.float_model, compressed.masks, step = side.remove(
        compressed.float_model, cut, example=compressed.example, masks=compressed.masks, data=data, progress=progress
    )
    rows = [
        {"name": family.name, "sparsity": count / len(family), "tried": costs[index], "options": options[index]}
        for index, (family, count) in enumerate(zip(found.families, lost, strict=True))
    ]
    return step, rows


def _silent(found: Removable, options: list[list[int]], family: int, option: int, inputs: list[Any], reference: Any) -> float:
    """The damage of one family that loses so many groups, silenced."""
    if option == 0:
        return 0.0
    lost = [options[family][option] if index == family else 0 for index in range(len(options))]
    with found.silenced(found.gone(lost)):
        return _damage(reference, _flat(found.predict, inputs), found.families[family].name)
