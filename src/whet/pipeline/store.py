"""Saving and loading a `Compressed`: whet.json, the framework's float weights, and safetensors for scales and masks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from whet.data import leaves
from whet.errors import OutputError, RuntimeFileError
from whet.files import replacing
from whet.graph.placement import Plan
from whet.graph.views import Masks
from whet.numerics.affine import QParams
from whet.numerics.codebook import Codebook
from whet.pipeline.compressed import Compressed
from whet.pipeline.side import side_named
from whet.records import Step
from whet.specs import Int, from_dict, to_dict
from whet.specs.schemes import SCHEMES

FORMAT = 1
INDEX, ARRAYS = "whet.json", "whet.safetensors"


def save(compressed: Compressed, folder: Path, *, overwrite: bool = False) -> Path:
    """Write `folder` whole or not at all, after reading it back and comparing.

    Raises:
        OutputError: `folder` exists and `overwrite` is false, cannot be written, or does not read back the same.
        SpecError: a spec holds a function that cannot be imported again.
    """
    if overwrite and folder.exists() and not (folder / INDEX).exists():
        raise OutputError(f"{str(folder)!r} was not written by Whet and will not be replaced. Choose another folder.")
    with replacing(folder, overwrite=overwrite) as temporary:
        temporary.mkdir()
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        index = {
            "format": FORMAT,
            "framework": compressed.side.FRAMEWORK,
            "seed": compressed.seed,
            "model": compressed.side.save_model(compressed.float_model, temporary),
            "plan": _plan_to_dict(compressed.plan, arrays),
            "masks": _masks_to_dict(compressed.masks, arrays),
            "example": _example_to_dict(compressed.example, arrays),
            "steps": [step.to_dict() for step in compressed.steps],
            "measured": compressed.data,
        }
        (temporary / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        # safetensors writes memory as it lies, whatever the strides say
        save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, temporary / ARRAYS)
        _check_round_trip(compressed, temporary)
    return folder


def load(folder: str | os.PathLike[str], model: Any = None) -> Compressed:
    """The `Compressed` saved in `folder`. Nothing in it is executed or unpickled.

    `model` rebuilds the original: for PyTorch an instance or a callable that returns one; optional for Keras.

    Raises:
        RuntimeFileError: no such folder, a file is missing or damaged, or another format.
        ModelError: `model` is needed, or does not fit the saved weights.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        arrays = load_file(folder / ARRAYS)
    except OSError as cause:
        raise RuntimeFileError(f"{str(folder)!r} is not a folder written by Compressed.save(): {cause}.") from cause
    except Exception as cause:  # json and safetensors raise their own kinds; all mean a damaged file
        raise RuntimeFileError(f"A file in {str(folder)!r} is damaged: {cause}") from cause
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        got = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise RuntimeFileError(f"This Whet reads folders of format {FORMAT}; {str(folder)!r} has format {got!r}.")
    try:
        framework, kept, seed, measured = index["framework"], index["model"], index["seed"], index["measured"]
        example = _example_from_dict(index["example"], arrays)
        plan, masks = _plan_from_dict(index["plan"], arrays), _masks_from_dict(index["masks"], arrays)
        steps = tuple(Step.from_dict(step) for step in index["steps"])
    except (KeyError, IndexError, TypeError, AttributeError) as cause:
        raise RuntimeFileError(f"A file in {str(folder)!r} is damaged: {type(cause).__name__} {cause}.") from cause
    side = side_named(framework)
    return Compressed(side, side.load_model(folder, kept, model), example, plan, masks, steps, seed, measured)


def _check_round_trip(compressed: Compressed, folder: Path) -> None:
    """Load what was written into another copy of the model and compare outputs on the example."""
    side = compressed.side
    again = load(folder, side.copy(compressed.float_model))
    if compressed.example is None:
        return
    before = leaves(side.predict(compressed.model, compressed.example))
    after = leaves(side.predict(again.model, compressed.example))
    for left, right in zip(before, after, strict=True):
        if not np.array_equal(left, right):
            worst = float(np.max(np.abs(np.asarray(left, np.float64) - np.asarray(right, np.float64))))
            raise OutputError(
                f"The saved model does not read back the same (outputs differ by {worst:.3g}); nothing was written."
            )


