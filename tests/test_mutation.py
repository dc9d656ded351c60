""".ci/mutation.py changes code and nothing else, one place at a time, and knows the tests of each module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("ops", "cache", "attribution/methods")


@pytest.fixture(scope="module")
def mutation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutation", ROOT / ".ci/mutation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutation"] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("x = a < b", ["x = a <= b"]),
        ("x = a is None", ["x = a is not None"]),
        ("x = a + b", ["x = a - b"]),
        ("x = a + 'b'", []),
        ("x = f'{a} b'", []),
        ("x -= y", ["x += y"]),
        ("x = a and b", ["x = a or b"]),
        ("x = not a", ["x = a"]),
        ("x = True", ["x = False"]),
        ("x = 3", ["x = 4"]),
        ("x = 'a'", []),
        ("x = min(a, b)", ["x = max(a, b)"]),
        ("x = a.any()", ["x = a.all()"]),
        ("x = a if b else c", ["x = a", "x = c"]),
        ("if a:\n    x = b", ["if False:\n    x = b"]),
        ("a.b = c", ["pass"]),
        ("a(b)", ["pass"]),
        ("for x in y:\n    break", ["for x in y:\n    pass"]),
        ("assert a < b", []),
        ("raise ValueError(f'{a + 1}')", []),
        ("def f(a: int = 1) -> int:\n    return a", []),
        ("if TYPE_CHECKING:\n    import a", []),
    ],
)
def test_what_becomes_of_a_line(mutation: ModuleType, tmp_path: Path, line: str, changes: list[str]) -> None:
    path = tmp_path / "module.py"
    path.write_text(f"'''A module with 1 < 2.'''\n{line}\n")
    mutants = mutation.mutants_of(path)
    assert [mutant.source.partition("\n")[2] for mutant in mutants] == changes
    assert all(mutant.line >= 2 for mutant in mutants)
    for mutant, change in zip(mutants, changes, strict=True):
        (added,) = (row[5:] for row in mutation.diff(mutant).splitlines() if row.startswith("    +"))
        assert added in change.splitlines()


def test_each_module_has_tests(mutation: ModuleType) -> None:
    modules = [path for room in ROOMS for path in sorted((ROOT / "rapidin" / room).rglob("*.py"))]
    for path in modules:
        found = mutation.tests_of(path)
        assert found
        assert all(each.exists() for each in found)
    names = {path.relative_to(ROOT / "rapidin").with_suffix("").as_posix() for path in modules}
    assert set(mutation.TESTS) <= names
    assert [each.name for each in mutation.tests_of(ROOT / "rapidin/cache/schema.py")] == ["test_schema.py"]
    assert [each.name for each in mutation.tests_of(ROOT / "rapidin/attribution/methods/fisher.py")] == [
        "test_methods.py"
    ]
