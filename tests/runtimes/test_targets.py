import importlib.util

import pytest

from whet.runtimes.targets import FRAMEWORKS, RUN, WRITE, available
from whet.specs.target import TARGETS


def hide(monkeypatch, *modules):
    real = importlib.util.find_spec
    monkeypatch.setattr("whet.runtimes.targets.find_spec", lambda name: None if name in modules else real(name))


def test_every_target_is_known_to_every_table():
    assert [target.name for target in available()] == list(TARGETS)
    for target in TARGETS.values():
        assert target.runtime in RUN and target.runtime in WRITE and set(target.frameworks) <= set(FRAMEWORKS)


def test_what_is_installed_is_ready():
    for target in available():
        assert target.runs and target.exports and target.install is None and str(target).endswith("ready")


@pytest.mark.parametrize(
    ("missing", "name", "runs", "install"),
    [
        (("onnxruntime",), "onnxruntime", False, "pip install 'whet[onnx]'"),
        (("onnxscript",), "onnxruntime", True, "pip install 'whet[onnx]'"),
        (("torch", "keras"), "onnxruntime", True, "pip install 'whet[torch]'"),
        (("torch", "keras", "onnx"), "onnxruntime", False, "pip install 'whet[torch,onnx]'"),
        (("ai_edge_litert",), "litert", False, "pip install 'whet[litert]'"),
        (("tensorflow",), "litert", True, "pip install 'whet[keras]'"),
    ],
)
def test_what_is_missing_names_its_extra(monkeypatch, missing, name, runs, install):
    hide(monkeypatch, *missing)
    target = next(target for target in available() if target.name == name)
    assert (target.runs, target.exports, target.install) == (runs, False, install)
    assert set(target.missing) == set(missing) - {"keras"} and missing[0] in str(target)  # torch is the first of two
    for other in available():
        needed = {*RUN[other.runtime], *WRITE[other.runtime]}
        ways = [needed | set(FRAMEWORKS[framework]) for framework in other.frameworks]
        assert other.exports == any(not way & set(missing) for way in ways)
