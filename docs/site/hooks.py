"""What MkDocs does not do by itself: pages of the command line and notebooks, links out of docs/, a report.

MkDocs calls the functions named `on_...`. A page of docs/ may link to any file of the repository, as it may
on GitHub: READMEs and other Markdown become pages below `source/`, and other files are copied there.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
REPORT = "example-report.html"
EXTERNAL = "external-links.txt"
COMMANDS = "<!-- commands -->"

LOG = logging.getLogger("mkdocs.plugins.rapidin")

_CODE = re.compile(
    r"^ {0,3}(`{3,})[^\n]*\n.*?^ {0,3}\1`*[ \t]*$|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`)", re.MULTILINE | re.DOTALL
)
_LINK = re.compile(r"(\]\()([^)\s]+)((?: \"[^\"]*\")?\))")
_external: dict[str, set[str]] = {}


# ------------------------------------------------------------------------------------------------- files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds pages of notebooks, what pages link to outside of docs/, and the report."""
    _external.clear()
    for notebook in sorted(DOCS.glob("notebooks/*.ipynb")):
        page = notebook.relative_to(DOCS).with_suffix(".md").as_posix()
        files.append(File.generated(config, page, content=notebook_markdown(notebook)))
    for path in _linked_outside():
        uri = "source/" + path.relative_to(ROOT).as_posix()
        added = File.generated(config, uri, abs_src_path=str(path))
        added.inclusion = InclusionLevel.NOT_IN_NAV  # those that are read are linked
        files.append(added)
    report = (Path(config.config_file_path).parent / config.extra["report"]).resolve()
    if not report.is_file():
        raise PluginError(f"there is no report at {report}: run 'make docs', which makes one of the demo")
    files.append(File.generated(config, REPORT, abs_src_path=str(report)))
    return files


def _linked_outside() -> list[Path]:
    """The files outside of docs/ that pages link to, and those that these link to in turn."""
    waiting = [*DOCS.rglob("*.md")]
    found: set[Path] = set()
    while waiting:
        page = waiting.pop()
        for link in _links(page.read_text(encoding="utf-8")):
            path = _target(page, link)
            if path is not None and path.is_file() and DOCS not in path.parents and path not in found:
                found.add(path)
                if path.suffix == ".md":
                    waiting.append(path)
    return sorted(found)


# ------------------------------------------------------------------------------------------------- links


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links at the site's files, and writes the command line's options into their page."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, command_line_markdown())
    uri = page.file.src_uri
    origin = ROOT / uri.removeprefix("source/") if uri.startswith("source/") else DOCS / uri

    def pointed(match: re.Match[str]) -> str:
        link = match[2]
        if urlsplit(link).scheme:
            _external.setdefault(link, set()).add(uri)
            return match[0]
        path = _target(origin, link)
        if path is None:
            return match[0]
        if DOCS in path.parents:
            aim = path.relative_to(DOCS).as_posix()
        else:
            aim = "source/" + os.path.relpath(path, ROOT).replace(os.sep, "/")
        if aim.startswith("notebooks/") and not uri.startswith("notebooks/"):
            aim = aim.removesuffix(".ipynb") + ".md"
        anchor = urlsplit(link).fragment
        aim = os.path.relpath(aim, os.path.dirname(uri) or ".").replace(os.sep, "/")
        return match[1] + aim + (f"#{anchor}" if anchor else "") + match[3]

    text = "".join(part if code else _LINK.sub(pointed, part) for code, part in _parts(markdown))
    # In a table GitHub needs a backslash before a | in code, and Python-Markdown would show it.
    return re.sub(
        r"^\|.*$",
        lambda row: re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), row[0]),
        text,
        flags=re.MULTILINE,
    )


def on_post_build(config: MkDocsConfig) -> None:
    """Follows the links of all pages, also those of raw HTML, and lists those to other sites, which are not
    fetched. Raises PluginError for links that lead nowhere."""
    broken = broken_links(Path(config.site_dir))
    if broken:
        raise PluginError("links that lead nowhere:\n" + "\n".join(broken))
    lines = [f"{link}  {' '.join(sorted(pages))}\n" for link, pages in sorted(_external.items())]
    (Path(config.site_dir) / EXTERNAL).write_text("".join(lines), encoding="utf-8")
    LOG.info("%d links to other sites were not fetched; %s lists them", len(lines), EXTERNAL)


