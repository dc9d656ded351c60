"""Scores of other packages, by the scripts of ../peers on the adapter, the main case of each method alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pretrained_files import Scores

from rapidin.errors import UserError
from rapidin.evaluate.ground_truth import GroundTruth

sys.path.append(str(Path(__file__).resolve().parents[1] / "peers"))
from peer_lds import judge

PACKAGES = ("bergson", "kronfluence", "traker")
AT = 1.0


def run_peers(truth: GroundTruth, work: Path, environment: Path, only: Sequence[str]) -> None:
    """Run packages in an environment that `peers.py setup` made, at the tuned adapter. A case that fails is
    kept with the reason, and tried again by the next call. Raises UserError for an unknown package, or if
    there is no such environment."""
    unknown = sorted(set(only) - set(PACKAGES))
    if unknown:
        raise UserError(f"unknown package '{unknown[0]}'", f"known: {', '.join(PACKAGES)}")
    python = environment.absolute() / "bin" / "python"
    if not python.exists():
        raise UserError(f"'{environment}' is no environment", "make it with 'studies/peers/peers.py setup'")
    texts, models = judge.prepare_texts(truth.folder.resolve(), work.resolve() / "peers")
    scores = Scores(work)
    for package in only:
        place = work.resolve() / "peers" / f"{package}-{AT:g}"
        arguments = [str(texts), str(models[AT]), str(place), "--truth", str(truth.folder.resolve())]
        arguments += ["--at", f"{AT:g}", "--seeds", "1", "--main"]
        for row in judge.run_package(package, str(python), arguments, place):
            settings = {key: value for key, value in row.get("settings", {}).items() if key != "seed"}
            details = ", ".join(f"{key} {value}" for key, value in settings.items())
            method = f"{row['method']} ({details})" if details else str(row["method"])
            about = {
                "package": f"{package} {row.get('version', '')}".strip(),
                "at": f"{AT:g}",
                "preconditioner": "",
                "rows": "its own",
                "bytes": row.get("bytes"),
                "seconds": row.get("seconds"),
                "failed": row.get("failed"),
                "method": method,
            }
            file = row.get("scores")
            found = {} if file is None else {method: np.load(place / file, allow_pickle=False)}
            scores.save(f"{package} {method}", about, found)
