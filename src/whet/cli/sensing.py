"""`whet sensitivity`: what each layer alone costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import typer

from whet.data import Batches, rows
from whet.errors import SpecError
from whet.files import replacing
from whet.pipeline.sensitivity import sensitivity
from whet.specs import Int, Quantize, Recipe


def show_sensitivity(
    found: dict[str, Any],
    *,
    bits: Sequence[int] | None,
    weights_only: bool,
    target: str | None,
    examples: int,
    out: Path | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Measure and print; `found` is what a job or files gave: model, train, val, metric, example, recipe.

    Raises:
        SpecError, DataError, ModelError: as `whet.sensitivity`. OutputError: `out` exists and `overwrite` is false.
    """
    result = sensitivity(
        found["model"],
        _specs(bits, found.get("recipe"), weights_only=weights_only),
        calibration=_first(found["train"], examples, "train", labels=False),
        val=_first(found["val"], examples, "val", labels=True),
        metric=found.get("metric"),
        target=target,
        example=found.get("example"),
        progress=not quiet,
    )
    if out is not None:
        with replacing(out, overwrite=overwrite) as temporary:
            temporary.write_text(json.dumps(result.to_dict(), indent=1), encoding="utf-8")
    typer.echo(str(result))


def _specs(bits: Sequence[int] | None, recipe: Any, *, weights_only: bool) -> list[Quantize]:
    """From --bits, or from the recipe, or at 8 and 4 bits."""
    if bits is not None:
        return [Quantize(Int(b), None) if weights_only else Quantize(Int(b)) for b in bits]
    steps = recipe.steps if isinstance(recipe, Recipe) else tuple(recipe or ())
    wanted = [step for step in steps if isinstance(step, Quantize)]
    if wanted and weights_only:
        raise SpecError("--weights-only goes with --bits; the recipe says itself what it quantizes.")
    return wanted or _specs((8, 4), None, weights_only=weights_only)


def _first(data: Any, examples: int, what: str, *, labels: bool) -> list[Any]:
    """The first batches, in a shuffled order, that together hold at least `examples` examples."""
    batches = Batches(data, what).shuffled(0)
    taken: list[Any] = []
    count = 0
    for inputs, targets in islice(batches, examples):
        taken.append((inputs, targets) if labels else (inputs, None))
        count += rows(inputs)
        if count >= examples:
            break
    return taken