class _Anchors(HTMLParser):
    """The names of a page's elements, and what it links to or loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.names.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def broken_links(site: Path) -> list[str]:
    """The links from the pages of a built site to files and anchors that it lacks: "page: link" each."""
    pages = {
        path: _Anchors(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
        if path.name not in (REPORT, "404.html")  # the report makes its anchors when it is read
    }
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            aim = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            aim = aim / "index.html" if aim.is_dir() else aim
            anchor = unquote(parts.fragment)
            if not aim.is_file() or (anchor and aim in pages and anchor not in pages[aim].names):
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


def _parts(markdown: str) -> Iterator[tuple[bool, str]]:
    """The parts of a text, and whether each is code."""
    done = 0
    for match in _CODE.finditer(markdown):
        yield False, markdown[done : match.start()]
        yield True, match[0]
        done = match.end()
    yield False, markdown[done:]


def _links(markdown: str) -> list[str]:
    return [match[2] for code, part in _parts(markdown) if not code for match in _LINK.finditer(part)]


def _target(origin: Path, link: str) -> Path | None:
    """The file or folder's README that a relative link of a page leads to; None for other links."""
    parts = urlsplit(link)
    if parts.scheme or not parts.path or parts.path.startswith("/"):
        return None
    path = Path(os.path.normpath(origin.parent / parts.path))
    return path / "README.md" if path.is_dir() else path


# --------------------------------------------------------------------------------------- the command line


def command_line_markdown() -> str:
    """All commands with the options that their `--help` shows."""
    import typer

    import rapidin.cli.app  # noqa: F401 -- registers the commands
    from rapidin.cli.options import app

    return "\n\n".join(_command(typer.main.get_command(app), None))


def _command(command: Any, parent: Any) -> Iterator[str]:
    from rapidin.cli.options import PANELS, with_flags

    context = command.context_class(
        command,
        info_name=command.name,
        parent=parent,
        **({} if parent else {"help_option_names": ["-h", "--help"]}),
    )
    below = getattr(command, "commands", {})
    if parent is not None:
        yield f"## {context.command_path}"
    if parent is not None and not below:
        usage = context.get_usage().removeprefix("Usage: ")
        yield f"```text\n{' '.join(usage.split())}\n```"
    if parent is not None:
        yield _escaped(with_flags((command.help or "").strip()))
    if command.epilog:
        yield f"```console\n$ {command.epilog.removeprefix('Example: ')}\n```"
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            is_argument = parameter.param_type_name == "argument"
            panel = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "Options"
            panels.setdefault(panel, []).append((record[0], with_flags(record[1])))
    if not below:
        rows = ["| Option | What it does |", "| --- | --- |"]
        for panel in sorted(panels, key=lambda name: PANELS.index(name) if name in PANELS else -1):
            rows.append(f"| **{panel}** | |")
            rows += [f"| <code>{_escaped(name)}</code> | {_escaped(help)} |" for name, help in panels[panel]]
        yield "\n".join(rows)
    for each in below.values():
        yield from _command(each, context)


def _escaped(text: str) -> str:
    """Text of a terminal as Markdown, in which no character has a meaning, also in a table."""
    return re.sub(r"[\\`*_\[\]<>|#&]", lambda match: f"&#{ord(match[0])};", text)


# --------------------------------------------------------------------------------------------- notebooks


def notebook_markdown(path: Path) -> str:
    """A notebook as a page: its text, its code, and the text of its outputs."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [f"```text\n{text.rstrip()}\n```" for text in map(_text_of, cell["outputs"]) if text.strip()]
    link = f"[Download the notebook]({path.name})"
    return "\n\n".join([parts[0], link, *parts[1:]])


def _text_of(output: dict[str, Any]) -> str:
    return "".join(output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"])
