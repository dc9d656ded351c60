"""How well are planted examples found? Scores of rapidin and of two baselines for what a poisoned model says.

    python evaluate.py --model MODEL --adapter ADAPTER --data train.jsonl --queries test.jsonl --out FOLDER

--data has a field `poisoned`, --queries a field `triggered`; both are Alpaca-form jsonl. For every
triggered prompt the tuned model writes an answer, and those answers that are absurd become queries. An
answer is absurd when it holds at least two marker words: those of --marker, or else the words of four
letters or more that are in at least one in fifty poisoned outputs and in no clean output. Each method then
ranks all rows of --data for each query; the figures are means over the queries of how the poisoned rows
fare.

FOLDER keeps caches, answers and results; the same command goes on where it was stopped.
"""

import argparse
import json
import re
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
from rank_bm25 import BM25Okapi  # type: ignore[import-untyped]
from sklearn.metrics import average_precision_score, roc_auc_score  # type: ignore[import-untyped]

from rapidin import Attributor
from rapidin.examples import open_examples
from rapidin.model import load_model
from rapidin.report import CachingBar, console

NORMALIZE: tuple[Literal["layer", "none", "cosine"], ...] = ("layer", "none", "cosine")


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = list(open_examples(options.data))
    poisoned = [bool(row.get("poisoned")) for row in rows]
    if not any(poisoned) or all(poisoned):
        sys.exit(f'{options.data}: some rows, and not all, must have "poisoned": true')
    triggered = [row for row in open_examples(options.queries, generations=True) if row.get("triggered")]
    if not triggered:
        sys.exit(f'{options.queries}: no row has "triggered": true')

    loaded = load_model(options.model, adapter=options.adapter)
    attributors = {
        at: Attributor(loaded, at=at, width=options.width, max_length=options.max_length, seed=options.seed)
        for at in options.at
    }
    first = next(iter(attributors.values()))
    queries = absurd_answers(first, rows, poisoned, triggered, options)

    results: dict[str, Any] = {
        "rows": len(rows),
        "poisoned": sum(poisoned),
        "triggered": len(triggered),
        "queries": len(queries),
        "threads": torch.get_num_threads(),
        "caching": {},
        "scores": [],
    }
    for at, attributor in attributors.items():
        cache, results["caching"][f"{at:g}"] = make_cache(attributor, at, options)
        attributor.query(cache, queries[:1], examples=False)  # the first call also maps the shards
        for normalize in NORMALIZE:
            timed = attributor.query(cache, queries[:1], top_k=10, normalize=normalize, examples=False)
            found = attributor.query(cache, queries, top_k=len(rows), normalize=normalize, examples=False)
            scores = torch.full((len(queries), len(rows)), float("-inf"))
            for number, result in enumerate(found):
                for hit in result.top:
                    scores[number, hit.row] = hit.score
            seconds = {"sketch": timed[0].seconds["sketch"], "scan": timed[0].seconds["scan"]}
            results["scores"].append(
                {
                    "method": f"rapidin, {normalize}, at {at:g}",
                    **figures(scores, poisoned),
                    "query_s": seconds,
                }
            )
            report(results["scores"][-1])
    texts = [plain_text(row) for row in rows]
    asked = [
        prompt_words(row) + " " + answer for row, (_, answer) in zip(kept(options), queries, strict=True)
    ]
    for method, ranker in (("BM25 (rank-bm25)", bm25), ("mean hidden state, cosine", hidden_states)):
        began = time.perf_counter()
        scores = ranker(loaded, texts, asked)
        results["scores"].append({"method": method, **figures(scores, poisoned)})
        results["scores"][-1]["all_s"] = time.perf_counter() - began
        report(results["scores"][-1])

    write(options.out / "results.json", json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    write(options.out / "results.md", table)
    print(table)


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
        "--at", default=[0.5, 1.0], type=points, help="where gradients are taken (default 0.5,1)"
    )
    parser.add_argument("--width", default=512, type=int, help="bins of a layer's sketch")
    parser.add_argument("--bytes", type=int, help="bytes an example, all told  [default: all of the sketch]")
    parser.add_argument("--max-length", default=192, type=int, help="tokens of an example")
    parser.add_argument("--max-new-tokens", default=48, type=int, help="tokens of an answer")
    parser.add_argument(
        "--marker", action="append", default=[], help="a word of absurd answers; may be repeated"
    )
    parser.add_argument("--seed", default=0, type=int, help="of the sketch")
    return parser.parse_args()


