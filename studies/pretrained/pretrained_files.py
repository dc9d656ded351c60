"""The files of the study: scores by way, trainings, and what of them the repository keeps.

`results/` has all that the tables are made of, without a text: `truth.npz` the subsets as bits, the losses of
the test examples and what the truth was made with; `scores/` a file for each way; `second.npz` and
`removals.npz` the trainings of those names.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rapidin.errors import UserError
from rapidin.evaluate.folders import model_reference, start_or_resume
from rapidin.evaluate.ground_truth import DESCRIPTION, RETRAINED, VERSION, GroundTruth, save_retrained
from rapidin.files import replace_file

RESULTS = Path(__file__).resolve().parent / "results"
SECOND, REMOVALS = "second.npz", "removals.npz"
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def key(method: str, preconditioner: str = "", rows: str = "", seed: str = "") -> str:
    """The name of scores within a way: the method, the preconditioner of the gradients, what is kept of a
    row, and the seed of that."""
    return "|".join((method, preconditioner, rows, seed)).rstrip("|")


class Scores:
    """Scores [test, train] by way and `key`, in `folder`/scores: a file for each way.

    A way has a description: the "package", "at", the point where it takes gradients, and more of other
    packages.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "scores"

    def has(self, name: str) -> bool:
        """Whether this way has been computed."""
        return self._file(name).exists()

    def save(
        self, name: str, about: Mapping[str, Any], scores: Mapping[str, npt.NDArray[Any]], dtype: str = "f4"
    ) -> None:
        """Keep a way. dtype: "f2" divides the scores of each test example by their largest one first, which
        changes neither ranks nor LDS."""
        arrays = {method: np.asarray(each, dtype=np.float64) for method, each in scores.items()}
        if dtype == "f2":
            arrays = {method: each / _largest(each) for method, each in arrays.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        save_npz(self._file(name), {**about, "name": name}, {k: v.astype(dtype) for k, v in arrays.items()})

    def load(self, name: str) -> tuple[dict[str, Any], dict[str, Floats]]:
        """The description of a way, with its name, and its scores by method. Raises UserError if it is
        missing."""
        if not self.has(name):
            raise UserError(f"'{self.folder.parent}' has no scores of '{name}'", "compute them by 'scores'")
        with np.load(self._file(name), allow_pickle=False) as file:
            return about_of(file), {key: file[key].astype(np.float64) for key in file.files if key != "about"}

    def names(self) -> list[str]:
        """The ways that have been computed, in the order of their files."""
        found = []
        for path in sorted(self.folder.glob("*.npz")):
            with np.load(path, allow_pickle=False) as file:
                found.append(str(about_of(file)["name"]))
        return found

    def _file(self, name: str) -> Path:
        return self.folder / (re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") + ".npz")


def _largest(scores: Floats) -> Floats:
    largest: Floats = np.nanmax(np.abs(scores), axis=1, keepdims=True)
    return np.where(largest > 0, largest, 1.0)


def save_npz(path: Path, about: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write arrays and what is to be said of them, as JSON, atomically and compressed."""
    buffer, text = io.BytesIO(), json.dumps(about).encode()
    np.savez_compressed(buffer, about=np.frombuffer(text, dtype=np.uint8), **arrays)
    replace_file(path, buffer.getvalue())


def about_of(file: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """What `save_npz` was told of the arrays."""
    about: dict[str, Any] = json.loads(file["about"].tobytes())
    return about


def keep(truth: GroundTruth, work: Path, out: Path | None = None) -> None:
    """Put what the tables are made of into `out`, by default the study's own folder of results."""
    out = out or RESULTS
    out.mkdir(parents=True, exist_ok=True)
    about = {key: truth.description[key] for key in ("identity", "train", "test", "settings")}
    arrays = {"masks": np.packbits(truth.masks, axis=1), "losses": truth.losses.astype(np.float32)}
    save_npz(out / "truth.npz", about, arrays)
    for name in (SECOND, REMOVALS):
        if (work / name).exists():
            shutil.copyfile(work / name, out / name)
    scores, kept = Scores(work), Scores(out)
    shutil.rmtree(kept.folder, ignore_errors=True)
    for name in scores.names():
        kept.save(name, *scores.load(name), dtype="f2")


def restore(model: str, truth: Path, work: Path, kept: Path | None = None) -> None:
    """Begin a new pair of folders with what `keep` has put into `kept`, so that only the rest is computed.

    model: the base model that the truth is of. `truth` gets its settings, subsets and losses; the same call
    of `rapidin eval lds` as before adds the rows and the tuned adapter, or says what is not the same. Raises
    UserError if `truth` holds something else.
    """
    kept = kept or RESULTS
    about, masks, losses = kept_truth(kept)
    truth.mkdir(parents=True, exist_ok=True)
    start_or_resume(truth, DESCRIPTION, {"version": VERSION, "model": model_reference(model), **about})
    if not (truth / RETRAINED).exists():
        save_retrained(truth / RETRAINED, masks, losses)
    work.mkdir(parents=True, exist_ok=True)
    for name in (SECOND, REMOVALS):
        if (kept / name).exists() and not (work / name).exists():
            shutil.copyfile(kept / name, work / name)
    source, target = Scores(kept), Scores(work)
    for name in source.names():
        if not target.has(name):
            target.save(name, *source.load(name))


def kept_truth(folder: Path = RESULTS) -> tuple[dict[str, Any], Bools, npt.NDArray[np.float32]]:
    """(what the truth was made with, masks [S, N], losses [S, K, T] with NaN where they are missing)."""
    with np.load(folder / "truth.npz", allow_pickle=False) as file:
        about = about_of(file)
        masks = np.unpackbits(file["masks"], axis=1, count=about["train"]["rows"]).astype(np.bool_)
        return about, masks, file["losses"]


def trainings(path: Path) -> tuple[Bools, Sequence[int], npt.NDArray[np.float32], dict[str, Any]]:
    """(rows that were trained on [n, N], seeds, losses [n, T] with NaN where they are missing, and more) of a
    file that `save_trainings` wrote."""
    with np.load(path, allow_pickle=False) as file:
        about = about_of(file)
        masks = np.unpackbits(file["masks"], axis=1, count=about["rows"]).astype(np.bool_)
        return masks, file["seeds"].tolist(), file["losses"], about


def save_trainings(
    path: Path, masks: Bools, seeds: Sequence[int], measured: npt.NDArray[Any], about: Mapping[str, Any]
) -> None:
    """Keep trainings: masks, the rows that were trained on [n, N]; measured, losses [n, T]; about: more."""
    arrays = {
        "masks": np.packbits(masks, axis=1),
        "seeds": np.array(seeds),
        "losses": measured,
    }
    save_npz(path, {"rows": masks.shape[1], **about}, arrays)
