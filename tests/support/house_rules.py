"""The house's rules, drawn from the source: which way imports run, what is documented, how long files are.

Each rule is a function of a package folder that returns what breaks it, so that the rules themselves can be tested.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

# From the ground up: a module may import from floors below its own, and from its own floor.
FLOORS = {
    "errors": 0,
    "specs": 1,
    "records": 1,
    "data": 1,
    "files": 1,
    "progress": 1,
    "texts": 1,
    "htmltext": 1,
    "numerics": 2,
    "graph": 3,
    "formats": 3,
    "torch": 4,
    "keras": 4,
    "runtimes": 5,
    "report": 6,  # draws records, and is drawn upon by the pipeline that writes its files
    "pipeline": 7,
    "cli": 9,
    "__main__": 10,
}
# Doors that open upwards: modules that others see as `whet.<name>`, above everything but the command line.
DOORS = {"": 8, "targets": 8}
# The torch side knows nothing of Keras. The Keras side may use its backends, but only where it runs on them.
FRAMEWORKS = {"torch": {"keras", "tensorflow"}}
MAX_LINES = 400


def modules(package: Path) -> Iterator[tuple[str, Path]]:
    """`(dotted name below the package, file)` of every module; the package itself is ""."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path, name: str, package: str) -> Iterator[tuple[int, str]]:
    """`(line, absolute module)` of every import in a file, inside functions too; `from a import b` counts as a.b where it is one."""
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [package, *([p for p in name.split(".") if p])]
                here = here if is_package else here[:-1]
                base = ".".join([*here[: len(here) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and _called(node) in {"require", "import_module", "__import__"} and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def floor(room: str) -> int | None:
    """The floor of a top-level room of the package."""
    return DOORS.get(room, FLOORS.get(room))


def upward_imports(package: Path) -> list[str]:
    """Imports that run upwards, rooms without a floor, and a framework side that reaches for the other framework."""
    broken = []
    for name, path in modules(package):
        room = name.split(".")[0]
        here = floor(room)
        if here is None:
            broken.append(f"{name}: the room {room!r} has no floor")
            continue
        for line, target in imports(path, name, package.name):
            root, *rest = target.split(".")
            if root in FRAMEWORKS.get(room, set()):
                broken.append(f"{name}:{line} imports {target}: the {room} side knows nothing of {root}")
            if root != package.name or not rest:
                continue
            there = floor(rest[0])
            there = floor("") if there is None and len(rest) == 1 else there  # a name of the package itself
            if there is None:
                broken.append(f"{name}:{line} imports {target}, which has no floor")
            elif there > here:
                broken.append(f"{name}:{line} imports {target} from above")
            elif {room, rest[0]} == {"torch", "keras"}:
                broken.append(f"{name}:{line} imports {target}: torch and keras never meet")
    return broken


def eager_imports(package: Path, forbidden: set[str], rooms: set[str]) -> list[str]:
    """Imports of `forbidden` packages when a module of `rooms` is imported (not inside its functions)."""
    broken = []
    for name, path in modules(package):
        if name.split(".")[0] not in rooms:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            broken += [f"{name}:{node.lineno} imports {n}" for n in names if n.split(".")[0] in forbidden]
    return broken


def undocumented(package: Path) -> list[str]:
    """Public modules, classes, functions and methods without a docstring. Overloads and overriding methods count too."""
    broken = []
    for name, path in modules(package):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body and not ast.get_docstring(tree):
            broken.append(f"{name or package.name}: no module docstring")
        broken += [f"{name}:{line} {what} has no docstring" for line, what in _bare(tree, "")]
    return broken


def _bare(tree: ast.AST, prefix: str) -> Iterator[tuple[int, str]]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and not _is_protocol_line(node):
            yield node.lineno, prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _bare(node, f"{prefix}{node.name}.")


def _is_protocol_line(node: ast.AST) -> bool:
    """`def abs(self, x): ...`: a protocol's line says all there is."""
    body = getattr(node, "body", [])
    return (
        len(body) == 1
        and isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and body[0].value.value is ...
    )


def long_files(package: Path, limit: int = MAX_LINES) -> list[str]:
    """Files of more than `limit` lines."""
    counted = ((path, len(path.read_text(encoding="utf-8").splitlines())) for path in sorted(package.rglob("*.py")))
    return [f"{path.relative_to(package)}: {n} lines" for path, n in counted if n > limit]


def asserts(package: Path) -> list[str]:
    """`assert` statements: they vanish under -O, and users deserve a sentence."""
    return [
        f"{name}:{node.lineno}"
        for name, path in modules(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    ]


def swallowed(package: Path) -> list[str]:
    """`except Exception: pass`, `except:` and the like: errors that nobody hears of."""
    broken = []
    for name, path in modules(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and _is_broad(node) and all(isinstance(s, ast.Pass) for s in node.body):
                broken.append(f"{name}:{node.lineno}")
    return broken


def _is_broad(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or (isinstance(handler.type, ast.Name) and handler.type.id in {"Exception", "BaseException"})
