"""README.md and docs/ as steps: the commands, Python and files that a page tells its reader to use."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]
# What the first word of a line in a block of code is, if the line is a command.
PROGRAMS = ("rapidin", "torchrun", "python", "pip", "make", "cd", "cp", "bench/gpu.sh", "pytest")


@dataclass(frozen=True)
class Step:
    """What a page tells its reader to do.

    kind: "shell", "python" or "file"; text: the command, the program or the file's content; line: in the
    page, from 1; block: number of the block of code, since the steps of a block belong together; name: of the
    file.
    """

    kind: str
    text: str
    line: int
    block: int
    name: str = ""

    @property
    def words(self) -> list[str]:
        """The words of a command, as a shell splits them, without its comment."""
        return shlex.split(self.text, comments=True)

    @property
    def rapidin(self) -> list[str] | None:
        """The arguments of the `rapidin` in a command, also under torchrun; None if there is none."""
        words = self.words
        if words[:1] == ["rapidin"]:
            return words[1:]
        if words[0] in ("torchrun", "python") and "-m" in words and words[words.index("-m") + 1] == "rapidin":
            return words[words.index("-m") + 2 :]
        return None


def steps(markdown: str) -> list[Step]:
    """The steps of a page in order. Blocks of another language, and lines that are output, are none."""
    found: list[Step] = []
    for block, (info, first, lines) in enumerate(_blocks(markdown)):
        name = re.search(r'title="([^"]+)"', info)
        if name:
            found.append(Step("file", "\n".join(lines) + "\n", first, block, name[1]))
        elif info.startswith("python"):
            found.append(Step("python", "\n".join(lines) + "\n", first, block))
        elif not info:
            found += [Step("shell", text, first + n, block) for n, text in _commands(lines)]
    return found


def inline(markdown: str) -> list[str]:
    """The commands of rapidin within sentences and tables."""
    prose = re.sub(r"^```.*?^```|^ {4}.*?$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return [code.replace("\\|", "|") for code in re.findall(r"`(rapidin [^`]+)`", prose)]


def outputs(markdown: str) -> list[list[str]]:
    """The lines of each block that shows what a command printed."""
    return [
        lines for info, _, lines in _blocks(markdown) if info == "" and not list(_commands(lines)) and lines
    ]


def _blocks(markdown: str) -> Iterator[tuple[str, int, list[str]]]:
    """(info, line of the first line from 1, lines) of each block, fenced or indented."""
    lines = markdown.split("\n")
    n = 0
    while n < len(lines):
        if lines[n].startswith("```"):
            end = next(m for m in range(n + 1, len(lines)) if lines[m].startswith("```"))
            yield lines[n][3:].strip(), n + 2, lines[n + 1 : end]
            n = end + 1
        elif lines[n].startswith("    ") and (n == 0 or not lines[n - 1].strip()):
            end = n
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            yield "", n + 1, [line[4:] for line in lines[n:end]]
            n = end
        else:
            n += 1


def _commands(lines: list[str]) -> Iterator[tuple[int, str]]:
    """(number of the line, command); one that a backslash continues is one command."""
    n = 0
    while n < len(lines):
        first, text = n, lines[n].strip().removeprefix("$ ")
        while text.endswith("\\") and n + 1 < len(lines):
            n += 1
            text = text[:-1] + lines[n].strip()
        if text.split(" ")[0] in PROGRAMS:
            yield first, text
        n += 1
