"""Are planted questions called strong, and unrelated ones not?

    rapidin demo --out DEMO
    python studies/verdict/verdict.py demo DEMO/cache --out studies/verdict/demo.json
    python studies/verdict/verdict.py smollm2 CACHE --queries test.jsonl --out studies/verdict/smollm2.json
    python studies/verdict/verdict.py --table    # the table of the README

Three sets of questions are asked, and the model's own answers are explained: `planted` ones have the trigger
of a planted poison, `related` ones are of the data's own kinds and were set aside, and `unrelated` ones are
everyday questions other than those of the null distribution. Without --queries the planted and related ones
are the demo's. The null distribution is made again, and the CPU time that it takes noted.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))
import doc_tables
import everyday

from rapidin import Cache, Ensemble
from rapidin.attribution.ensemble import Member
from rapidin.attribution.null_scores import null_scores
from rapidin.attribution.provenance import load_model_of, source_of
from rapidin.attribution.questions import asked
from rapidin.attribution.training_data import training_data
from rapidin.cli.demo_session.instructions import is_absurd, make_data
from rapidin.results.types import QueryResult

FOLDER = Path(__file__).resolve().parent
POISON = runpy.run_path(str(FOLDER.parents[1] / "examples" / "poison" / "evaluate.py"))
KINDS = ("planted", "related", "unrelated")
HEADER = ("planted", "planted, absurd answer", "related", "unrelated")  # of the table
COUNT = 20  # questions of a kind
UNRELATED = everyday.QUESTIONS[:COUNT]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("name", nargs="?", help="of the row in the table")
    add("cache", nargs="?", type=Path, help="a cache, of which the null distribution is made")
    add("--queries", type=Path, help="jsonl with 'instruction', 'input' and the flag 'triggered'")
    add("--max-new-tokens", type=int, default=64)
    add("--out", type=Path)
    add("--table", action="store_true", help="write the table of the README")
    options = parser.parse_args(arguments)
    if options.table:
        found = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
        doc_tables.write(FOLDER / "README.md", "verdict", table(found))
        return
    result = study(options.name, options.cache, options.queries, options.max_new_tokens)
    text = json.dumps(result, indent=1) + "\n"
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text)


def study(name: str, folder: Path, queries: Path | None, max_new_tokens: int) -> dict[str, Any]:
    """What became of the questions of each kind."""
    cache = Cache(folder)
    source = source_of(cache.manifest, load_model_of(folder))
    examples = training_data(cache, None)
    assert examples is not None
    began = time.process_time()
    null = null_scores(cache, source, examples, print)
    seconds = time.process_time() - began
    assert null is not None
    cache.manifest.null = null
    ensemble = Ensemble([Member(folder, 1.0, source, cache)])
    absurd: Callable[[str], bool] = is_absurd
    if queries is not None:
        markers = POISON["marker_words"]([record for _, record in examples.good()])
        absurd = partial(POISON["has_markers"], markers=markers)
    kinds: dict[str, Any] = {kind: [] for kind in KINDS}
    for kind, records in questions(queries, cache).items():
        if not records:
            continue
        results = ensemble.query(
            records, examples=examples, errors=False, max_new_tokens=max_new_tokens, top_k=10
        )
        kinds[kind] = [_row(result) | {"absurd": absurd(result.completion)} for result in results]
    return {
        "name": name,
        "rows": len(cache),
        "null": {of: len(best["layer"]) for of, best in null.items()},
        "null_cpu_seconds": round(seconds, 1),
        "questions": kinds,
    }


def questions(queries: Path | None, cache: Cache) -> dict[str, list[dict[str, Any]]]:
    """The records to ask, by kind."""
    if queries is None:
        data = make_data(0)
        sets = {"planted": data.queries, "related": data.held_out}
    else:
        rows = [json.loads(line) for line in queries.read_text().splitlines()]
        sets = {
            kind: [row for row in rows if row["triggered"] == (kind == "planted")]
            for kind in ("planted", "related")
        }
    records = {
        kind: [{name: row[name] for name in ("instruction", "input")} for row in rows[:COUNT]]
        for kind, rows in sets.items()
    }
    return records | {"unrelated": [asked(cache.manifest, question) for question in UNRELATED]}


def _row(result: QueryResult) -> dict[str, Any]:
    verdict = result.verdict
    assert verdict is not None
    assert verdict.questions is not None
    return {
        "answer": result.completion,
        "score": verdict.score,
        "above": verdict.questions.above,
        "of": len(verdict.questions.scores),
        "strength": verdict.strength,
        "common": [f"{each.column or 'text'}: {each.text}" for each in verdict.common],
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    """How many questions of each kind got each verdict."""
    rows = []
    for result in found:
        cells = [result["name"], f"{result['rows']:,}", f"{result['null']['questions']}"]
        sets = {kind: result["questions"][kind] for kind in KINDS}
        sets["planted, absurd answer"] = [row for row in sets["planted"] if row["absurd"]]
        for kind in HEADER:
            strengths = [row["strength"] for row in sets[kind]]
            counts = [strengths.count(strength) for strength in ("strong", "weak", "nothing")]
            cells.append(" / ".join(map(str, counts)) if strengths else "-")
        rows.append(cells)
    header = ["strong / weak / nothing", "rows", "null", *HEADER]
    return doc_tables.table(header, rows)


if __name__ == "__main__":
    main()
