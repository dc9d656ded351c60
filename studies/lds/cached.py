"""LDS of caches as they are queried: one cache, TracIn's of checkpoints, an ensemble of dropout masks.

    rapidin cache BASE --checkpoints TRUTH/checkpoints --data TRUTH/train.jsonl --out tracin
    rapidin cache TRUTH/tuned --base BASE --masks 5 --dropout 0.1 --data TRUTH/train.jsonl --out masks
    python studies/lds/cached.py TRUTH tracin masks [--methods dot:layer,...]

TRUTH is the folder of `rapidin eval lds`, and the caches are of its training examples; each is scored by the
rows that the truth's subsets held. Prints LDS and its 95% interval over the test examples.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rapidin.attribution.clock import Clock
from rapidin.attribution.ensemble import Ensemble
from rapidin.attribution.options import QueryOptions
from rapidin.evaluate import lds
from rapidin.evaluate.ground_truth import GroundTruth
from rapidin.evaluate.methods import DEFAULT, each_score, parse_methods
from rapidin.evaluate.subject import open_training_data


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("truth", type=Path)
    parser.add_argument("caches", type=Path, nargs="+", help="caches, or folders of ensembles")
    parser.add_argument("--methods", default=DEFAULT)
    options = parser.parse_args(arguments)
    truth = GroundTruth(options.truth)
    train, queries = truth.examples("train"), list(truth.examples("test"))
    for folder in options.caches:
        ensemble = Ensemble.read(folder)
        if open_training_data(ensemble).identity != train.identity:
            parser.error(f"'{folder}' is not of the training examples of '{options.truth}'")
        query = ensemble.sketched(queries, QueryOptions(max_new_tokens=1), Clock())
        for method, scores, _ in each_score(query.sketches, query.texts, parse_methods(options.methods)):
            value, low, high = lds.score(truth.masks, truth.losses, scores)
            print(f"{folder}  {method}  {value:.3f} ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