def _plan_to_dict(plan: Plan | None, arrays: dict[str, Any]) -> dict[str, Any] | None:
    if plan is None:
        return None

    def rows(kind: str, quantizers: Mapping[str, QParams | Codebook]) -> dict[str, Any]:
        plain = {}
        for name, params in quantizers.items():
            second = "zero_point" if isinstance(params, QParams) else "levels"
            arrays[f"{kind}/{name}/scale"], arrays[f"{kind}/{name}/{second}"] = params.scale, getattr(params, second)
            plain[name] = {"spec": to_dict(params.spec), "axis": params.axis, "group": params.group}
        return plain

    for kind in ("tensors", "codes"):
        arrays |= {f"{kind}/{name}": array for name, array in getattr(plan, kind).items()}

    return {
        "spec": to_dict(plan.spec),
        "target": plan.target,
        "weights": rows("weights", plan.weights),
        "values": rows("values", plan.values),
        "biases": {name: list(pair) for name, pair in plan.biases.items()},
        "folds": [list(pair) for pair in plan.folds],
        "casts": dict(plan.casts),
        "dynamic": {name: to_dict(spec) for name, spec in plan.dynamic.items()},
        "tensors": list(plan.tensors),
        "codes": list(plan.codes),
    }


def _plan_from_dict(plain: dict[str, Any] | None, arrays: dict[str, Any]) -> Plan | None:
    if plain is None:
        return None

    def quantizer(kind: str, name: str, row: dict[str, Any]) -> QParams | Codebook:
        spec, scale = from_dict(row["spec"]), arrays[f"{kind}/{name}/scale"]
        axis, group = row["axis"], row.get("group")
        group = None if group is None else (group[0], group[1])
        if isinstance(spec, Int):
            return QParams(scale, arrays[f"{kind}/{name}/zero_point"], spec, axis, group)
        if isinstance(spec, SCHEMES) and kind == "weights":
            return Codebook(arrays[f"{kind}/{name}/levels"], scale, spec, axis, group)
        raise RuntimeFileError(f"The saved quantizer of {name!r} has an unknown scheme: {spec!r}.")

    biases = {name: (pair[0], pair[1]) for name, pair in plain["biases"].items()}
    folds = tuple((pair[0], pair[1]) for pair in plain["folds"])
    weights = {name: quantizer("weights", name, row) for name, row in plain["weights"].items()}
    values = {
        name: params for name, row in plain["values"].items() if isinstance(params := quantizer("values", name, row), QParams)
    }
    return Plan(
        from_dict(plain["spec"]),
        plain["target"],
        weights,
        values,
        biases,
        folds,
        dict(plain.get("casts", {})),
        {name: from_dict(spec) for name, spec in plain.get("dynamic", {}).items()},
        {name: arrays[f"tensors/{name}"] for name in plain.get("tensors", ())},
        {name: arrays[f"codes/{name}"] for name in plain.get("codes", ())},
    )


def _masks_to_dict(masks: Masks, arrays: dict[str, Any]) -> dict[str, list[int]]:
    for name, mask in masks.items():
        arrays[f"masks/{name}"] = np.packbits(mask.astype(bool), axis=None)
    return {name: list(mask.shape) for name, mask in masks.items()}


def _masks_from_dict(shapes: dict[str, list[int]], arrays: dict[str, Any]) -> Masks:
    masks: Masks = {}
    for name, shape in shapes.items():
        bits = np.unpackbits(arrays[f"masks/{name}"], count=int(np.prod(shape)))
        masks[name] = bits.reshape(shape)
    return masks


def _example_to_dict(example: Any, arrays: dict[str, Any], path: str = "example") -> Any:
    """The structure of the example; its arrays go to `arrays`."""
    if example is None:
        return None
    if isinstance(example, dict):
        return {"dict": {key: _example_to_dict(item, arrays, f"{path}/{key}") for key, item in example.items()}}
    if isinstance(example, tuple | list):
        return {"tuple": [_example_to_dict(item, arrays, f"{path}/{i}") for i, item in enumerate(example)]}
    arrays[path] = np.ascontiguousarray(example)
    return {"array": path}


def _example_from_dict(plain: Any, arrays: dict[str, Any]) -> Any:
    if plain is None:
        return None
    if "dict" in plain:
        return {key: _example_from_dict(item, arrays) for key, item in plain["dict"].items()}
    if "tuple" in plain:
        return tuple(_example_from_dict(item, arrays) for item in plain["tuple"])
    return arrays[plain["array"]]
