"""Everything about quantization that is measured: every section's tables, kept in one record.

    python benchmarks/quantization.py [--only uniform steps …] [--quick] [--record out/quantization.json]
    python benchmarks/tables.py out/quantization.json --into docs/quantization.md

Each section is a program of its own, with a docstring and options of its own, and runs in a process of its own, one after the
other. --quick runs a small part of each, to see that all of them work; its numbers mean nothing. All of it takes an hour or two
of a quiet core, the training runs half of that. What is printed by "adaptive" is not in the record.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tables

HERE = Path(__file__).resolve().parent
SECTIONS = {
    "uniform": ("uniform.py", "8, 4, 3 and 2 bits after calibration alone, and the peers"),
    "qat": ("qat.py", "4-bit weights and activations, trained"),
    "steps": ("qat_steps.py", "what a training step costs, beside torchao"),
    "keras": ("keras_quantization.py", "the same in Keras"),
    "keras-steps": ("keras_qat_steps.py", "what a training step costs in Keras"),
    "kmeans": ("kmeans.py", "k-means beside scikit-learn"),
    "gptq": ("gptq_speed.py", "GPTQ beside its matrix products"),
    "transformer": ("transformer_quantization.py", "banking77: static, at run time, 4 bits, outliers"),
    "int4": ("int4.py", "latency of 4-bit linear layers"),
    "adaptive": ("adaptive.py", "a scheme for every layer, and max_drop"),
}
UNRECORDED = {"adaptive": ["--frameworks", "torch", "--images", "400", "--averages", "4"]}  # and what they run when quick


def main() -> int:
    """Run the sections; how many of them failed."""
    options = tables.parser(__doc__)
    options.add_argument("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    given = options.parse_args()
    record = given.record or HERE.parent / "out" / ("quick.json" if given.quick else "quantization.json")
    failed = []
    for name in given.only:
        program, what = SECTIONS[name]
        print(f"\n## {name}: {what}", flush=True)
        if name in UNRECORDED:
            more = UNRECORDED[name] if given.quick else []
        else:
            more = ["--record", str(record), *(["--quick"] if given.quick else [])]
        command = [sys.executable, str(HERE / program), *more]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    print(f"\nThe tables are in {record}." + (f" Failed: {', '.join(failed)}." if failed else ""))
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
