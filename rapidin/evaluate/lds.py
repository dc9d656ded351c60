"""The linear datamodelling score: do scores foretell what retraining on other data does?

The score of a test text's rows, summed over those of a random half of the training data, should rise and fall
with how well a model trained on that half alone does on the text (Ilyas et al., *Datamodels*, 2022; Park et
al., *TRAK*, 2023, section 4): Spearman's correlation of the two over many halves, the mean over the test
texts.

`make` does what costs, once, in a folder that others read:

    lds.json          settings, the base model's name, hashes of model and data
    train.jsonl       N training examples        test.jsonl    T test examples, as they were given
    tuned/            the model tuned on all, a Hugging Face folder; or adapter/, a PEFT folder
    checkpoints/      checkpoint-STEP of that tuning (`rapidin.evaluate.training.Checkpoints`)
    retrained.npz     masks [S, N] bool: the rows of each subset; losses [S, K, T] float32: of every test
                      example after tuning the base on them with each of K seeds, NaN where still to be done

Every retraining is kept as soon as it is done, and the same call goes on with what is left.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rapidin.attribution import baselines
from rapidin.data.encoding import Encoded, Encoder, Status
from rapidin.data.examples import Examples, open_examples
from rapidin.errors import UserError
from rapidin.evaluate import figures, folders, loading
from rapidin.evaluate.methods import Method, Place, Rows, each_score, parts_at
from rapidin.evaluate.result import Result, Say, silent, write_rows
from rapidin.evaluate.training import Checkpoints, Recipe, State, Tuner, losses, save_model
from rapidin.files import lock_folder, replace_file
from rapidin.gradients.model import LoadedModel

DESCRIPTION = "lds.json"
RETRAINED = "retrained.npz"
VERSION = 1
# What tells one ground truth from another, in words.
_NAMES = {
    "version": "version of rapidin",
    "model": "model",
    "identity": "model",
    "train": "training data",
    "test": "test data",
}

Floats = npt.NDArray[np.float64]


# ------------------------------------------------------------------------------------------------ scores


def correlations(masks: npt.ArrayLike, losses: npt.ArrayLike, scores: npt.ArrayLike) -> Floats:
    """LDS of each test text: [T].

    masks: [S, N], which rows each subset holds; losses: [S, T], or [S, K, T] for a mean over K seeds, of the
    models trained on them; scores: [T, N], higher = more helpful, NaN (no sketch) counts as 0. Subsets that
    lack a loss are left out. Raises UserError where fewer than three are left, ValueError for shapes that do
    not fit.
    """
    kept, loss, value = (np.asarray(x, dtype=np.float64) for x in (masks, losses, scores))
    loss = loss.mean(1) if loss.ndim == 3 else loss
    if value.shape != (loss.shape[1], kept.shape[1]) or len(kept) != len(loss):
        raise ValueError(
            f"scores {value.shape}, masks {kept.shape} and losses {loss.shape} do not fit: "
            "[T, N], [S, N], [S, T] are expected"
        )
    done = ~np.isnan(loss).any(1)
    if done.sum() < 3:
        raise UserError(f"{int(done.sum())} subsets are retrained on", "LDS needs at least three")
    foretold = kept[done] @ np.nan_to_num(value, nan=0.0).T
    return figures.spearman(foretold.T, -loss[done].T)


def score(masks: npt.ArrayLike, losses: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[float, float, float]:
    """(LDS, the low and the high end of its 95% bootstrap interval over test texts); see `correlations`."""
    found = figures.interval(correlations(masks, losses, scores))
    return found.mean, found.low, found.high


# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True, slots=True)
class Settings:
    """How a ground truth is made. recipe: its seed is that of the first tuning, the retrainings take those
    after it. lora: rank of an adapter, None for all weights. seeds: retrainings of a subset, whose losses are
    averaged. checkpoints: how many of the first tuning are kept."""

    recipe: Recipe
    lora: int | None = None
    subsets: int = 100
    fraction: float = 0.5
    seeds: int = 1
    checkpoints: int = 4
    max_length: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise UserError(f"--fraction {self.fraction:g} is not between 0 and 1", "0.5 is usual")
        if self.subsets < 3 or self.seeds < 1:
            raise UserError(f"{self.subsets} subsets with {self.seeds} seeds", "at least 3 and 1 are needed")

    def to_json(self) -> dict[str, Any]:
        """What must be the same for a folder to be gone on with; subsets may become more."""
        return {
            "recipe": self.recipe.to_json(),
            "lora": self.lora,
            "fraction": self.fraction,
            "seeds": self.seeds,
            "checkpoints": self.checkpoints,
            "max_length": self.max_length,
        }


def random_subsets(count: int, rows: int, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """[count, rows] masks of round(fraction * rows) rows each; more of them begin with the same ones."""
    size = round(fraction * rows)
    if not 0 < size < rows:
        raise UserError(f"a share of {fraction:g} of {rows} examples is none or all", "give more data")
    rng = np.random.default_rng([seed, 1])
    masks = np.zeros((count, rows), dtype=np.bool_)
    for mask in masks:
        mask[rng.permutation(rows)[:size]] = True
    return masks


class GroundTruth:
    """A folder that `make` has written, finished or not.

    masks: [S, N] bool; losses: [S, K, T] float32; about: what lds.json holds. Raises UserError where it is
    none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.about: dict[str, Any] = json.loads((self.folder / DESCRIPTION).read_text(encoding="utf-8"))
            with np.load(self.folder / RETRAINED, allow_pickle=False) as file:
                self.masks, self.losses = file["masks"].astype(np.bool_), file["losses"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"'{self.folder}' holds no ground truth for LDS ({type(error).__name__})",
                "make it with 'rapidin eval lds MODEL --data ... --test ... --out ...'",
            ) from None

    @property
    def done(self) -> int:
        """Retrainings that are there."""
        return int((~np.isnan(self.losses).any(2)).sum())

    def examples(self, part: str) -> Examples:
        """The examples of `train` or `test`."""
        return open_examples(self.folder / f"{part}.jsonl")

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints of the tuning on all rows, first to last."""
        found = (self.folder / "checkpoints").glob("checkpoint-*")
        return sorted(
            (path for path in found if path.name.split("-")[1].isdigit()),
            key=lambda path: int(path.name.split("-")[1]),
        )

    def load(self, checkpoint: Path | None = None, **options: Any) -> LoadedModel:
        """The tuned model with its base, or a checkpoint of it, in float32. options: `load_model`'s."""
        base = self.about["model"]
        if self.about["settings"]["lora"] is not None:
            return loading.load(base, adapter=str(checkpoint or self.folder / "adapter"), **options)
        return loading.load(str(checkpoint or self.folder / "tuned"), base=base, **options)


