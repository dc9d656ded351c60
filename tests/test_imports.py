"""Imports go one way between the rooms of the package, and no files import each other in a circle.

Imports within functions and for type checkers count as much as those at the top of a module.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import rapidin

PACKAGE = Path(rapidin.__file__).parent
ROOT = PACKAGE.parent

GROUND = {"errors", "files", "distributed", "settings"}
# What each room may import of rapidin, besides the ground and itself.
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "ops": {"kernels"},
    "data": set(),
    "cache": {"data", "ops"},
    "results": {"data"},
    "tasks": {"data", "ops"},
    "gradients": {"data", "ops", "tasks"},
    "attribution": {"data", "ops", "cache", "results", "tasks", "gradients"},
    "evaluate": {"data", "ops", "cache", "results", "tasks", "gradients", "attribution"},
    "serve": {"data", "cache", "results", "tasks", "gradients", "attribution"},
    "cli": {"data", "ops", "cache", "results", "tasks", "gradients", "attribution", "evaluate", "serve"},
    "integrations": {"data", "cache", "tasks", "gradients", "attribution"},
    "__main__": {"cli"},
    # The names that `import rapidin` offers.
    "__init__": {"ops", "cache", "gradients", "attribution", "tasks"},
}
# What modules below these may not import, although their room may.
STRICTER = {
    "rapidin.attribution.methods": {"gradients"},
    "rapidin.attribution.scan": {"gradients"},
    "rapidin.ops.reference": {"kernels"},
}
# Modules that a command line's help waits for: what they may import from outside the standard library.
LIGHT: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "settings": set(),
    "distributed": set(),
    "data.examples": set(),
    "data.encoding": set(),
    "results.types": set(),
    "tasks.names": set(),
    "gradients.settings": set(),
    "attribution.options": set(),
    "cli": {"typer"},
    "ops.reference": {"torch", "numpy"},
}
MOST_ENTRIES = 20  # directly in the package
MOST_LINES = 500  # of a module
MOST_FUNCTION_LINES = 80


def modules() -> dict[str, Path]:
    """Every module by its dotted name, stubs of extensions and the kernels among them."""
    found = {}
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi"), *(PACKAGE / "kernels").glob("*.py")]:
        parts = ("rapidin", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return dict(sorted(found.items()))


MODULES = modules()


def imported(name: str, path: Path, known: Mapping[str, Path]) -> set[str]:
    """The modules that a module imports, wherever in it: a submodule or the package that a name is taken of.

    A package counts as imported if a name is taken of it that is no module, or all of it is.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.name.startswith("__init__") else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in known else base)
    return {each for each in found if each in known} - {name}


IMPORTS = {name: imported(name, path, MODULES) for name, path in MODULES.items()}


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def wrong(name: str, imports: set[str]) -> set[str]:
    """The modules that `name` must not import."""
    room = room_of(name)
    allowed = GROUND if room in GROUND else ALLOWED[room] | GROUND | {room}
    for prefix, less in STRICTER.items():
        if name == prefix or name.startswith(prefix + "."):
            allowed = allowed - less
    return {each for each in imports if each != "rapidin" and room_of(each) not in allowed}


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """The sets of modules that reach each other (Tarjan, SIAM J. Comput. 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(imports[name]):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            at = stack.index(name)
            found.append(stack[at:])
            del stack[at:]

    for name in imports:
        if name not in index:
            visit(name)
    return [sorted(each) for each in found if len(each) > 1]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_its_room_may(name: str) -> None:
    room = room_of(name)
    assert room in {*ALLOWED, *GROUND}, f"a new room: say what it may import in {Path(__file__).name}"
    assert not wrong(name, IMPORTS[name])


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(IMPORTS) == []


def test_the_rules_see_imports_in_functions_and_for_types_and_circles(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from rapidin.cli.run import main\n"
        "def f():\n    from rapidin.attribution import scan\n"
    )
    seen = imported("rapidin.cache.module", path, MODULES)
    assert seen == {"rapidin.cli.run", "rapidin.attribution.scan"}
    assert wrong("rapidin.cache.module", seen) == seen
    assert wrong("rapidin.attribution.scan", {"rapidin.gradients.source"})
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy_at_the_top(name: str) -> None:
    code = f"import sys, rapidin.{name}; print(*{{m.split('.')[0] for m in sys.modules}})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "peft", "datasets", "numpy", "safetensors", "typer"}
    assert set(process.stdout.split()) & heavy <= LIGHT[name]


def test_the_package_has_few_entries() -> None:
    entries = {
        path.name for path in PACKAGE.iterdir() if not path.name.startswith("__py") and path.suffix != ".so"
    }
    assert len(entries) < MOST_ENTRIES, sorted(entries)


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and length in lines of each function of a file, without its decorators."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) != "kernels"])
def test_modules_and_functions_are_short_enough_to_read(name: str) -> None:
    path = MODULES[name]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    assert [each for each, lines in functions(path) if lines > MOST_FUNCTION_LINES] == []


def test_the_figure_of_the_rooms_is_what_is_imported() -> None:
    page = ROOT / "docs" / "guide" / "architecture.md"
    if not page.exists():
        pytest.skip("the package is tested without its checkout")
    lines = page.read_text(encoding="utf-8").split("```mermaid")[1].split("```")[0].splitlines()
    figure = {tuple(line.split(" --> ")) for line in map(str.strip, lines) if " --> " in line}
    rooms = {room for room in ALLOWED if not room.startswith("__")}
    real = {
        (room_of(name), room_of(other))
        for name, imports in IMPORTS.items()
        for other in imports
        if {room_of(name), room_of(other)} <= rooms and room_of(name) != room_of(other)
    }
    assert figure == real
