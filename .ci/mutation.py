"""Changes one expression at a time, and runs the tests of its module: a change that none notices survives.

    .venv/bin/python .ci/mutation.py --mutants 100 rapidin/ops rapidin/cache rapidin/attribution/methods

Mutants are drawn at random from all of the modules: other comparisons, operators, numbers, True and False,
min and max, branches that are never taken, and statements that are left out. Error messages, docstrings and
annotations are not changed. The tests are those of TESTS, those named after the module or its folder, or else
all of its room's, without those marked `full`; they have to pass without a change. Each mutant has --seconds
of processor time. What no test notices until then is printed as a diff, for a reader to judge: it may be
equivalent, or a gap of the tests.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
# Imported once, before a process is forked for each mutant.
COMMON = ("torch", "numpy", "transformers", "peft", "hypothesis", "pytest", "safetensors.torch", "xxhash")
PYTEST = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:cov", "-p", "no:xdist"]
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "amax": "amin", "amin": "amax"}
# Test files of a room, for modules that have none of their name.
TESTS = {
    "ops/checks": ("checks", "pack", "rotate", "topk_scan", "linear_sketch", "flat_sketch"),
    "ops/cpu": (
        "pack",
        "rotate",
        "stack_sketch",
        "matrix_sketch",
        "topk_scan",
        "linear_sketch",
        "flat_sketch",
    ),
    "ops/cuda/scan": ("topk_scan",),
    "ops/cuda/sketches": ("matrix_sketch", "linear_sketch", "flat_sketch"),
    "ops/flat_plan": ("flat_sketch",),
    "ops/gpu_scan": ("topk_scan",),
    "ops/low_rank": ("linear_sketch",),
    "ops/packed": ("pack", "unit_blocks", "topk_scan"),
    "ops/reference/linear_sketch": ("linear_sketch", "matrix_sketch", "stack_sketch"),
    "ops/reference/packed": ("pack", "unit_blocks"),
    "ops/tables": ("sketch_hash", "linear_sketch", "flat_sketch"),
    "ops/triton/packing": ("pack", "unit_blocks"),
    "ops/triton/scan": ("topk_scan",),
    "ops/triton/sketches": ("matrix_sketch", "linear_sketch", "flat_sketch"),
    "cache/codec/basis": ("codec", "learn"),
    "cache/codec/fit": ("codec", "learn"),
    "cache/codec/packed": ("codec", "learn"),
}


@dataclass(frozen=True)
class Mutant:
    """A module with one change: the node at a place of its syntax tree, as `places` numbers them, becomes
    another."""

    path: Path
    place: int
    other: ast.AST

    @property
    def line(self) -> int:
        """The line of the change, from 1."""
        return getattr(self.other, "lineno", 0)

    @property
    def source(self) -> str:
        """The changed module."""
        tree = parsed(self.path)
        parent, name, position = list(places(tree))[self.place]
        if position is None:
            setattr(parent, name, self.other)
        else:
            getattr(parent, name)[position] = self.other
        return ast.unparse(ast.fix_missing_locations(tree))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may stand in the place of this one."""
    other = copy.deepcopy(node)
    if isinstance(other, ast.Compare) and type(other.ops[0]) in COMPARISONS:
        other.ops[0] = COMPARISONS[type(other.ops[0])]()
        yield other
    elif isinstance(other, ast.BinOp | ast.AugAssign) and type(other.op) in OPERATORS:
        if not any(map(_is_text, ast.walk(other))):
            other.op = OPERATORS[type(other.op)]()
            yield other
    elif isinstance(other, ast.BoolOp):
        other.op = ast.And() if isinstance(other.op, ast.Or) else ast.Or()
        yield other
    elif isinstance(other, ast.UnaryOp) and isinstance(other.op, ast.Not | ast.USub):
        yield other.operand
    elif isinstance(other, ast.Constant) and isinstance(other.value, bool):
        yield ast.Constant(not other.value)
    elif isinstance(other, ast.Constant) and isinstance(other.value, int | float):
        yield ast.Constant(other.value + 1)
    elif isinstance(other, ast.Call) and _called(other) in CALLS:
        if isinstance(other.func, ast.Name):
            other.func.id = CALLS[other.func.id]
        elif isinstance(other.func, ast.Attribute):
            other.func.attr = CALLS[other.func.attr]
        yield other
    elif isinstance(other, ast.If | ast.While):
        other.test = ast.Constant(False)
        yield other
    elif isinstance(other, ast.IfExp):
        yield other.body
        yield other.orelse
    elif _is_statement(other):
        yield ast.Pass()


