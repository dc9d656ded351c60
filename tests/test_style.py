"""Tests use what the code offers openly: none of them replaces a private name or a limit of the project.

A limit that a test has to change is an argument; what a test has to see or to break is public.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
SETTERS = {"setattr", "delattr", "patch.object"}  # of pytest.MonkeyPatch, builtins and unittest.mock
ITEM_SETTERS = {"setitem", "delitem", "patch.dict"}


def closed(name: str) -> bool:
    """Whether a name is private, or a constant, as limits are."""
    return (name.startswith("_") and name != "__class__") or (name.isupper() and len(name) > 1)


def ours(owner: ast.expr, imports: dict[str, str]) -> bool:
    """Whether an object may be the project's: it is unless it comes from another's module, or is `self`."""
    while isinstance(owner, ast.Attribute | ast.Call | ast.Subscript):
        owner = owner.func if isinstance(owner, ast.Call) else owner.value
    if not isinstance(owner, ast.Name) or owner.id in ("self", "cls"):
        return False
    return not foreign(imports.get(owner.id, ""))


def foreign(module: str) -> bool:
    """Whether a module is of the standard library or of another package."""
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names or top in ("torch", "transformers", "triton", "huggingface_hub")


def imported(tree: ast.Module) -> dict[str, str]:
    """The module that each imported name is, or comes from."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]] = alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def private_parts(expression: ast.expr) -> Iterator[str]:
    """The private attributes on the way to an object: of `scan._tables.tables` it is `_tables`."""
    for node in ast.walk(expression):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            yield node.attr


def replaced(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of each private name or limit of the project that a file replaces."""
    imports = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
            for target in targets:
                for part in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
                    if isinstance(part, ast.Attribute) and closed(part.attr) and ours(part.value, imports):
                        yield part.lineno, part.attr
        elif isinstance(node, ast.Call):
            yield from _by_call(node, imports)


def _by_call(call: ast.Call, imports: dict[str, str]) -> Iterator[tuple[int, str]]:
    function = call.func
    name = ast.unparse(function)
    name = (
        name[name.find("patch.") :]
        if name.endswith(("patch.object", "patch.dict"))
        else name.rpartition(".")[2]
    )
    if not call.args or name not in {*SETTERS, *ITEM_SETTERS, "patch"}:
        return
    first = call.args[0]
    if isinstance(first, ast.Constant) and isinstance(first.value, str):  # "package.module.name"
        dotted = first.value.split(".")
        if name not in ITEM_SETTERS and not foreign(dotted[0]) and any(map(closed, dotted)):
            yield call.lineno, first.value
        return
    if not ours(first, imports):
        return
    for part in private_parts(first):
        yield call.lineno, part
    second = call.args[1] if len(call.args) > 1 else None
    if name in SETTERS and isinstance(second, ast.Constant) and closed(str(second.value)):
        yield call.lineno, str(second.value)


def test_every_property_test_says_how_many_inputs_it_tries() -> None:
    """Or it would have a deadline, which a busy machine does not meet, and the same inputs each night."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                decorators = [ast.unparse(each).partition("(")[0] for each in node.decorator_list]
                assert ("given" in decorators) is ("tries" in decorators), f"{path}, line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_no_private_name_or_limit_is_replaced(path: Path) -> None:
    assert list(replaced(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("monkeypatch.setattr(scan, '_places', f)", ["_places"]),
        ("monkeypatch.setattr(scan, 'CHUNK_BYTES', 1)", ["CHUNK_BYTES"]),
        ("monkeypatch.setattr(ops.scan, '__defaults__', ())", ["__defaults__"]),
        ("monkeypatch.setattr(scan._tables.tables, 'limit', 1)", ["_tables"]),
        ("monkeypatch.setattr('rapidin.cache.Cache.__init__', f)", ["rapidin.cache.Cache.__init__"]),
        ("monkeypatch.delattr(scan, '_places')", ["_places"]),
        ("monkeypatch.setitem(backends._MODULES, 'gpu', 'm')", ["_MODULES"]),
        ("setattr(scan, '_places', f)", ["_places"]),
        ("mock.patch.object(scan, '_places', f)", ["_places"]),
        ("mock.patch('rapidin.scan._places')", ["rapidin.scan._places"]),
        ("def f():\n    scan._places = 1", ["_places"]),
        ("a, scan.BYTES = 1, 2", ["BYTES"]),
        ("del scan._places", ["_places"]),
        ("monkeypatch.setattr(scan, 'places', f)", []),
        ("monkeypatch.setattr(os, '_exit', f)", []),
        ("monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)", []),
        ("self._places = 1", []),
        ("monkeypatch.setitem(sys.modules, 'rapidin._cpu', None)", []),
    ],
)
def test_the_rule_sees_each_way_of_replacing(line: str, names: list[str]) -> None:
    source = f"import os\nimport sys\nfrom rapidin import ops, scan\n{line}\n"
    assert [name for _, name in replaced(ast.parse(source))] == names
