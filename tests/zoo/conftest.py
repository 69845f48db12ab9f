import pytest

from bench import FRAMEWORKS, bench, convert_in_process


@pytest.fixture(params=FRAMEWORKS)
def b(request):
    """The bench of each framework."""
    return bench(request.param)


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    convert_in_process(monkeypatch)
