"""Ground truth for LDS: a model tuned on all examples, and retrained on random subsets of them.

`make` does the expensive part once, in a folder that other tools can read:

    lds.json          settings, name of the base model, hashes of model and data
    train.jsonl       N training examples        test.jsonl    T test examples, as they were given
    tuned/            the model tuned on all, a Hugging Face folder; or adapter/, a PEFT folder
    checkpoints/      checkpoint-STEP of that tuning (`rapidin.evaluate.saving.Checkpoints`)
    retrained.npz     masks [S, N] bool: the rows of each subset; losses [S, K, T] float32: of every test
                      example after tuning the base on the subset with each of K seeds, NaN if not yet done

Every retraining is saved as soon as it is done, and the same call resumes with the rest.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rapidin.data.encoding import Encoded, Encoder, Status
from rapidin.data.examples import Examples, open_examples
from rapidin.errors import UserError
from rapidin.evaluate.folders import model_reference, start_or_resume, write_jsonl
from rapidin.evaluate.log import Log, StepLog, no_log
from rapidin.evaluate.metrics import Bools
from rapidin.evaluate.settings import GroundTruthSettings
from rapidin.evaluate.training import Tuner, losses
from rapidin.evaluate.tuned import TunedModel, load_float32, tune_and_save
from rapidin.files import lock_folder, replace_file

DESCRIPTION = "lds.json"
RETRAINED = "retrained.npz"
VERSION = 1
# What to call a top-level key of the description in an error message.
_LABELS = {
    "version": "version of rapidin",
    "model": "model",
    "identity": "model",
    "train": "training data",
    "test": "test data",
}


class GroundTruth:
    """A folder that `make` has written, complete or not.

    masks: [S, N] bool; losses: [S, K, T] float32; description: the content of lds.json. Raises UserError if
    the folder is not a ground truth.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            text = (self.folder / DESCRIPTION).read_text(encoding="utf-8")
            self.description: dict[str, Any] = json.loads(text)
            with np.load(self.folder / RETRAINED, allow_pickle=False) as file:
                self.masks, self.losses = file["masks"].astype(np.bool_), file["losses"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"'{self.folder}' holds no ground truth for LDS ({type(error).__name__})",
                "make it with 'rapidin eval lds'",
            ) from None

    @property
    def done(self) -> int:
        """Number of finished retrainings."""
        return int((~np.isnan(self.losses).any(2)).sum())

    @property
    def finished(self) -> Bools:
        """Which subsets have all of their retrainings: [S]."""
        finished: Bools = ~np.isnan(self.losses).any((1, 2))
        return finished

    def examples(self, split: str) -> Examples:
        """The examples of `train` or `test`."""
        return open_examples(self.folder / f"{split}.jsonl")

    def tuned(self, device: str | None = None) -> TunedModel:
        """The model tuned on all rows, to be loaded to this device."""
        lora = self.description["settings"]["lora"]
        return TunedModel(self.folder, self.description["model"], lora, device)


def random_subsets(count: int, rows: int, fraction: float, seed: int) -> Bools:
    """[count, rows] masks of round(fraction * rows) rows each; a larger count begins with the same masks."""
    size = round(fraction * rows)
    if not 0 < size < rows:
        raise UserError(f"a share of {fraction:g} of {rows} examples is none or all", "give more data")
    rng = np.random.default_rng([seed, 1])
    masks = np.zeros((count, rows), dtype=np.bool_)
    for mask in masks:
        mask[rng.permutation(rows)[:size]] = True
    return masks


