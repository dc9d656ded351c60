"""`peers.py lds`: prepares the setting, starts the packages, and makes the table of what they wrote."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rapidin.evaluate.ground_truth import GroundTruth
from rapidin.evaluate.lds import correlations, seed_agreement
from rapidin.evaluate.tuned import load_float32

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PACKAGES = ("bergson", "dattri", "traker", "kronfluence", "rapidin")
PLACES = (1.0, 0.5)
BUDGET = 2048  # bytes an example
CONTEXT = 1 << 15  # tokens
DRAWS = 2000  # of the bootstrap
Scores = npt.NDArray[np.float64]


# ------------------------------------------------------------------------------------------ arithmetic


def interval(values: Scores, seed: int = 0) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean of `values`, over draws of as many of them."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.percentile(values[drawn].mean(1), (2.5, 97.5))
    return float(low), float(high)


def judged(truth: GroundTruth, rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The rows with their LDS and its interval instead of the name of the scores' file."""
    out = []
    for row in rows:
        row = dict(row)
        file = row.pop("scores", None)
        if file is not None:
            scores = np.load(folder / file, allow_pickle=False)
            values = correlations(truth.masks, truth.losses, scores)
            low, high = interval(values)
            row |= {"lds": round(float(values.mean()), 4), "interval": [round(low, 4), round(high, 4)]}
        out.append(row)
    return out


# ------------------------------------------------------------------------------------------- the setting


def base_of(truth: Path) -> str:
    """The folder or name of the model that a ground truth was tuned from."""
    return str(json.loads((truth / "lds.json").read_text("utf-8"))["model"])


def prepare_texts(truth: Path, work: Path) -> tuple[Path, dict[float, Path]]:
    """(the texts as token ids and labels, a model or adapter folder for each place), made with rapidin's own
    encoder.

    What an earlier call left in `work` is removed where it was of another model or other texts.
    Where positions are rotary, so that no weight depends on it, the model folders say a long context: Bergson
    makes no batch of more tokens than that, and TRAK's random numbers are drawn anew for every batch.
    """
    import torch

    from rapidin.data.encoding import Encoder
    from rapidin.data.examples import open_examples

    work.mkdir(parents=True, exist_ok=True)
    made = GroundTruth(truth)
    tuned = made.tuned("cpu")
    loaded = tuned.load()
    tokenizer = loaded.tokenizer
    length = made.description["settings"]["max_length"]
    encoder = Encoder(tokenizer, max_length=min(length, loaded.context_length or length))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts: dict[str, Any] = {"pad": pad}
    for part in ("train", "test"):
        texts[part] = []
        for record in open_examples(str(truth / f"{part}.jsonl")):
            encoded = encoder(record)
            labels = [i if counts else -100 for i, counts in zip(encoded.ids, encoded.target, strict=True)]
            texts[part].append({"ids": encoded.ids, "labels": labels})
    file = work / "texts.json"
    file.write_text(json.dumps(texts))
    identity = hashlib.sha256(file.read_bytes() + json.dumps(loaded.identity).encode()).hexdigest()
    if not (work / "identity").exists() or (work / "identity").read_text() != identity:
        for package in PACKAGES:
            for old in work.glob(f"{package}-*"):
                shutil.rmtree(old)
        shutil.rmtree(work / "base", ignore_errors=True)
    (work / "identity").write_text(identity)
    base = "" if tuned.lora is None else hugging_face_base(made.description["model"], work)
    folders = {}
    for at in PLACES:
        folders[at] = work / f"model-{at}"
        shutil.rmtree(folders[at], ignore_errors=True)
        shutil.copytree(tuned.path, folders[at])
        tokenizer.save_pretrained(folders[at])
        with loaded.path.at(at), torch.no_grad():
            loaded.model.save_pretrained(folders[at])
        if base:
            _name_base(folders[at], base)
            continue  # the context is the base model's
        for name, key in (
            ("config.json", "max_position_embeddings"),
            ("tokenizer_config.json", "model_max_length"),
        ):
            said = json.loads((folders[at] / name).read_text())
            if hasattr(loaded.model.config, "rope_parameters") and key in said:
                (folders[at] / name).write_text(json.dumps(said | {key: CONTEXT}, indent=1))
    return file, folders


def hugging_face_base(model: str, work: Path) -> str:
    """The model itself; where that is a folder with a GGUF file alone, which the packages cannot read, the
    same weights as a Hugging Face folder in `work`."""
    if not Path(model).is_dir() or (Path(model) / "config.json").exists():
        return model
    folder = work / "base"
    if not folder.exists():
        loaded = load_float32(model, device="cpu")
        loaded.model.save_pretrained(folder.with_suffix(".partial"))
        loaded.tokenizer.save_pretrained(folder.with_suffix(".partial"))
        folder.with_suffix(".partial").rename(folder)
    return str(folder.resolve())


def _name_base(adapter: Path, base: str) -> None:
    file = adapter / "adapter_config.json"
    said = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(said | {"base_model_name_or_path": base}, indent=1), "utf-8")


