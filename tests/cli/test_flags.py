"""Messages of the library name arguments of Python; the command line shows them as its flags."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import rapidin
from rapidin.cli import app  # noqa: F401  (with all commands)
from rapidin.cli.options import renamed_flags, with_flags
from rapidin.settings import dtype_name

PACKAGE = Path(rapidin.__file__).parent
# Named in messages, and without a flag.
OF_PYTHON_ALONE = {"cache", "question", "tokenizer"}


def texts(call: ast.Call) -> Iterator[str]:
    """The texts in a call's arguments; of an f-string with its values as 0."""
    for node in ast.walk(call):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(each.value) if isinstance(each, ast.Constant) else "0" for each in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def messages() -> list[tuple[str, str]]:
    """Where each text of a UserError stands in the library, and the text."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("cli/"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                found += [(f"{name}:{node.lineno}", text) for text in texts(node)]
    return found


MESSAGES = messages()


def test_no_message_of_the_library_names_a_flag() -> None:
    assert len(MESSAGES) > 400
    commands = re.compile(r"'rapidin [^']*'")  # are quoted as they are typed
    assert [each for each in MESSAGES if re.search(r"--[a-z]", commands.sub("", each[1]))] == []


def docstrings() -> Iterator[tuple[str, str]]:
    """Where each docstring of the library stands, and the docstring."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("cli/"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}:{getattr(node, 'lineno', 1)}", ast.get_docstring(node) or ""


def test_no_docstring_of_the_library_names_a_flag_but_in_a_command() -> None:
    commands = re.compile(r"`rapidin [^`]*`")
    assert [
        where for where, text in docstrings() if re.search(r"(?<![\w-])--[a-z]", commands.sub("", text))
    ] == []


def test_every_argument_that_a_message_names_is_shown_as_a_flag() -> None:
    named = [(where, name) for where, text in MESSAGES for name in re.findall(r"`([a-z_]+)[=`]", text)]
    assert len(named) > 80
    unknown = [each for each in named if with_flags(f"`{each[1]}`").startswith("`")]
    assert {name for _, name in unknown} <= OF_PYTHON_ALONE, unknown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("`top_k` must be at least 1, got 0", "--top-k must be at least 1, got 0"),
        ("use `dtype='sign'`, or `at=1`", "use --dtype sign, or --at 1"),
        ("leave out `check=False`", "leave out --no-check"),
        (
            "use `preconditioner='off'` or lower `batch_tokens`",
            "use --precondition off or lower --batch-tokens",
        ),
        ("give it with `examples`, or use `examples=False`", "give it with --train-data, or use --no-text"),
        ("use `shard_model=True`", "use --shard-model"),
        ("leave out `targets` and `by`", "leave out --tokens, --hotwords and --by"),
        ("`no_such_argument`, ``, ` `, `top_k, `TOP_K`", "`no_such_argument`, ``, ` `, `top_k, `TOP_K`"),
        ("a file `a b` with --top-k", "a file `a b` with --top-k"),
    ],
)
def test_arguments_become_flags_and_other_words_stay(text: str, shown: str) -> None:
    assert with_flags(text) == shown


def test_number_formats_have_several_names() -> None:
    import torch

    for names, name in (
        (("bf16", "BF16", "bfloat16", torch.bfloat16), "bfloat16"),
        (("fp16", "half", "float16", torch.float16), "float16"),
        (("fp32", "float", "float32", torch.float32), "float32"),
    ):
        assert {dtype_name(each) for each in names} == {name}
    assert dtype_name(None) is None
    assert renamed_flags(["--dtype", "fp16", "--model-dtype=bf16", "--out", "bf16"]) == [
        "--dtype",
        "float16",
        "--model-dtype=bfloat16",
        "--out",
        "bf16",
    ]
    assert renamed_flags(["--", "--dtype", "fp16"]) == ["--", "--dtype", "fp16"]
