"""Prints how much of the package the tests ran, and the modules of which they ran less than 90%.

    python .ci/coverage.py build/coverage.json

The file is coverage's JSON report. The share of a module counts its lines and the branches between them.
"""

import json
import sys
from pathlib import Path

LEAST = 90.0


def main(path: str) -> None:
    report = json.loads(Path(path).read_text("utf-8"))
    shares = {
        name: file["summary"] for name, file in report["files"].items() if file["summary"]["num_statements"]
    }
    low = sorted(
        (each["percent_covered"], name) for name, each in shares.items() if each["percent_covered"] < LEAST
    )
    for percent, name in low:
        print(f"{percent:5.1f}%  {name}")
    total = report["totals"]
    for kind, ran, count in (
        ("lines", total["covered_lines"], total["num_statements"]),
        ("branches", total["covered_branches"], total["num_branches"]),
    ):
        print(f"{ran / count:.1%} of {count:,} {kind} in {len(shares):,} modules")
    print(f"{len(low)} modules have less than {LEAST:.0f}%")


if __name__ == "__main__":
    main(*sys.argv[1:])
