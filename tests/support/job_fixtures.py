"""What the tests of whole jobs share: a bench of each framework, and files that are made and timed quickly."""

from __future__ import annotations

from typing import Any

import pytest

from bench import FRAMEWORKS, bench, convert_in_process, few_runs, registry_once


@pytest.fixture(params=FRAMEWORKS)
def b(request: Any) -> Any:
    """The bench of each framework."""
    return bench(request.param)


@pytest.fixture(autouse=True)
def quick(monkeypatch: Any) -> None:
    """Files are converted here and timed a few times."""
    convert_in_process(monkeypatch)
    few_runs(monkeypatch)
    registry_once(monkeypatch)
