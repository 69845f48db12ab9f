"""Native converters and runtimes: in processes of their own, and without their chatter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt

from whet.errors import ExportError, require

SECONDS = 1800


def run_script(
    script: Path, arguments: Sequence[Path], made: Path, what: str, name: str, environment: Mapping[str, str]
) -> None:
    """Run `script` in a process of its own, which must write `made`: native code may end the process it runs in.

    Raises:
        ExportError: it does not; with the process's own words. what: who failed; name: the model's.
    """
    quieter = {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-P", str(script), *(str(argument) for argument in arguments)]
    try:
        done = subprocess.run(
            command, env={**os.environ, **quieter, **environment}, capture_output=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as cause:
        raise ExportError(f"{what} did not finish on the model {name!r}: {cause}") from cause
    if done.returncode != 0 or not made.exists():
        raise ExportError(f"{what} failed on the model {name!r}: {reason(done)}")


def reason(done: subprocess.CompletedProcess[bytes]) -> str:
    """What a failed process says: its error message, else the signal that ended it."""
    lines = [line.strip() for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror:" in line]
    said = errors[-1] if errors else lines[-1] if lines else "it said nothing"
    ended = f"it was ended by signal {-done.returncode}; " if done.returncode < 0 else ""
    return f"{ended}{said[:600]}"


Arrays = Sequence[npt.NDArray[Any]]


def run_tflite(content: bytes, arrays: Arrays, name: str) -> list[npt.NDArray[Any]]:
    """The outputs of a .tflite file for `arrays`, its inputs, in its order.

    Raises:
        ExportError: LiteRT cannot open or run it.
    """
    package = require("ai_edge_litert.interpreter", "litert", "Writing a .tflite file")
    try:
        with quiet():
            interpreter = package.Interpreter(model_content=content, num_threads=1)
            details = interpreter.get_input_details()
            for item, array in zip(details, arrays, strict=True):
                interpreter.resize_tensor_input(item["index"], array.shape)
            interpreter.allocate_tensors()
        for item, array in zip(details, arrays, strict=True):
            interpreter.set_tensor(item["index"], array.astype(item["dtype"]))
        interpreter.invoke()
        return [interpreter.get_tensor(item["index"]) for item in interpreter.get_output_details()]
    except (RuntimeError, ValueError) as cause:
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise ExportError(f"LiteRT cannot run the file made of the model {name!r}: {lines[0][:300]}") from cause


@contextmanager
def quiet() -> Iterator[None]:
    """Standard error closed to native code, which announces its optimizers and delegates there and raises what matters."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
