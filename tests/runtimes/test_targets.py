import importlib.util

import pytest

from whet.runtimes.targets import FRAMEWORKS, RUN, WRITE, available, needed
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


def uses(target, modules):
    """Whether the target lacks something without `modules`: to run, to write, or of every framework that writes it."""
    frameworks = [set(needed(target, name)) & set(modules) for name in target.frameworks]
    return bool(set(modules) & {*RUN[target.runtime], *WRITE[target.runtime]}) or all(frameworks)


@pytest.mark.parametrize(
    ("missing", "name", "runs", "install"),
    [
        (("onnxruntime",), "onnxruntime", False, "pip install 'whet[onnx]'"),
        (("onnxscript",), "onnxruntime", True, "pip install 'whet[onnx]'"),
        (("torch", "keras"), "onnxruntime", True, "pip install 'whet[torch]'"),
        (("torch", "keras", "onnx"), "onnxruntime-portable", False, "pip install 'whet[torch,onnx]'"),
        (("ai_edge_litert",), "litert", False, "pip install 'whet[litert]'"),
        (("tensorflow", "litert_torch"), "litert", True, "pip install 'whet[keras]'"),
        (("torch",), "torch", False, "pip install 'whet[torch]'"),
    ],
)
def test_what_is_missing_names_its_extra(monkeypatch, missing, name, runs, install):
    hide(monkeypatch, *missing)
    target = next(target for target in available() if target.name == name)
    assert (target.runs, target.exports, target.install) == (runs, False, install)
    assert set(target.missing) <= set(missing) and len(target.missing) == len(set(target.missing))
    assert all(module in str(target) for module in target.missing)
    for other in available():
        assert other.exports != uses(TARGETS[other.name], missing)


def test_one_framework_of_several_is_enough(monkeypatch):
    hide(monkeypatch, "torch")
    assert next(target for target in available() if target.name == "onnxruntime").exports


def test_every_target_describes_its_rules():
    for target in TARGETS.values():
        lines = target.describe()
        assert lines and all(line and "\n" not in line for line in lines)
        assert ("nothing is quantized" in lines[0]) == (not target.compute)