def _is_statement(node: ast.AST) -> bool:
    """Whether this is a statement that may be left out without a name going missing."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Subscript | ast.Attribute)
    return isinstance(node, ast.Break | ast.Continue)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _called(node: ast.Call) -> str:
    function = node.func
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def _stays(node: ast.AST) -> bool:
    """Whether nothing within a node is changed: an error and its message, an assertion, an import."""
    if isinstance(node, ast.Call):
        return _called(node).endswith("Error")
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr)


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Parent, field and position of each node that may be changed, in order."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "args") and not isinstance(node, ast.Call):
            continue
        for position, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not _stays(child):
                yield node, name, position
                yield from places(child)


def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of a module."""
    found = []
    for place, (parent, name, position) in enumerate(places(parsed(path))):
        node = getattr(parent, name) if position is None else getattr(parent, name)[position]
        found += [Mutant(path, place, ast.copy_location(other, node)) for other in changed(node)]
    return found


def tests_of(path: Path) -> list[Path]:
    """The test files of a module."""
    module = path.relative_to(ROOT / "rapidin").with_suffix("")
    *folders, name = module.parts
    room = ROOT / "tests" / folders[0]
    if module.as_posix() in TESTS:
        return [room / f"test_{each}.py" for each in TESTS[module.as_posix()]]
    for each in (name, *reversed(folders[1:])):
        if (room / f"test_{each}.py").exists():
            return [room / f"test_{each}.py"]
    return sorted(room.glob("test_*.py"))


class Changed(importlib.abc.InspectLoader, importlib.abc.MetaPathFinder):
    """Imports one module from the source of a mutant."""

    def __init__(self, mutant: Mutant) -> None:
        parts = mutant.path.relative_to(ROOT).with_suffix("").parts
        self._folder = str(mutant.path.parent) if parts[-1] == "__init__" else None
        self._name = ".".join(parts if self._folder is None else parts[:-1])
        self._path, self._source = mutant.path, mutant.source

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        folders = None if self._folder is None else [self._folder]
        return importlib.util.spec_from_file_location(
            fullname, self._path, loader=self, submodule_search_locations=folders
        )

    def get_source(self, fullname: str) -> str:
        return self._source


def outcome(mutant: Mutant, tests: Sequence[Path], seconds: int) -> str:
    """The result of running the tests in a process of its own: "killed", "survived", or "late" at the limit
    of processor time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            sys.meta_path.insert(0, Changed(mutant))
            import pytest

            code = int(pytest.main([*PYTEST, "-m", "not full", *map(str, tests)]))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "late" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "killed"
    return "killed" if os.WEXITSTATUS(status) else "survived"


def diff(mutant: Mutant) -> str:
    """The change as a diff of the module as `ast.unparse` writes it."""
    before = ast.unparse(parsed(mutant.path)).splitlines()
    lines = list(difflib.unified_diff(before, mutant.source.splitlines(), lineterm="", n=1))[3:]
    return "\n".join(f"    {line}" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, help="modules, or folders of modules")
    parser.add_argument("--mutants", type=int, default=100, help="how many are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=60, help="processor time of a mutant's tests")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path[0] = str(ROOT)
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
    for name in COMMON:
        importlib.import_module(name)
    paths = [path.resolve() for path in arguments.paths]
    modules = sorted({each for path in paths for each in (path.rglob("*.py") if path.is_dir() else [path])})
    found = [mutant for module in modules for mutant in mutants_of(module)]
    drawn = random.Random(arguments.seed).sample(found, min(arguments.mutants, len(found)))
    print(f"{len(drawn):,} of {len(found):,} mutants of {len(modules)} modules", flush=True)
    counted: Counter[str] = Counter()
    for mutant in drawn:
        began = time.perf_counter()
        said = outcome(mutant, tests_of(mutant.path), arguments.seconds)
        counted[said] += 1
        took = f"{time.perf_counter() - began:.0f} s"
        print(f"{said:8}  {mutant.path.relative_to(ROOT)}:{mutant.line} ({took})", flush=True)
        if said != "killed":
            print(diff(mutant), flush=True)
    print(", ".join(f"{count} {said}" for said, count in sorted(counted.items())))


if __name__ == "__main__":
    main()