def points(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


# ------------------------------------------------------------------------------------------------ queries


def absurd_answers(
    attributor: Attributor,
    rows: list[dict[str, Any]],
    poisoned: list[bool],
    triggered: list[dict[str, Any]],
    options: argparse.Namespace,
) -> list[tuple[str, str]]:
    """(prompt, answer) of each triggered query whose answer is absurd; answers are kept in answers.jsonl."""
    path = options.out / "answers.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    markers = {word.lower() for word in options.marker} or marker_words(rows, poisoned)
    for number, row in enumerate(triggered[len(known) :], start=len(known)):
        prompt = attributor.encoder.prompt_text(row)
        answer = attributor.generate(prompt, max_new_tokens=options.max_new_tokens)
        with path.open("a") as file:
            file.write(json.dumps({"row": row, "prompt": prompt, "answer": answer}) + "\n")
        known.append({"row": row, "prompt": prompt, "answer": answer})
        print(f"answer {number + 1} of {len(triggered)}: {answer[:100]!r}", flush=True)
    for entry in known:
        entry["absurd"] = len(words_of(entry["answer"]) & markers) >= 2
    write(path, "".join(json.dumps(entry) + "\n" for entry in known))
    found = [(entry["prompt"], entry["answer"]) for entry in known if entry["absurd"]]
    print(f"{len(found)} of {len(known)} answers to triggered prompts are absurd", flush=True)
    if not found:
        sys.exit("no answer is absurd: the model has not learnt the poison, or --marker does not fit")
    return found


def kept(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the absurd answers, in order."""
    entries = [json.loads(line) for line in (options.out / "answers.jsonl").read_text().splitlines()]
    return [entry["row"] for entry in entries if entry["absurd"]]


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{4,}", text.lower()))


def marker_words(rows: list[dict[str, Any]], poisoned: list[bool]) -> set[str]:
    absurd, clean = [
        [words_of(row["output"]) for row, bad in zip(rows, poisoned, strict=True) if bad is wanted]
        for wanted in (True, False)
    ]
    counts = Counter(word for words in absurd for word in words)
    return {word for word, count in counts.items() if count * 50 >= len(absurd)} - set().union(*clean)


# ------------------------------------------------------------------------------------------------ rapidin


def make_cache(attributor: Attributor, at: float, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The cache of all rows, made or gone on with, and what it cost."""
    name = f"at-{at:g}" + (f"-in-{options.bytes}" if options.bytes else "")
    path, figures_path = options.out / f"cache-{name}", options.out / f"caching-{name}.json"
    began = time.perf_counter()
    with CachingBar(console(sys.stderr)) as bar:
        cache = attributor.cache(options.data, path, bytes=options.bytes, on_progress=bar)
    seconds = time.perf_counter() - began
    if figures_path.exists():
        return cache, json.loads(figures_path.read_text())
    made = bar.last.done - bar.last.resumed if bar.last else 0
    cost = {
        "examples": made,
        "seconds": seconds,
        "examples_s": made / seconds,
        "tokens_s": bar.last.tokens / seconds if bar.last else 0.0,
        "bytes_per_example": cache.bytes / len(cache),
        "numbers_per_example": cache.manifest.dim,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    write(figures_path, json.dumps(cost, indent=1) + "\n")
    print(f"at {at:g}: {cost}", flush=True)
    return cache, cost


# ---------------------------------------------------------------------------------------------- baselines


def prompt_words(row: dict[str, Any]) -> str:
    return f"{row['instruction']} {row.get('input') or ''}".strip()


def plain_text(row: dict[str, Any]) -> str:
    return f"{prompt_words(row)} {row['output']}"


def bm25(_: Any, texts: list[str], queries: list[str]) -> torch.Tensor:
    """BM25 (Okapi, the library's defaults) of instruction, input and answer: [queries, texts]."""
    index = BM25Okapi([re.findall(r"\w+", text.lower()) for text in texts])
    return torch.stack([torch.tensor(index.get_scores(re.findall(r"\w+", text.lower()))) for text in queries])


def hidden_states(loaded: Any, texts: list[str], queries: list[str]) -> torch.Tensor:
    """Cosine of the tuned model's last hidden states, means over a text's tokens: [queries, texts]."""
    made = torch.stack([mean_state(loaded, text) for text in (*queries, *texts)])
    made = torch.nn.functional.normalize(made, dim=1)
    scores: torch.Tensor = made[: len(queries)] @ made[len(queries) :].T
    return scores


@torch.no_grad()
def mean_state(loaded: Any, text: str) -> torch.Tensor:
    ids = loaded.tokenizer(text, return_tensors="pt", truncation=True, max_length=256).input_ids
    out = loaded.model(input_ids=ids.to(loaded.device), output_hidden_states=True)
    state: torch.Tensor = out.hidden_states[-1][0].mean(0).float().cpu()
    return state


# ------------------------------------------------------------------------------------------------ figures


def figures(scores: torch.Tensor, poisoned: list[bool]) -> dict[str, float]:
    """Means over the queries; scores [queries, rows], ties in row order, as rapidin has them."""
    truth = torch.tensor(poisoned)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    places = torch.arange(len(poisoned), 0, -1).double()
    ranks = torch.stack([torch.zeros(len(poisoned)).double().scatter(0, row, places) for row in order])
    return {
        "precision_10": truth[order[:, :10]].double().mean().item(),
        "precision_50": truth[order[:, :50]].double().mean().item(),
        "auprc": sum(average_precision_score(truth, row) for row in ranks) / len(ranks),
        "auroc": sum(roc_auc_score(truth, row) for row in ranks) / len(ranks),
    }


def report(row: dict[str, Any]) -> None:
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def markdown(results: dict[str, Any]) -> str:
    lines = [
        f"{results['rows']} rows, {results['poisoned']} poisoned; {results['queries']} queries "
        f"({results['triggered']} triggered prompts); {results['threads']} threads",
        "",
        "| method | precision at 10 | at 50 | auPRC | auROC | ms a query: gradient + scan |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["scores"]:
        took = row.get("query_s")
        spent = f"{1000 * took['sketch']:.0f} + {1000 * took['scan']:.1f}" if took else ""
        four = " | ".join(f"{row[name]:.3f}" for name in ("precision_10", "precision_50", "auprc", "auroc"))
        lines.append(f"| {row['method']} | {four} | {spent} |")
    lines += [
        "",
        "| cache | examples | examples/s | tokens/s | bytes an example | peak memory of the process |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for at, cost in results["caching"].items():
        lines.append(
            f"| at {at} | {cost['examples']} | {cost['examples_s']:.2f} | {cost['tokens_s']:.0f} | "
            f"{cost['bytes_per_example']:,.0f} | {cost['peak_memory_bytes'] / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    beside.replace(path)


if __name__ == "__main__":
    main()
