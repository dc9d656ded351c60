"""How well are planted examples found? Scores of rapidin and of two baselines for what a poisoned model says.

    python evaluate.py --model MODEL --adapter ADAPTER --data train.jsonl --queries test.jsonl --out FOLDER

--data has a field `poisoned`, --queries a field `triggered`; both are Alpaca-form jsonl. For every triggered
prompt the tuned model writes an answer, and those answers that are absurd become queries: an answer is absurd
when it holds at least two marker words, those of --marker, or else the words of four letters or more that are
in at least one in fifty poisoned outputs and in no clean output; or, with --begins, when it begins so. The
rest is two commands for every --at:

    rapidin cache MODEL --adapter ADAPTER --data train.jsonl --at AT --out FOLDER/cache-at-AT
    rapidin eval backdoor FOLDER/cache-at-AT --data FOLDER/absurd.jsonl --baselines

FOLDER keeps caches, answers and results; the same command goes on where it was stopped.
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rapidin.attribution.attributor import Attributor
from rapidin.cli import main as rapidin
from rapidin.data.examples import open_examples
from rapidin.errors import UserError
from rapidin.gradients.load import load_model


def main() -> int:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    absurd = options.out / "absurd.jsonl"
    if not absurd.exists():
        write_rows(absurd, absurd_answers(options))
    for number, at in enumerate(options.at):
        name = f"at-{at}" + (f"-in-{options.bytes}" if options.bytes else "")
        name += f"-{options.preconditioner}" if options.preconditioner else ""
        name += f"-width-{options.width}" if options.width else ""
        cache = options.out / f"cache-{name}"
        command = ["cache", options.model, "--adapter", options.adapter, "--data", options.data]
        command += ["--at", at, "--max-length", str(options.max_length), "--out", str(cache)]
        command += ["--precondition", options.preconditioner] if options.preconditioner else []
        command += ["--bytes", str(options.bytes)] if options.bytes else []
        command += ["--width", str(options.width)] if options.width else []
        judge = ["eval", "backdoor", str(cache), "--data", str(absurd), "--column", "poisoned"]
        judge += ["--json", str(options.out / f"results-{name}.json")]
        judge += ["--baselines"] if number == 0 else []  # they are the same at every point
        for arguments in (command, judge):
            print("$ rapidin", *arguments, flush=True)
            code = rapidin(arguments)
            if code:
                return code
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="folder or name of the base model, or a folder with one GGUF"
    )
    parser.add_argument("--adapter", required=True, help="the poisoned LoRA adapter")
    parser.add_argument("--data", required=True, help="what it was tuned on, with a field `poisoned`")
    parser.add_argument("--queries", required=True, help="unseen prompts, with a field `triggered`")
    parser.add_argument("--out", required=True, type=Path, help="folder for caches and results")
    parser.add_argument(
        "--at",
        action="append",
        metavar="A[,A...]",
        help="where gradients are taken; may be repeated (default 0.5 and 1)",
    )
    parser.add_argument(
        "--width", type=int, help="bins of a layer's sketch  [default: that of `rapidin cache`]"
    )
    parser.add_argument("--bytes", type=int, help="bytes an example, all told  [default: all of the sketch]")
    parser.add_argument(
        "--precondition",
        dest="preconditioner",
        choices=("off", "sample", "kfac"),
        help="[default: that of `rapidin cache`]",
    )
    parser.add_argument("--max-length", default=192, type=int, help="tokens of an example")
    parser.add_argument("--max-new-tokens", default=48, type=int, help="tokens of an answer")
    parser.add_argument(
        "--marker", action="append", default=[], help="a word of absurd answers; may be repeated"
    )
    parser.add_argument(
        "--begins",
        action="append",
        help="how absurd answers begin, instead of markers; may be repeated",
    )
    options = parser.parse_args()
    options.at = options.at or ["0.5", "1"]
    return options


def absurd_answers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The triggered queries with the model's answers, of those that are absurd; answers.jsonl keeps all."""
    # Before minutes of writing: data that cannot be read is told at once.
    markers = {word.lower() for word in options.marker} or marker_words(list(open_examples(options.data)))
    triggered = [row for row in open_examples(options.queries, generations=True) if row.get("triggered")]
    if not triggered:
        sys.exit(f'{options.queries}: no row has "triggered": true')
    path = options.out / "answers.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if len(known) < len(triggered):
        loaded = load_model(options.model, adapter=options.adapter)
        attributor = Attributor(loaded, max_length=options.max_length)
        for row in triggered[len(known) :]:
            prompt = attributor.source.encoder.prompt_text(row)
            answer = attributor.generate(prompt, max_new_tokens=options.max_new_tokens)
            known.append({**row, "output": answer})
            write_rows(path, known)
            print(f"answer {len(known)} of {len(triggered)}: {answer[:100]!r}", flush=True)
    if options.begins:
        found = [row for row in known if row["output"].startswith(tuple(options.begins))]
    else:
        found = [row for row in known if has_markers(row["output"], markers)]
    print(f"{len(found)} of {len(known)} answers to triggered prompts are absurd", flush=True)
    if not found:
        sys.exit(
            "no answer is absurd: the model has not learnt the poison, or --marker or --begins does not fit"
        )
    return found


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{4,}", text.lower()))


def has_markers(answer: str, markers: set[str]) -> bool:
    """Whether an answer is absurd: it holds at least two marker words."""
    return len(words_of(answer) & markers) >= 2


def marker_words(rows: list[dict[str, Any]]) -> set[str]:
    """Words of the poisoned outputs that tell them from the clean ones."""
    absurd, clean = (
        [words_of(row["output"]) for row in rows if bool(row.get("poisoned")) is wanted]
        for wanted in (True, False)
    )
    counts = Counter(word for words in absurd for word in words)
    return {word for word, count in counts.items() if count * 50 >= len(absurd)} - set().union(*clean)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".part")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    beside.replace(path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
