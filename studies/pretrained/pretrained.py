"""Scores, and trainings without what they rank first, of a pretrained model with an adapter.

    python studies/pretrained/pretrained.py scores TRUTH WORK [--only WAY ...]
    python studies/pretrained/pretrained.py peers TRUTH WORK ENVIRONMENT [--only PACKAGE ...]
    python studies/pretrained/pretrained.py second TRUTH WORK [--cost]
    python studies/pretrained/pretrained.py removals TRUTH WORK [--cost]
    python studies/pretrained/pretrained.py keep TRUTH WORK
    python studies/pretrained/pretrained.py restore TRUTH WORK MODEL

TRUTH is the folder of `rapidin eval lds`, finished or not, and only read. WORK gets caches, and the scores of
each way to make them in a file of its own, so that what is there is not computed again. `scores` are those of
rapidin, of the baselines without gradients and of two methods written out here: RISE (../readout), and the
RapidIn paper's own projection. `peers` are the packages of ../peers in their ENVIRONMENT. `second` trains on
the first 20 subsets with another seed, for the noise that no method can predict. `removals` trains without
the 13 rows (5%) that each of the six leading methods ranks first for each of ten test texts, and without 13
random rows, ten times; --cost measures what the missing trainings take, and stops. Both go on where an
earlier call stopped. `keep` puts all of it into the files that `pretrained_report.py` reads, and `restore`
begins new folders with these; the same `rapidin eval lds` as for the truth then tunes the adapter again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rapidin.errors import UserError
from rapidin.evaluate.ground_truth import GroundTruth

sys.path.append(str(Path(__file__).resolve().parent))
from pretrained_files import Scores, keep, restore
from pretrained_peers import PACKAGES, run_peers
from pretrained_retrained import removals, second_seeds
from pretrained_scores import WAYS


def log(line: str) -> None:
    """Show a line of progress."""
    print(line, file=sys.stderr, flush=True)


def score(truth: GroundTruth, work: Path, only: Sequence[str]) -> None:
    """Compute the ways that `work` lacks, in the order of WAYS. Raises UserError for an unknown one."""
    unknown = sorted(set(only) - set(WAYS))
    if unknown:
        raise UserError(f"unknown way '{unknown[0]}'", f"known: {', '.join(WAYS)}")
    scores = Scores(work)
    for name in only or WAYS:
        if scores.has(name):
            continue
        log(f"{name}: begun")
        scores.save(name, *WAYS[name](truth, work, log))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("scores", "peers", "second", "removals", "keep", "restore"):
        command = commands.add_parser(name)
        command.add_argument("truth", type=Path, metavar="TRUTH")
        command.add_argument("work", type=Path, metavar="WORK")
        if name == "peers":
            command.add_argument("environment", type=Path, metavar="ENVIRONMENT")
        if name == "restore":
            command.add_argument("model", metavar="MODEL")
        if name in ("scores", "peers"):
            names = list(WAYS) if name == "scores" else list(PACKAGES)
            command.add_argument("--only", nargs="+", default=[], metavar="NAME", help=", ".join(names))
        if name in ("second", "removals"):
            command.add_argument("--cost", action="store_true", help="measure one training and stop")
        if name == "keep":
            command.add_argument("--out", type=Path, default=None, help="another folder of results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        if options.command == "restore":
            restore(options.model, options.truth, options.work)
            return
        truth = GroundTruth(options.truth)
        options.work.mkdir(parents=True, exist_ok=True)
        if options.command == "scores":
            score(truth, options.work, options.only)
        elif options.command == "peers":
            run_peers(truth, options.work, options.environment, options.only or PACKAGES)
        elif options.command == "keep":
            keep(truth, options.work, options.out)
        else:
            begin = second_seeds if options.command == "second" else removals
            begin(truth, options.work, only_cost=options.cost, log=log)
    except UserError as error:
        print(f"pretrained: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
