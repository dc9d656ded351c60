"""Lines and progress on standard error, and libraries that keep quiet."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

from rapidin.cli.options import ModelOptions, with_flags
from rapidin.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from rapidin.gradients.model import LoadedModel


def line(text: str) -> None:
    """A line of rapidin's own on standard error."""
    from rapidin.results.text import one_line

    print(f"rapidin: {one_line(with_flags(text))}", file=sys.stderr)


def messages(quiet: bool) -> "Console":
    """Where progress goes: standard error, and nowhere when quiet or another process speaks."""
    from rapidin.distributed import world
    from rapidin.results.terminal import make_console

    console = make_console(sys.stderr)
    return make_console(open(os.devnull, "w")) if quiet or not world().leads else console


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """transformers, peft and torch print no bars and warnings; a download keeps its bar on a terminal."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # warns of classes of torchao
    if sys.stderr.isatty():
        enable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def loading(console: "Console", model: str) -> Iterator[None]:
    """Say that a model is loaded; from disk without bars (nothing turns those of GGUF files off)."""
    if not os.path.exists(model):
        if console.is_terminal:
            console.print("loading the model")
        yield
        return
    with console.status("loading the model"), open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


def load(
    console: "Console",
    model: str,
    adapter: str | None,
    base: str | None,
    options: ModelOptions,
    task: str | None = None,
) -> "LoadedModel":
    """`rapidin.gradients.load.load_model`, with something to look at meanwhile; options: the others."""
    from rapidin.gradients.load import load_model

    with loading(console, model):
        loaded = load_model(
            model,
            adapter=adapter,
            base=base,
            tokenizer=options.tokenizer,
            device=options.device,
            dtype=options.model_dtype,
            trust_remote_code=options.trust_remote_code,
            shard_model=options.shard_model,
            task=task,
        )
    for note in loaded.notes:
        line(note)
    return loaded


def check_writable(path: str | None, *, standard: bool = False, folder: bool = False) -> None:
    """Raise UserError where an output that is asked for cannot be written, before any work is done for it.

    standard: it may be -, standard output; folder: it may be a folder.
    """
    if path is None or (path == "-" and standard):
        return
    if path == "-":
        raise UserError("this output cannot be written to standard output", "name a file")
    what = "it is a directory" if os.path.isdir(path) and not folder else ""
    if not os.path.isdir(os.path.dirname(path) or "."):
        what = "the directory does not exist"
    if what:
        remedy = "name a file, or - for standard output" if standard else "name another file"
        raise UserError(f"cannot write {path}: {what}", remedy)


def write_text(path: str, text: str) -> None:
    """Write a result; UserError where it cannot be."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
