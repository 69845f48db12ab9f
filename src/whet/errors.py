"""Every error that Whet raises on purpose.

All derive from `WhetError` and from the builtin a caller would expect (`ValueError`, `ImportError`, …). A message says
what went wrong, where, what was got, what is allowed and what to do next.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class WhetError(Exception):
    """Base of all errors raised by Whet."""


class SpecError(WhetError, ValueError):
    """A spec (`Prune(…)`, `Quantize(…)`, a recipe file) holds a value that is not allowed."""


class DataError(WhetError, ValueError):
    """The data given cannot be used: empty, exhausted, of the wrong shape, or holding NaN or Inf."""


class MetricError(WhetError, ValueError):
    """A metric returned something that is not a finite score per example."""


class ModelError(WhetError, ValueError):
    """The model cannot be compressed as it is: NaN weights, an unsupported kind, nothing to change."""


class TargetError(WhetError, ValueError):
    """The target is unknown or cannot take what was asked of it."""


class BudgetError(WhetError, ValueError):
    """No choice fits the budget. `least` is the least that can be reached, in the budget's unit."""

    def __init__(self, message: str, least: float = float("nan")) -> None:
        super().__init__(message)
        self.least = least


class ExportError(WhetError, RuntimeError):
    """A file could not be exported, or the exported file does not do what it must."""


class RuntimeFileError(WhetError, RuntimeError):
    """A runtime cannot read or run a file."""


class OutputError(WhetError, OSError):
    """An output path exists, cannot be written, or lacks space."""


class MissingExtraError(WhetError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or say which extra of Whet brings it.

    Raises:
        MissingExtraError: the module is not installed, or it is and its import fails (the cause is chained).
    """
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise MissingExtraError(
            f"{purpose} needs the package {module!r}, which could not be imported ({cause}). "
            f"Install it with: pip install 'whet[{extra}]'"
        ) from cause
