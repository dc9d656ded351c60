"""rapidin info and rapidin verify."""

import sys
from pathlib import Path

from rapidin.cli.console import messages
from rapidin.cli.options import CacheFolder, Quiet, command
from rapidin.errors import UserError


@command("info")
def info(cache: CacheFolder) -> None:
    """Say what a cache holds and how it was made."""
    from rapidin import report
    from rapidin.cache import Cache

    report.console(sys.stdout).print(report.info_report(Cache(cache).info()))


@command("verify")
def verify(cache: CacheFolder, quiet: Quiet = False) -> None:
    """Check every byte of a cache against its checksums."""
    from rapidin import report
    from rapidin.cache import Cache, Manifest

    manifest = Manifest.read(Path(cache))
    with report.BytesBar(messages(quiet), "reading") as bar:
        problems = Cache.verify(cache, on_progress=bar)
    if problems:
        for problem in problems[1:]:
            print(report.one_line(problem))
        others = f" (and {len(problems) - 1} more, on standard output)" if problems[1:] else ""
        raise UserError(
            problems[0] + others, "delete the file, and the same 'rapidin cache' command makes it again"
        )
    size = report.size_text(sum(shard.bytes for shard in manifest.shards), None, len(manifest.shards))
    rows = f"{manifest.rows_done:,}" + ("" if manifest.complete else f" of {manifest.rows:,}")
    print(f"{report.one_line(cache)}: every byte is as it was written ({rows} examples, {size})")
