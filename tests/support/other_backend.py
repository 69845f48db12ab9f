"""Programs under another backend of Keras, in one process for each backend: loading it takes longer than they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

SERVER = r"""
import contextlib, io, json, sys, traceback
answers, sys.stdout = sys.stdout, sys.stderr
import keras
for line in sys.stdin:
    job = json.loads(line)
    keras.backend.clear_session()
    sys.argv, printed, error = ["program", *job["arguments"]], io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(job["code"], "program", "exec"), {"__name__": "__main__"})
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps({"printed": printed.getvalue(), "error": error}), file=answers, flush=True)
"""


@cache
def _process(backend: str) -> subprocess.Popen[str]:
    """A process that runs what it is told until this one ends, and with it the pipe."""
    support = str(Path(__file__).parent)
    quiet = {"KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    quiet |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}  # JAX then sees two devices; it computes on the first
    path = os.pathsep.join([support, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env={**os.environ, **quiet, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def run_under(backend: str, code: str, *arguments: object) -> str:
    """What `code` prints under `backend`, as a main program with these arguments.

    Raises:
        AssertionError: it raised, with its traceback, or ended its process.
    """
    process = _process(backend)
    process.stdin.write(json.dumps({"code": code, "arguments": [str(argument) for argument in arguments]}) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        _process.cache_clear()
        raise AssertionError(f"The process under {backend} ended with {process.wait()}.")
    answer = json.loads(line)
    if answer["error"]:
        raise AssertionError(answer["error"][-3000:])
    return answer["printed"]