def make(
    folder: str | Path,
    model: str,
    train: Any,
    test: Any,
    settings: GroundTruthSettings,
    *,
    device: str | None = None,
    log: Log = no_log,
) -> GroundTruth:
    """Tune `model` on all of `train`, and again on random subsets of it; resume an earlier call.

    model: a Hugging Face folder or name, or a folder with one GGUF file. train, test: anything
    `open_examples` takes. Raises UserError if data or model cannot be used, or if the folder was made with
    others.
    """
    folder = Path(folder)
    train, test = (x if isinstance(x, Examples) else open_examples(x) for x in (train, test))
    masks = random_subsets(settings.subsets, len(train), settings.fraction, settings.recipe.seed)
    with lock_folder(folder):
        log("loading the model")
        loaded = load_float32(model, device=device)
        encoder = Encoder(loaded.tokenizer, max_length=settings.max_length)
        rows, queries = ([encoder(record) for record in records] for records in (train, test))
        for n, query in enumerate(queries):
            if query.status != Status.OK:
                raise UserError(
                    f"{test.where(n)}: no completion token to measure a loss of", "fix or remove that line"
                )
        description: dict[str, Any] = {
            "version": VERSION,
            "model": model_reference(model),
            "identity": loaded.identity,
            "train": {"rows": len(rows), "identity": train.identity},
            "test": {"rows": len(queries), "identity": test.identity},
            "settings": settings.to_json(),
        }
        start_or_resume(folder, DESCRIPTION, description, labels=_LABELS)
        for split, examples in (("train", train), ("test", test)):
            if not (folder / f"{split}.jsonl").exists():
                write_jsonl(folder / f"{split}.jsonl", list(examples))
        tuner = Tuner(loaded, lora=settings.lora)
        tuned = TunedModel(folder, description["model"], settings.lora, device)
        if not tuned.path.exists():
            _tune_on_all(tuned, tuner, rows, queries, settings, description, log)
        _retrain(folder / RETRAINED, tuner, rows, queries, settings, masks, log)
    return GroundTruth(folder)


def _tune_on_all(
    tuned: TunedModel,
    tuner: Tuner,
    rows: Sequence[Encoded],
    queries: Sequence[Encoded],
    settings: GroundTruthSettings,
    description: dict[str, Any],
    log: Log,
) -> None:
    usable = [row for row in rows if row.status == Status.OK]
    before = float(losses(tuner.loaded.model, queries).mean())
    model = tune_and_save(
        tuned, tuner, usable, settings.recipe, description, checkpoints=settings.checkpoints, log=log
    )
    after = float(losses(model, queries).mean())
    log(f"tuned on {len(usable):,} examples: mean loss of the test examples {before:.3f}, now {after:.3f}")


def _retrain(
    path: Path,
    tuner: Tuner,
    rows: Sequence[Encoded],
    queries: Sequence[Encoded],
    settings: GroundTruthSettings,
    masks: Bools,
    log: Log,
) -> None:
    """Do the retrainings that the file at `path` lacks; subsets that it has beyond `masks` stay."""
    measured = np.full((len(masks), settings.seeds, len(queries)), np.nan, dtype=np.float32)
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            saved = file["losses"]
        if len(saved) > len(measured):
            masks = random_subsets(len(saved), masks.shape[1], settings.fraction, settings.recipe.seed)
            measured = saved
        measured[: len(saved)] = saved
    save_retrained(path, masks, measured)
    missing = np.argwhere(np.isnan(measured).any(2))
    total = measured.shape[0] * measured.shape[1]
    progress = StepLog(log, "retraining", first=total - len(missing))
    for subset, repeat in missing.tolist():
        chosen = [row for row, kept in zip(rows, masks[subset], strict=True) if kept]
        seed = settings.recipe.seed + 1 + subset * settings.seeds + repeat
        model = tuner.tuned(
            [row for row in chosen if row.status == Status.OK], replace(settings.recipe, seed=seed)
        )
        measured[subset, repeat] = losses(model, queries).numpy()
        save_retrained(path, masks, measured)
        progress.step(progress.done + 1, total, float(measured[subset, repeat].mean()))


def save_retrained(path: Path, masks: Bools, measured: npt.NDArray[np.float32]) -> None:
    """Write subsets [S, N] and losses [S, K, T], with NaN where they are missing, atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, masks=masks, losses=measured)
    replace_file(path, buffer.getvalue())
