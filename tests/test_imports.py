"""The arrows between the rooms point one way: from the command line down to the kernels."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rapidin

PACKAGE = Path(rapidin.__file__).parent

# What each room may import of rapidin. `errors`, `files` and `layers` are open to all, and a room to itself.
ALLOWED = {
    "errors": set(),
    "files": set(),
    "layers": set(),
    "stopping": set(),
    "reference": set(),
    "kernels": set(),
    "ops": {"reference", "kernels", "_cpu", "_cuda"},
    "examples": set(),
    "encoding": {"examples"},
    "distributed": set(),
    "sharding": {"distributed"},
    "model": {"distributed", "sharding"},
    "transfer": {"ops"},
    "squares": set(),
    "kronecker": set(),
    "optimizer_state": set(),
    "preconditioner": {"cache", "kronecker", "ops", "optimizer_state", "squares"},
    "hooks": {"preconditioner", "kronecker", "ops", "squares", "transfer"},
    "pack": {"ops"},
    "cache": {"pack"},
    "methods": {"cache", "distributed", "ops", "pack"},
    "hits": {"page"},  # where a notebook asks
    "page": {"hits", "report"},
    "resident": {"cache", "transfer"},
    "scan": {"cache", "distributed", "examples", "hits", "methods", "ops", "pack", "resident", "transfer"},
    "targets": set(),
    "query": {"cache", "distributed", "encoding", "examples", "methods", "scan", "targets"},
    "report": {"hits", "attributor", "plan"},
    "caching": {
        "_cpu",
        "cache",
        "distributed",
        "encoding",
        "examples",
        "ops",
        "pack",
        "stopping",
        "transfer",
    },
    "attributor": {
        "cache",
        "caching",
        "distributed",
        "encoding",
        "examples",
        "preconditioner",
        "hits",
        "hooks",
        "kronecker",
        "methods",
        "model",
        "pack",
        "query",
        "targets",
        "thinning",
        "transfer",
        "ensemble",  # which does its queries
    },
    "select": set(),
    "inside": {"encoding", "hooks"},
    "certainty": {"cache", "pack", "scan"},
    "duplicates": {"cache", "hits", "report"},
    "overview": {"cache", "examples", "hits", "scan"},
    "baselines": {"encoding", "examples", "hits", "hooks", "model", "report"},
    "candidates": {"certainty", "distributed", "duplicates", "examples", "hits", "query", "scan"},
    "explain": {
        "attributor",
        "baselines",
        "cache",
        "candidates",
        "encoding",
        "examples",
        "hits",
        "inside",
        "methods",
        "overview",
        "query",
        "scan",
    },
    "ensemble": {
        "attributor",
        "baselines",
        "cache",
        "distributed",
        "explain",
        "hits",
        "overview",
        "query",
        "scan",
        "targets",
    },
    "thinning": {"layers"},
    "plan": {"attributor", "caching", "encoding", "examples", "ops", "pack"},
    "tuning": {"hooks"},
    "evaluate": {
        "attributor",
        "baselines",
        "cache",
        "encoding",
        "ensemble",
        "examples",
        "inside",
        "methods",
        "model",
        "query",
        "report",
        "scan",
        "select",
        "tuning",
    },
    "demo": {"cli", "encoding", "report", "examples", "model", "tuning"},
    "cli": {
        "attributor",
        "cache",
        "demo",
        "distributed",
        "ensemble",
        "evaluate",
        "examples",
        "methods",
        "model",
        "optimizer_state",
        "overview",
        "page",
        "plan",
        "report",
        "scan",
        "select",
        "targets",
        "thinning",
        "tuning",
    },
    "__main__": {"cli"},
    "__init__": {"attributor", "cache", "ensemble", "methods", "model", "ops"},
}
# Rooms whose import must stay light: what they may import from outside the standard library, at the top.
LIGHT = {
    "errors": set(),
    "files": set(),
    "layers": set(),
    "examples": set(),
    "encoding": set(),
    "hits": set(),
    "cli": {"typer"},
    "reference": {"torch"},
}


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    """Dotted names that a module imports, but for typing only."""
    found: set[str] = set()
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")})


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_no_arrow_points_the_wrong_way(path: Path) -> None:
    room = room_of(path)
    assert room in ALLOWED, f"a new room: say what it may import in {Path(__file__).name}"
    rooms = {
        name.split(".")[1] for name in imports(ast.parse(path.read_text())) if name.startswith("rapidin.")
    }
    rooms &= {*ALLOWED, "_cpu", "_cuda"}
    assert rooms - {room, "errors", "files", "layers"} <= ALLOWED[room]


@pytest.mark.parametrize("room", LIGHT)
def test_light_rooms_import_nothing_heavy_at_the_top(room: str) -> None:
    code = f"import sys, rapidin.{room}; print(*{{m.split('.')[0] for m in sys.modules}})"
    loaded = set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )
    heavy = {"torch", "transformers", "peft", "datasets", "numpy", "safetensors", "typer"}
    assert loaded & heavy <= LIGHT[room] | ({"numpy"} if room == "reference" else set())
