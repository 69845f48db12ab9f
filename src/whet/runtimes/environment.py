"""Where a measurement was made: what decides speed and results, and nothing that names a machine or a person."""

from __future__ import annotations

import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "whet",
    "numpy",
    "torch",
    "keras",
    "tensorflow",
    "tensorflow-cpu",
    "jax",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "executorch",
    "ai-edge-litert",
    "ai-edge-quantizer",
)
# The instructions that integer and 16-bit kernels choose by, as /proc/cpuinfo names them -> as people do.
_X86 = "avx avx2 fma avx512f avx512_vnni avx_vnni avx512_bf16 avx512_fp16 amx_int8 amx_bf16"
VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})  # any of them adds 8-bit products in 32 bits
X86 = {name: name for name in _X86.split()}
ARM = {"asimd": "neon", "asimdhp": "fp16", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve", "sve2": "sve2"}


def environment() -> dict[str, Any]:
    """Python, system, processor, memory and the versions of the packages that take part; none of them is imported.

    `{"python", "os", "machine", "cpu", "cores", "cpu_features", "memory_bytes", "packages"}`. What cannot be found out
    is None; `"cpu_features_reason"` then says why there are no features.
    """
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}".strip(),
        "machine": platform.machine(),
        "cpu": None,
        "cores": usable_cores(),
        "cpu_features": None,
        "memory_bytes": _memory(),
        "packages": _versions(),
    }
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        found["cpu"] = platform.processor() or None
        found["cpu_features_reason"] = f"read from /proc/cpuinfo, which {platform.system()} does not have"
        return found
    found["cpu"], features = parse_cpuinfo(text)
    found["cpu"] = found["cpu"] or platform.processor() or None
    if features is None:
        found["cpu_features_reason"] = "/proc/cpuinfo lists no features"
    else:
        found["cpu_features"] = features
    return found


def parse_cpuinfo(text: str) -> tuple[str | None, list[str] | None]:
    """`(model, features)` of the first processor in the text of /proc/cpuinfo; None for what it does not say."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    model = fields.get("model name") or fields.get("Hardware") or fields.get("Processor") or None
    flags, names = (fields["flags"], X86) if "flags" in fields else (fields.get("Features"), ARM)
    if flags is None:
        return model, None
    present = set(flags.split())
    return model, [name for flag, name in names.items() if flag in present]


def cpu_features() -> list[str] | None:
    """The first processor's instructions that kernels choose by; None where the system does not list them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return parse_cpuinfo(text)[1]


def usable_cores() -> int:
    """The processors this process may use, by affinity and by the container's quota (cgroup v2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):  # no container, or cgroup v1
        return count
    return count if quota == "max" else max(1, min(count, math.ceil(int(quota) / int(period))))


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _versions() -> dict[str, str]:
    found = {package: _version(package) for package in PACKAGES}
    return {package: number for package, number in found.items() if number is not None}


def _version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