def run_package(package: str, python: str, arguments: list[str], work: Path) -> list[dict[str, Any]]:
    """Rows of a package; one row that says why where it did not even start, or stopped before its end."""
    work.mkdir(parents=True, exist_ok=True)
    command = [python, str(HERE / f"run_{package}.py"), *arguments]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT) if package == "rapidin" else ""
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["TORCHDYNAMO_DISABLE"] = "1"  # dattri compiles for minutes what then runs for a second
    began = time.perf_counter()
    with (work / "log").open("wb") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=work)
    print(f"{package} {work.name}: {time.perf_counter() - began:.0f} s, exit {done.returncode}", flush=True)
    file = work / "rows.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    if done.returncode:
        said = (work / "log").read_text(errors="replace").strip().splitlines() or ["nothing"]
        rows.append({"package": package, "method": "all others", "failed": said[-1][:400]})
    return rows


# --------------------------------------------------------------------------------------------- the table


def label(row: dict[str, Any]) -> str:
    settings = ", ".join(f"{k} {v}" for k, v in row.get("settings", {}).items() if k != "seed")
    return f"{row['package']} {row['method']}" + (f" ({settings})" if settings else "")


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for those that differ in their seed alone: the mean LDS, the lowest and the highest seed's,
    and the interval of the first; failed rows as they are."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        settings = {k: v for k, v in row.get("settings", {}).items() if k != "seed"}
        key = json.dumps([row["package"], row["method"], row.get("at"), settings, "failed" in row])
        groups.setdefault(key, []).append(row)
    out = []
    for group in groups.values():
        row = dict(group[0])
        if "failed" not in row and len(group) > 1:
            values = [r["lds"] for r in group]
            row |= {"lds": round(float(np.mean(values)), 4), "seeds": len(group)}
            row["of_seeds"] = [min(values), max(values)]
        out.append(row)
    return out


def table(rows: list[dict[str, Any]], *, budget: float | None = None) -> str:
    """The rows, best first, in Markdown. budget: those that keep at most a tenth more bytes an example."""
    rows = over_seeds(rows)
    if budget is not None:
        rows = [row for row in rows if "failed" not in row and (row["bytes"] or 2 * budget) <= 1.1 * budget]
    lines = ["| what | at | bytes | LDS | 95% | seeds | s |", "|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: -row.get("lds", -2.0)):
        if "failed" in row:
            why = row["failed"].replace("|", "/").replace("\n", " ")
            lines.append(f"| {label(row)} | {row.get('at', '')} | | failed: {why} | | | |")
            continue
        size = "none kept" if row["bytes"] is None else f"{row['bytes']:,.0f}"
        low, high = row["interval"]
        seeds = "{:.3f}-{:.3f}".format(*row["of_seeds"]) if "of_seeds" in row else ""
        lines.append(
            f"| {label(row)} | {row['at']} | {size} | {row['lds']:.3f} | {low:.3f}-{high:.3f} | {seeds} "
            f"| {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def best_each(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each package, method, place and number of bytes, the settings with the highest LDS."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in over_seeds(rows):
        if "failed" not in row:
            key = (row["package"], row["method"], row["at"], row["bytes"])
            best[key] = max(best.get(key, row), row, key=lambda row: float(row["lds"]))
    return list(best.values())


def lds(
    folder: Path,
    truth_folder: Path,
    out: Path,
    *,
    only: list[str],
    seeds: int,
    work: Path,
    prepare: Callable[[Path, Path], tuple[Path, dict[float, Path]]] = prepare_texts,
    start: Callable[[str, str, list[str], Path], list[dict[str, Any]]] = run_package,
) -> None:
    """Run the packages (only: these, the others' rows stay as they are in `out`) and write the JSON.

    prepare, start: make what all packages read, and run one of them.
    """
    truth = GroundTruth(truth_folder)
    agreement = seed_agreement(truth.losses)
    texts, models = prepare(truth_folder, work)
    kept: list[dict[str, Any]] = []
    if out.exists():
        kept = [row for row in json.loads(out.read_text())["rows"] if row["package"] not in only]
    for package in only:
        found: list[dict[str, Any]] = []
        if package == "rapidin":
            places, python = {"all": models[1.0]}, sys.executable
        else:
            places, python = {str(at): models[at] for at in PLACES}, str(folder / "bin/python")
        for at, model in places.items():
            place = work / f"{package}-{at}"
            arguments = [str(texts), str(model), str(place), "--truth", str(truth_folder.resolve())]
            arguments += ["--at", at, "--seeds", str(seeds)]
            found += judged(truth, start(package, python, arguments, place), place)
        kept += found
        about = {
            "truth": truth_folder.name,
            "retrainings": int(truth.finished.sum()),
            "training texts": truth.masks.shape[1],
            "test texts": truth.losses.shape[2],
            "agreement of the seeds": agreement and round(agreement, 4),
        }
        lines = ",\n".join(json.dumps(row) for row in kept)
        out.write_text(json.dumps(about, indent=1)[:-2] + f',\n "rows": [\n{lines}\n]}}\n')
    print(table(best_each(kept)))
    print(f"\nAt most about {BUDGET:,} bytes an example:\n\n{table(best_each(kept), budget=BUDGET)}")
