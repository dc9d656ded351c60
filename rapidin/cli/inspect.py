"""rapidin info and rapidin verify."""

import sys

from rapidin.cli.caches import folders_of
from rapidin.cli.console import messages
from rapidin.cli.options import CacheFolder, Quiet, command
from rapidin.errors import UserError


@command("info")
def info(cache: CacheFolder) -> None:
    """Say what a cache holds and how it was made."""
    from rapidin import report
    from rapidin.cache import Cache

    out = report.console(sys.stdout)
    for number, folder in enumerate(folders_of(cache)):
        if number:
            out.print()
        out.print(report.info_report(Cache(folder).info()))


@command("verify")
def verify(cache: CacheFolder, quiet: Quiet = False) -> None:
    """Check every byte of a cache against its checksums."""
    from rapidin import report
    from rapidin.cache import Cache, Manifest

    for folder in folders_of(cache):
        manifest = Manifest.read(folder)
        with report.BytesBar(messages(quiet), "reading") as bar:
            problems = Cache.verify(folder, on_progress=bar)
        if problems:
            for problem in problems[1:]:
                print(report.one_line(problem))
            others = f" (and {len(problems) - 1} more, on standard output)" if problems[1:] else ""
            raise UserError(
                problems[0] + others, "delete the file, and the same 'rapidin cache' command makes it again"
            )
        size = report.size_text(sum(shard.bytes for shard in manifest.shards), None, len(manifest.shards))
        rows = f"{manifest.rows_done:,}" + ("" if manifest.complete else f" of {manifest.rows:,}")
        print(f"{report.one_line(str(folder))}: every byte is as it was written ({rows} examples, {size})")
