"""Kill `rapidin cache` half-way with SIGKILL, start it again, and compare with a run that was left alone.

    python kill_and_resume.py --out FOLDER --query query.jsonl -- MODEL --adapter ADAPTER --data train.jsonl

What follows `--` goes to `rapidin cache`. Exit code 0 when manifest, shards and hits are the same, byte for
byte.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from rapidin.cache import Manifest
from rapidin.errors import UserError

RAPIDIN = [sys.executable, "-m", "rapidin"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="a new folder for both caches and their hits")
    parser.add_argument("--query", required=True, help="jsonl with the queries to compare")
    parser.add_argument("cache", nargs="+", help="after --, the arguments of `rapidin cache`")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=False)
    killed, alone = options.out / "killed", options.out / "alone"

    rows = kill_half_way([*RAPIDIN, "cache", *options.cache, "--out", str(killed)], killed)
    print(f"killed with {rows} rows done", flush=True)
    for path in (killed, alone):
        subprocess.run([*RAPIDIN, "cache", *options.cache, "--out", str(path)], check=True)
        hits = options.out / f"{path.name}.json"
        command = [*RAPIDIN, "query", str(path), "--data", options.query, "--json", str(hits), "--quiet"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    pairs = [(killed / name, alone / name) for name in sorted(names(killed) | names(alone))]
    pairs.append((options.out / "killed.json", options.out / "alone.json"))
    different = [left.name for left, right in pairs if not same(left, right)]
    print(
        f"{len(pairs)} files compared; "
        + (f"different: {', '.join(different)}" if different else "all the same")
    )
    return 1 if different else 0


def kill_half_way(command: list[str], cache: Path) -> int:
    """Start the command and kill it once half of the rows, but not all, are in the manifest."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            manifest = Manifest.read(cache)
        except UserError:
            manifest = None
        if manifest is not None and manifest.rows_done * 2 >= manifest.rows and not manifest.complete:
            process.kill()
            process.wait()
            return manifest.rows_done
        time.sleep(0.05)
    sys.exit("the run ended before it could be killed half-way: give it smaller shards with --shard-rows")


def names(folder: Path) -> set[str]:
    """Files that make up a cache."""
    return {path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}


def same(left: Path, right: Path) -> bool:
    return left.exists() and right.exists() and left.read_bytes() == right.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
