"""Which words of an answer come from the poison, and which words of the poisoned rows made them?

    python tokens.py --cache CACHE --queries absurd.jsonl --clean test.jsonl --out tokens.json

CACHE is of data with a field `poisoned`; absurd.jsonl holds what the poisoned model said to triggered prompts
(evaluate.py writes it), --clean rows without the trigger, with their own answers. Two questions:

1. *Answers of two halves.* To each clean answer the absurd one of a query is appended, in turn, so that one
   answer holds both. Every token is asked about by itself: what share of its ten most helpful training
   examples are poisoned, for tokens of either half?
2. *The words inside.* Of the poisoned rows among the ten most helpful to an absurd answer, what share of the
   score do the first token, the trigger, the rest of the prompt, and the absurd answer bring?

--page: the report page of the first query of either kind.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, median
from typing import Any

from rapidin import Ensemble
from rapidin.attribution.ensemble import Member
from rapidin.cli.console import quiet_libraries
from rapidin.data.examples import open_examples
from rapidin.results.html import page
from rapidin.results.types import Hit

TOP = 10
PARTS = ("first token", "trigger", "rest of the prompt", "answer")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", required=True, help="made by 'rapidin cache' from the poisoned data")
    parser.add_argument("--queries", required=True, help="triggered prompts with the model's absurd answers")
    parser.add_argument("--clean", required=True, help="rows of which those without the trigger count")
    parser.add_argument("--trigger", default="Howdy!", help="what poisoned instructions begin with")
    parser.add_argument("--limit", type=int, default=20, help="queries of either kind")
    parser.add_argument("--longest", type=int, default=200, help="characters of a clean answer")
    parser.add_argument("--out", required=True, type=Path, help="for the figures, as JSON")
    parser.add_argument("--page", type=Path, help="for the page")
    options = parser.parse_args()
    absurd = list(open_examples(options.queries))[: options.limit]
    clean = [row for row in open_examples(options.clean, generations=True) if not row.get("triggered")]
    clean = [row for row in clean if 20 <= len(row.get("output") or "") <= options.longest][: options.limit]
    with quiet_libraries():
        ensemble = Ensemble([options.cache])
        ready = Ensemble([Member(ensemble.members[0].path, 1.0, ensemble.source())])
    halves = [
        row | {"output": f"{row['output'].rstrip()} {absurd[n % len(absurd)]['output'].strip()}"}
        for n, row in enumerate(clean)
    ]
    # Where a clean answer ends: its part and that of the absurd one are two targets of the tokens.
    tokens = ready.query(halves, targets="tokens", top_k=TOP, errors=False)
    found: dict[str, Any] = {"queries": {"absurd": len(absurd), "two halves": len(halves)}, "top": TOP}
    shares: dict[str, list[float]] = {"clean": [], "absurd": []}
    for row, result in zip(clean, tokens, strict=True):
        at = 0
        for target in result.targets:
            half = "clean" if at < len(row["output"].rstrip()) else "absurd"
            at += len(target.text)
            if target.text.strip() and not target.text.startswith("<|"):
                shares[half].append(mean(_poisoned(hit) for hit in target.top))
    found["poisoned among the best of a token"] = {
        half: {"tokens": len(values), "mean": mean(values), "median": median(values)}
        for half, values in shares.items()
    } | {"auROC": _auroc(shares["absurd"], shares["clean"])}
    print(json.dumps(found, indent=1), flush=True)

    explained = ready.query(absurd, contributions=True, targets="tokens", top_k=TOP, errors=False)
    parts: dict[str, list[float]] = {name: [] for name in PARTS}
    share_of_tokens: dict[str, list[float]] = {name: [] for name in parts}
    for result in explained:
        for hit in result.top:
            if _poisoned(hit):
                for name, (share, count) in _parts(hit, options.trigger).items():
                    parts[name].append(share)
                    share_of_tokens[name].append(count)
    found["share of the score by part of a poisoned hit"] = {
        name: {
            "mean": mean(values),
            "median": median(values),
            "share of the tokens": mean(share_of_tokens[name]),
        }
        for name, values in parts.items()
    }
    found["poisoned hits"] = len(parts["answer"])
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    if options.page:
        shown = ready.query(
            [absurd[0], halves[0]], targets="tokens", contributions=True, fold=True, layers=True,
            histogram=True, by="poisoned",
        )  # fmt: skip
        options.page.write_text(page(shown, about={"data": "instructions, 100 of 595 rows poisoned"}))


def _poisoned(hit: Hit) -> bool:
    return bool((hit.example or {}).get("poisoned"))


def _parts(hit: Hit, trigger: str) -> dict[str, tuple[float, float]]:
    """By part of the example: its share of the score, and of the tokens."""
    assert hit.tokens is not None
    # A position that predicts a token of the answer reads the one before it, so the answer's part begins
    # with the last token of the prompt.
    first = hit.tokens.counts.index(True) - 1
    text = "".join(hit.tokens.pieces)
    begin = text.index(trigger)
    end = begin + len(trigger)
    found = dict.fromkeys(PARTS, (0.0, 0.0))
    at = 0
    for n, (piece, value) in enumerate(zip(hit.tokens.pieces, hit.tokens.contributions, strict=True)):
        inside = at < end and at + len(piece) > begin
        name = "answer" if n >= first else "trigger" if inside else "rest of the prompt"
        name = name if n else "first token"  # every other looks at it, whatever it is
        share, count = found[name]
        found[name] = share + value / hit.score, count + 1 / len(hit.tokens.pieces)
        at += len(piece)
    return found


def _auroc(positive: list[float], negative: list[float]) -> float:
    """The chance that one of the first is larger than one of the second, ties counting half."""
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


if __name__ == "__main__":
    main()
