"""Every study is explained, and benchmarks and studies stand apart."""

import ast
from pathlib import Path

import doc_tables
import pytest

ROOT = doc_tables.DOCS.parent
STUDIES = sorted(
    path for path in (ROOT / "studies").iterdir() if any(path.glob("*.py")) and path.name != "common"
)


def imported(folder: Path) -> set[str]:
    """The first names of the modules that the files in a folder import, in functions too."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names


def modules(folder: Path) -> set[str]:
    """The modules and packages of a folder; those of a package count by its name."""
    return {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def test_benchmarks_and_studies_do_not_import_each_other() -> None:
    bench = modules(ROOT / "bench")
    studies = set().union(*map(modules, STUDIES))
    assert not bench & studies, "a name that both have"
    assert not imported(ROOT / "bench") & studies
    assert not imported(ROOT / "studies") & bench


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_study_says_what_it_asks_how_and_what_it_found(study: Path) -> None:
    text = (study / "README.md").read_text()
    for heading in ("**Question.**", "**Answer", f"python studies/{study.name}/"):
        assert heading in text
    assert f"({study.name}/README.md)" in (ROOT / "studies" / "README.md").read_text()
