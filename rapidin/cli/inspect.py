"""rapidin info, rapidin verify and rapidin merge."""

import sys
from typing import Annotated

import typer

from rapidin.cli.caches import folders_of
from rapidin.cli.console import line, messages
from rapidin.cli.options import CacheFolder, Quiet, command
from rapidin.errors import UserError


@command("info", example="rapidin info CACHE")
def info(cache: CacheFolder) -> None:
    """Say what a cache holds and how it was made."""
    from rapidin.cache import Cache
    from rapidin.cli.tables import info_report
    from rapidin.results.terminal import make_console

    out = make_console(sys.stdout)
    for number, folder in enumerate(folders_of(cache)):
        if number:
            out.print()
        out.print(info_report(Cache(folder).info()))


@command("verify", example="rapidin verify CACHE")
def verify(cache: CacheFolder, quiet: Quiet = False) -> None:
    """Check every byte of a cache against its checksums."""
    from rapidin.cache import Cache, Manifest
    from rapidin.cache.reader import decoys_folder
    from rapidin.cli.progress import BytesBar
    from rapidin.cli.tables import size_text
    from rapidin.results.text import one_line

    for folder in folders_of(cache):
        manifest = Manifest.read(folder)
        with BytesBar(messages(quiet), "reading") as bar:
            problems = Cache.verify(folder, on_progress=bar)
        if problems:
            for problem in problems[1:]:
                print(one_line(problem))
            others = f" (and {len(problems) - 1} more, on standard output)" if problems[1:] else ""
            raise UserError(
                problems[0] + others, "delete the file, and the same 'rapidin cache' command makes it again"
            )
        size = size_text(sum(shard.bytes for shard in manifest.shards), None, len(manifest.shards))
        rows = f"{manifest.rows_done:,}" + ("" if manifest.complete else f" of {manifest.rows:,}")
        decoys = decoys_folder(folder)
        more = "" if decoys is None else f", and {Manifest.read(decoys).rows_done:,} decoys"
        print(f"{one_line(str(folder))}: OK: all checksums match ({rows} examples, {size}{more})")


@command("merge", example="rapidin merge WHOLE part-1 part-2")
def merge(
    out: Annotated[
        str,
        typer.Argument(metavar="OUT", help="Folder to write; resumes an unfinished one."),
    ],
    caches: Annotated[
        list[str], typer.Argument(metavar="CACHE...", help="Parts made by 'rapidin cache --part I/N'.")
    ],
    quiet: Quiet = False,
) -> None:
    """Put the parts of one cache together, checking every byte."""
    from rapidin.cache.merge import merge as merged
    from rapidin.cli.progress import BytesBar
    from rapidin.cli.tables import size_text

    with BytesBar(messages(quiet), "copying") as bar:
        cache = merged(out, caches, on_progress=bar)
    if not quiet:
        size = size_text(cache.bytes, None, len(cache.manifest.shards))
        line(f"{len(cache):,} examples of {len(caches):,} parts are in {out} ({size})")