# ------------------------------------------------------------------------------------------------ making


def make(
    folder: str | Path,
    model: str,
    train: Any,
    test: Any,
    settings: Settings,
    *,
    device: str | None = None,
    say: Say = silent,
) -> GroundTruth:
    """Tune `model` on all of `train`, and again on random subsets; go on where an earlier call stopped.

    model: a Hugging Face folder or name, or a folder with one GGUF file. train, test: anything
    `open_examples` takes. Raises UserError where folder, data or model will not do, or where the folder was
    begun with others.
    """
    folder = Path(folder)
    examples = [x if isinstance(x, Examples) else open_examples(x) for x in (train, test)]
    masks = random_subsets(settings.subsets, len(examples[0]), settings.fraction, settings.recipe.seed)
    with lock_folder(folder):
        say("loading the model")
        loaded = loading.load(model, device=device)
        encoder = Encoder(loaded.tokenizer, max_length=settings.max_length)
        rows = [encoder(record) for record in examples[0]]
        asked = [encoder(record) for record in examples[1]]
        for n, made in enumerate(asked):
            if made.status != Status.OK:
                raise UserError(f"{examples[1].where(n)}: no completion token to measure a loss of")
        about = {
            "version": VERSION,
            "model": str(Path(model).resolve()) if Path(model).exists() else model,
            "identity": loaded.identity,
            "train": {"rows": len(rows), "identity": examples[0].identity},
            "test": {"rows": len(asked), "identity": examples[1].identity},
            "settings": settings.to_json(),
        }
        folders.begin(folder, DESCRIPTION, about, names=_NAMES)
        for part, given in zip(("train", "test"), examples, strict=True):
            if not (folder / f"{part}.jsonl").exists():
                write_rows(folder / f"{part}.jsonl", list(given))
        tuner = Tuner(loaded, lora=settings.lora)
        _tune_all(folder, tuner, rows, asked, settings, about, say)
        _retrain(folder, tuner, rows, asked, settings, masks, say)
    return GroundTruth(folder)


def _tune_all(
    folder: Path,
    tuner: Tuner,
    rows: Sequence[Encoded],
    asked: Sequence[Encoded],
    settings: Settings,
    about: dict[str, Any],
    say: Say,
) -> None:
    out = folder / ("tuned" if settings.lora is None else "adapter")
    if out.exists():
        return
    good = [row for row in rows if row.status == Status.OK]
    recipe, state = settings.recipe, State(folder / "state", about, every=50)
    kept = None
    if settings.checkpoints:
        steps = recipe.count(len(good))
        kept = Checkpoints.spread(folder / "checkpoints", settings.checkpoints, steps, tuner.loaded.tokenizer)
    before = float(losses(tuner.loaded.model, asked).mean())
    clock = Clock(say, f"tuning on all {len(good):,} examples")
    model = tuner.tuned(good, recipe, checkpoints=kept, state=state, on_step=clock.step)
    after = float(losses(model, asked).mean())
    say(f"tuned on {len(good):,} examples: mean loss of the test examples {before:.3f}, now {after:.3f}")
    save_model(model, out, tuner.loaded.tokenizer)
    state.remove()


