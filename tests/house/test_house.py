"""The house stands as drawn: and the checks that say so are checked themselves, on houses that do not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import house_rules as rules
import whet

PACKAGE = Path(whet.__file__).parent
HEAVY = ["torch", "keras", "tensorflow", "onnx", "onnxruntime", "ai_edge_litert", "plotly", "sklearn", "jinja2"]


def build(tmp_path: Path, **files: str) -> Path:
    """A small package `whet` with the given modules: `numerics__bad="import os"` is numerics/bad.py, `init` is __init__.py."""
    package = tmp_path / "whet"
    for name, text in files.items():
        *folders, stem = name.split("__")
        path = package.joinpath(*folders, "__init__.py" if stem == "init" else f"{stem}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


def test_imports_run_one_way() -> None:
    assert rules.upward_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"numerics__bad": "from whet.graph.nodes import Node"}, "numerics.bad:1 imports whet.graph.nodes.Node from above"),
        ({"specs__bad": "import whet.pipeline.verbs"}, "specs.bad:1 imports whet.pipeline.verbs from above"),
        ({"numerics__bad": "def f():\n    from whet import torch"}, "numerics.bad:2 imports whet.torch from above"),
        ({"errors": "from . import specs"}, "errors:1 imports whet.specs from above"),
        ({"graph__sub__bad": "from ...pipeline import verbs"}, "graph.sub.bad:1 imports whet.pipeline.verbs from above"),
        ({"graph__bad": "from whet import compress"}, "graph.bad:1 imports whet.compress from above"),
        ({"torch__bad": "from whet.keras import model"}, "torch.bad:1 imports whet.keras.model: torch and keras never meet"),
        ({"keras__bad": "import whet.torch"}, "keras.bad:1 imports whet.torch: torch and keras never meet"),
        ({"torch__bad": "import keras"}, "torch.bad:1 imports keras: the torch side knows nothing of keras"),
        ({"runtimes__bad": "require('whet.pipeline', 'x', 'y')"}, "runtimes.bad:1 imports whet.pipeline from above"),
        ({"attic__new": ""}, "attic.new: the room 'attic' has no floor"),
        ({"specs__bad": "import whet.attic.x"}, "specs.bad:1 imports whet.attic.x, which has no floor"),
    ],
)
def test_a_wrong_import_is_caught(tmp_path, files, said) -> None:
    assert rules.upward_imports(build(tmp_path, **files)) == [said]


def test_right_imports_are_not_caught(tmp_path) -> None:
    package = build(
        tmp_path,
        init="from whet.pipeline import verbs",
        pipeline__verbs="from whet.errors import WhetError\nfrom . import side\nimport numpy",
        pipeline__side="import os\nfrom whet.torch import prune",
        torch__prune="import torch\nfrom whet.numerics import masks",
        cli="import whet\nfrom whet import compress",
    )
    assert rules.upward_imports(package) == []


def test_every_room_on_the_plan_exists_and_every_room_is_on_it() -> None:
    rooms = {name.split(".")[0] for name, _ in rules.modules(PACKAGE)}
    assert rooms <= set(rules.FLOORS) | set(rules.DOORS)
    assert {"errors", "specs", "numerics", "graph", "torch", "keras", "runtimes", "pipeline", "report"} <= rooms


def test_frameworks_are_imported_only_on_their_side_or_where_they_are_used() -> None:
    assert rules.eager_imports(PACKAGE, {"torch", "tensorflow", "jax"}, {"keras"}) == []  # Keras may run without them
    rooms = {
        "",
        "errors",
        "specs",
        "records",
        "data",
        "files",
        "progress",
        "numerics",
        "graph",
        "pipeline",
        "targets",
        "cli",
        "__main__",
    }
    assert rules.eager_imports(PACKAGE, set(HEAVY), rooms) == []


def test_an_eager_framework_import_is_caught(tmp_path) -> None:
    package = build(
        tmp_path,
        numerics__bad="import os\nimport torch.nn",
        graph__bad="from keras import ops",
        specs__good="def f():\n    import torch",
    )
    assert rules.eager_imports(package, {"torch", "keras"}, {"numerics", "graph", "specs"}) == [
        "graph.bad:1 imports keras",
        "numerics.bad:2 imports torch.nn",
    ]


IMPORT = """
import json, sys, time
before = set(sys.modules)
start = time.process_time()
import whet
seconds = time.process_time() - start
whet.Prune(0.5), whet.Budget, whet.Recipe
heavy = sorted({name.split('.')[0] for name in set(sys.modules) - before})
print(json.dumps([seconds, heavy]))
"""


def test_importing_whet_loads_no_framework_and_takes_less_than_0_3_s_of_processor_time() -> None:
    seconds = []
    for _ in range(5):
        ran = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, timeout=60)
        took, loaded = json.loads(ran.stdout)
        assert not set(HEAVY) & set(loaded)
        seconds.append(took)
        if took < 0.3:
            break
    assert min(seconds) < 0.3, seconds


def test_everything_public_has_a_docstring() -> None:
    assert rules.undocumented(PACKAGE) == []


def test_a_missing_docstring_is_caught(tmp_path) -> None:
    text = '"""Module."""\ndef f(): return 1\ndef _g(): return 1\nclass C:\n    """C."""\n    def m(self): return 1\n    def p(self): ...\n'
    package = build(tmp_path, specs__a=text, specs__b="x = 1\n", specs__init="")
    assert rules.undocumented(package) == [
        "specs.a:2 f has no docstring",
        "specs.a:6 C.m has no docstring",
        "specs.b: no module docstring",
    ]


def test_no_file_is_longer_than_400_lines(tmp_path) -> None:
    assert rules.long_files(PACKAGE) == []
    assert rules.long_files(build(tmp_path, specs__long="x = 1\n" * 401, specs__short="x = 1\n" * 400)) == [
        "specs/long.py: 401 lines"
    ]


def test_no_assert_and_no_swallowed_exception_in_the_package(tmp_path) -> None:
    assert rules.asserts(PACKAGE) == [] and rules.swallowed(PACKAGE) == []
    package = build(
        tmp_path,
        specs__a="assert 1\ntry:\n    pass\nexcept Exception:\n    pass\n",
        specs__b="try:\n    pass\nexcept OSError:\n    pass\n",
    )
    assert rules.asserts(package) == ["specs.a:1"] and rules.swallowed(package) == ["specs.a:4"]


def test_every_error_is_a_whet_error_and_what_a_caller_would_expect() -> None:
    from whet import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BaseException)]
    assert errors.WhetError in kinds and len(kinds) >= 9
    for kind in kinds:
        assert issubclass(kind, errors.WhetError)
        assert kind is errors.WhetError or issubclass(kind, ValueError | RuntimeError | OSError | ImportError)
