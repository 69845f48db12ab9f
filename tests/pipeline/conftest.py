import pytest

from bench import FRAMEWORKS, bench, convert_in_process, few_runs, registry_once


@pytest.fixture(params=FRAMEWORKS)
def b(request):
    """The bench of each framework."""
    return bench(request.param)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    convert_in_process(monkeypatch)
    few_runs(monkeypatch)
    registry_once(monkeypatch)