def _retrain(
    folder: Path,
    tuner: Tuner,
    rows: Sequence[Encoded],
    asked: Sequence[Encoded],
    settings: Settings,
    masks: npt.NDArray[np.bool_],
    say: Say,
) -> None:
    path = folder / RETRAINED
    found = np.full((len(masks), settings.seeds, len(asked)), np.nan, dtype=np.float32)
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            before = file["losses"]
        if len(before) > len(found):
            masks = random_subsets(len(before), masks.shape[1], settings.fraction, settings.recipe.seed)
            found = before
        found[: len(before)] = before
    _save(path, masks, found)
    left = np.argwhere(np.isnan(found).any(2))
    clock = Clock(say, "retraining", first=found.shape[0] * found.shape[1] - len(left))
    for subset, repeat in left.tolist():
        chosen = [row for row, kept in zip(rows, masks[subset], strict=True) if kept]
        seed = settings.recipe.seed + 1 + subset * settings.seeds + repeat
        model = tuner.tuned(
            [row for row in chosen if row.status == Status.OK], replace(settings.recipe, seed=seed)
        )
        found[subset, repeat] = losses(model, asked).numpy()
        _save(path, masks, found)
        clock.step(clock.done + 1, found.shape[0] * found.shape[1], float(found[subset, repeat].mean()))


def _save(path: Path, masks: npt.NDArray[np.bool_], found: npt.NDArray[np.float32]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, masks=masks, losses=found)
    replace_file(path, buffer.getvalue())


# ------------------------------------------------------------------------------------------------ scoring


def evaluate(
    truth: GroundTruth,
    methods: Sequence[Method],
    places: Sequence[Place],
    *,
    width: Any = "auto",
    with_baselines: bool = False,
    device: str | None = None,
    say: Say = silent,
) -> Result:
    """LDS of every method at every place, from caches that are kept in the ground truth's folder.

    width: bins of a block, "auto" for as many as pay. Raises UserError where too little is retrained, or no
    checkpoints were kept.
    """
    columns = {str(place): str(place) for place in places}
    result = Result("lds", _setting(truth), columns)
    rows = Rows(
        truth.folder / "caches",
        truth.examples("train"),
        truth.about["settings"]["max_length"],
        width,
        say,
    )
    asked = list(truth.examples("test"))

    def load(checkpoint: Path | None = None) -> LoadedModel:
        return truth.load(checkpoint, device=device)

    def figure(scores: Floats) -> figures.Figure:
        return figures.interval(correlations(truth.masks, truth.losses, scores))

    found: dict[str, dict[str, figures.Figure]] = {}
    for place in places:
        parts, texts = parts_at(place, rows, load, truth.folder / "checkpoints", asked)
        for method, scores, _ in each_score(parts, texts, methods):
            found.setdefault(str(method), {})[str(place)] = figure(scores)
            say(f"{method}, {place}: LDS {found[str(method)][str(place)].mean:.3f}")
    if with_baselines:
        ours, theirs = (
            [baselines.plain_text(record) for record in records] for records in (rows.examples, asked)
        )
        for name, scores in baselines.both(load(), ours, theirs).items():
            found[name] = dict.fromkeys(columns, figure(scores))
    for method_name, values in found.items():
        result.add(method_name, values)
    subsets, seeds, tests = truth.losses.shape
    result.notes.append(
        f"{len(rows.examples):,} training and {tests:,} test examples; {truth.done:,} of {subsets * seeds:,} "
        "retrainings. Intervals: over the test examples."
    )
    if (agree := result.setting["seeds_agree"]) is not None:
        result.notes.append(
            f"Two seeds of a retraining agree by {agree:.3f} (Spearman): what the noise of training leaves."
        )
    return result


def _setting(truth: GroundTruth) -> dict[str, Any]:
    """What a result was measured on; seeds_agree: Spearman's correlation between the first two seeds."""
    agree = None
    if truth.losses.shape[1] > 1:
        both = truth.losses[~np.isnan(truth.losses).any((1, 2)), :2].astype(np.float64)
        agree = float(figures.spearman(both[:, 0].T, both[:, 1].T).mean()) if len(both) > 2 else None
    return {
        "folder": str(truth.folder),
        **{key: truth.about[key] for key in ("model", "settings", "train", "test")},
        "retrainings": truth.done,
        "seeds_agree": agree,
    }


class Clock:
    """Says now and then how far something is."""

    def __init__(self, say: Say, what: str, first: int = 0) -> None:
        self.done = self._first = first
        self._say, self._what = say, what
        self._start = self._said = time.monotonic()

    def step(self, done: int, total: int, loss: float) -> None:
        from rapidin.results.text import time_text

        if self.done == self._first and done > self.done + 1:
            self._first = done - 1  # gone on with
        self.done = done
        now = time.monotonic()
        if now - self._said >= 30 or done == total:
            left = (now - self._start) / (done - self._first) * (total - done)
            self._say(f"{self._what}: {done:,} of {total:,}, loss {loss:.3f}, {time_text(left)} left")
            self._said = now
