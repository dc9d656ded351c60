"""The site: it is built without a warning, shows all options and public names, and its links are followed."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from doc_pages import ROOT

import rapidin
import rapidin.cli.app
from rapidin.cli.options import app

pytest.importorskip("mkdocs", reason="the site needs the extra 'docs'")
import hooks


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site with a page that stands for the demo's report."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "report.html").write_text("<!doctype html><title>A report</title>", encoding="utf-8")
    build = ["build", "--strict", "--config-file", "docs/site/mkdocs.yml", "--site-dir", str(folder / "site")]
    ran = subprocess.run(
        [sys.executable, "-m", "mkdocs", *build],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "NO_MKDOCS_2_WARNING": "1",
            "RAPIDIN_DOCS_REPORT": str(folder / "report.html"),
        },
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder / "site"


def commands(group: Any) -> list[Any]:
    below = getattr(group, "commands", {}).values()
    return [each for member in below for each in commands(member)] if below else [group]


@pytest.mark.full
def test_the_site_is_built_strictly(site: Path) -> None:
    cli = html.unescape((site / "reference" / "cli.html").read_text("utf-8"))
    for command in commands(typer.main.get_command(app)):
        for each in command.params:
            assert all(option in cli for option in each.opts), f"{command.name}: {each.opts}"
    api = (site / "reference" / "api.html").read_text("utf-8")
    for name in set(rapidin.__all__) - {"__version__", "ops"}:
        assert f">rapidin.{name}<" in api, name
    assert "top_k" in api
    for notebook in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        assert (site / "notebooks" / notebook.with_suffix(".html").name).is_file()
        assert (site / "notebooks" / notebook.name).is_file()
    assert "https://" in (site / hooks.EXTERNAL).read_text("utf-8")
    assert (site / "guide" / ".." / hooks.REPORT).is_file()
    assert f'src="../{hooks.REPORT}"' in (site / "guide" / "report.html").read_text("utf-8")


def test_links_that_lead_nowhere_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="x"></h1><a href="#x"></a><a href="b.html#y"></a><a href="https://example.org/none"></a>'
        '<a href="#none"></a><a href="b.html#none"></a><img src="none.png">',
        encoding="utf-8",
    )
    (tmp_path / "b.html").write_text('<h1 id="y"></h1>', encoding="utf-8")
    assert hooks.broken_links(tmp_path) == ["a.html: #none", "a.html: b.html#none", "a.html: none.png"]


@pytest.mark.parametrize(
    ("uri", "link", "expected"),
    [
        ("guide/python.md", "../../rapidin/settings.py", "../source/rapidin/settings.py"),
        ("guide/reading.md", "../../studies/verdict/README.md#x", "../source/studies/verdict/README.md#x"),
        ("index.md", "../CHANGELOG.md", "source/CHANGELOG.md"),
        ("index.md", "notebooks/auditor.ipynb", "notebooks/auditor.md"),
        ("notebooks/auditor.md", "auditor.ipynb", "auditor.ipynb"),
        ("source/README.md", "docs/guide/data.md", "../guide/data.md"),
        ("source/README.md", "CONTRIBUTING.md", "CONTRIBUTING.md"),
        ("guide/data.md", "#fields", "#fields"),
    ],
)
def test_links_lead_to_pages_of_the_site(uri: str, link: str, expected: str) -> None:
    page: Any = SimpleNamespace(file=SimpleNamespace(src_uri=uri))
    unused: Any = None
    text = f"[a]({link}) `[b]({link})`\n\n```\n[c]({link})\n```\n"
    assert hooks.on_page_markdown(text, page, unused, unused) == text.replace(
        f"[a]({link}", f"[a]({expected}"
    )


def test_a_pipe_in_a_table_has_no_backslash() -> None:
    page: Any = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    unused: Any = None
    rows = "| `a \\| b` | c \\| d |\n\n`a \\| b`"
    assert hooks.on_page_markdown(rows, page, unused, unused) == "| `a | b` | c \\| d |\n\n`a \\| b`"


def test_a_notebook_is_a_page(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Text."]},
        {
            "cell_type": "code",
            "source": ["1 + 1"],
            "outputs": [
                {"output_type": "stream", "text": ["printed\n"]},
                {"output_type": "execute_result", "data": {"text/plain": ["2"]}},
            ],
        },
    ]
    (tmp_path / "some.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    assert hooks.notebook_markdown(tmp_path / "some.ipynb") == (
        "# Title\nText.\n\n[Download the notebook](some.ipynb)\n\n```python\n1 + 1\n```\n\n"
        "```text\nprinted\n```\n\n```text\n2\n```"
    )


def test_docstrings_are_markdown() -> None:
    import docstrings

    text = """What it does to `x*y`, x*y.

    x, y: numbers; see: not an argument; z: another [n]. Raises UserError for
    none.

        >>> f(1)
        2
    """
    assert docstrings.markdown(text, {"x", "y", "z"}) == (
        "What it does to `x*y`, x&#42;y.\n\n"
        "- **`x, y`**: numbers; see: not an argument\n- **`z`**: another &#91;n&#93;.\n\n"
        "Raises UserError for none.\n\n```pycon\n>>> f(1)\n2\n```"
    )
    fields = "Options.\n\n    a: One.\n    b: Two. Default: none."
    assert docstrings.markdown(fields, {"a", "b"}) == (
        "Options.\n\n- **`a`**: One.\n- **`b`**: Two. Default: none."
    )
