"""Which targets this machine can export to and run. Nothing is imported to find out."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from whet.specs.target import TARGETS, Target

# Modules that running a file of the runtime needs, and those that writing one needs besides.
RUN = {
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("openvino",),
    "litert": ("ai_edge_litert",),
    "executorch": ("executorch", "torch"),
    "torch": ("torch",),
    "keras": ("keras",),
    "tensorflow": ("tensorflow",),
}
WRITE = {
    "onnxruntime": ("onnxscript",),
    "openvino": ("onnx", "onnxscript"),
    "litert": ("flatbuffers",),
    "executorch": (),
    "torch": (),
    "keras": (),
    "tensorflow": (),
}
FRAMEWORKS = {"torch": ("torch",), "keras": ("keras", "tensorflow")}
BESIDES = {("litert", "torch"): ("litert_torch",)}  # what one framework needs besides to write a runtime's files


@dataclass(frozen=True, slots=True)
class Availability:
    """A target on this machine.

    runs, exports: whether its files can be run, and written. missing: the modules that lack. install: the command that
    brings them, None when nothing lacks.
    """

    name: str
    frameworks: tuple[str, ...]
    suffix: str
    runs: bool
    exports: bool
    missing: tuple[str, ...]
    install: str | None

    def __str__(self) -> str:
        about = f"{self.name} ({self.suffix}, from {' or '.join(self.frameworks)})"
        if not self.missing:
            return f"{about}: ready"
        can = "runs files, cannot export" if self.runs else "not available"
        return f"{about}: {can}; missing {', '.join(self.missing)}: {self.install}"


def available() -> list[Availability]:
    """Every target that Whet knows, and whether it can be used here."""
    return [_look(target) for target in TARGETS.values()]


def needed(target: Target, framework: str) -> tuple[str, ...]:
    """The modules with which models of `framework` are written for `target`, beside those that every framework needs."""
    return FRAMEWORKS[framework] + BESIDES.get((target.runtime, framework), ())


def _look(target: Target) -> Availability:
    def lacking(modules: tuple[str, ...]) -> list[str]:
        return [module for module in modules if find_spec(module) is None]

    run, write = lacking(RUN[target.runtime]), lacking(WRITE[target.runtime])
    # One of its frameworks is enough; what the first of them lacks is what an empty machine is told to install.
    found = [name for name in target.frameworks if not lacking(needed(target, name))]
    framework = [] if found else lacking(FRAMEWORKS[target.frameworks[0]])
    missing = tuple(dict.fromkeys((*run, *write, *framework)))
    extras = ([target.frameworks[0]] if framework else []) + ([target.extra] if run or write else [])
    install = f"pip install 'whet[{','.join(dict.fromkeys(extras))}]'" if extras else None
    return Availability(target.name, target.frameworks, target.suffix, not run, not missing, missing, install)
