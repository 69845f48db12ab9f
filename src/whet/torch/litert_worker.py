"""Run as a script in a process of its own: programs of torch.export to float .tflite files, by litert-torch.

The converter is native code, and litert-torch brings JAX with it; there is nothing of Whet in this process. Arguments: a JSON
file that maps programs (.pt2) to the paths to write, and the path of the last of these.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(job: dict[str, str]) -> None:
    """Convert each program in `job`."""
    import litert_torch
    import torch

    for program, made in job.items():
        exported = torch.export.load(program)
        args, kwargs = exported.example_inputs
        module = exported.module(check_guards=False)
        litert_torch.convert(module, tuple(args), dict(kwargs) or None).export(made)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
