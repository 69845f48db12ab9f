import pytest

from bench import convert_in_process


@pytest.fixture(autouse=True, scope="module")
def converter():
    """TensorFlow's converter in this process, which has loaded it already; `its_own_process` runs it as Whet does."""
    with pytest.MonkeyPatch.context() as patch:
        convert_in_process(patch)
        yield patch


@pytest.fixture
def its_own_process(converter):
    converter.undo()
    yield
    convert_in_process(converter)
