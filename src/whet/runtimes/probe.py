"""What a process needs that only opens a file and runs it once: `python -m whet.runtimes.probe FILE [THREADS]`.

It prints one line of JSON, `{"rss_before_bytes", "rss_imported_bytes", "rss_loaded_bytes", "peak_rss_bytes", "import_s",
"load_s", "first_run_s"}`: resident memory before the runtime is imported, after, and with the file open; the most that the
process ever held, after one run on zeros at a batch of 1; the seconds of importing the runtime, of opening the file, of
that run. Nothing is subtracted. The file may be in the system's cache; the process is new, and everything in it is cold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TIMEOUT_S = 120


def probe(path: str | os.PathLike[str], *, threads: int = 1) -> dict[str, Any]:
    """Run this module on `path` in a fresh process. Where that fails: `{"reason"}`, as the rest of the evidence stands."""
    command = [sys.executable, "-m", "whet.runtimes.probe", os.fspath(path), str(threads)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"reason": f"opening and running the file in a fresh process took longer than {TIMEOUT_S} s"}
    except OSError as cause:
        return {"reason": f"a fresh process could not be started: {cause.strerror or cause}"}
    lines = ran.stdout.strip().splitlines()
    if ran.returncode != 0 or not lines:
        said = ran.stderr.strip().splitlines()
        return {"reason": f"the fresh process failed ({ran.returncode}): {said[-1] if said else 'it said nothing'}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def look(path: Path, threads: int) -> dict[str, Any]:
    """What `probe` reports, of this process. Meaningful only where nothing was imported before."""
    found: dict[str, Any] = {"rss_before_bytes": resident()}
    start = time.perf_counter()
    from whet.runtimes.sessions import check_file, open_session, runtime_of

    runtime_of(check_file(path)).load()
    found |= {"import_s": time.perf_counter() - start, "rss_imported_bytes": resident()}
    start = time.perf_counter()
    session = open_session(path, threads=threads)
    found |= {"load_s": time.perf_counter() - start, "rss_loaded_bytes": resident()}
    inputs = zeros(session)
    start = time.perf_counter()
    session.run(inputs)
    return found | {"first_run_s": time.perf_counter() - start, "peak_rss_bytes": peak()}


def zeros(session: Any) -> Any:
    """One example of zeros for `session`; a size that is open is 1."""
    import numpy as np

    shapes = [tuple(size or 1 for size in slot.shape) for slot in session.inputs]
    return tuple(np.zeros(shape, slot.dtype) for shape, slot in zip(shapes, session.inputs, strict=True))


def resident() -> int | None:
    """Bytes of memory that this process holds now; None where the system does not tell."""
    return _status("VmRSS")


def peak() -> int | None:
    """The most bytes of memory that this process ever held."""
    found = _status("VmHWM")  # getrusage's maximum is inherited from the process that started this one
    if found is not None or sys.platform == "win32":
        return found
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _status(key: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    line = next((line for line in text.splitlines() if line.startswith(f"{key}:")), None)
    return None if line is None else int(line.split()[1]) * 1024


def main(arguments: list[str]) -> int:
    """Print what `look` finds. Returns 2 for an error, which goes to standard error."""
    from whet.errors import WhetError

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        found = look(Path(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 1)
    except WhetError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
