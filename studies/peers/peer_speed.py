"""`peers.py run`: rapidin's caching and questions beside Bergson's and dattri's, as whole processes.

Each package reads the same texts (one "text" a line) with the same model on the CPU and keeps about 256
numbers for each linear layer of the blocks; rapidin also has 2,048 bytes an example, its codec learnt from
the smaller run's examples. Every way runs on half of the examples and on all, and then with one question and
with several: speed and bytes are those of what the second run has more, and what remains of the first is the
start: imports, loading the model, rapidin's check and preconditioner, learning the codec. Bergson asks one
question after the other and rapidin all in one batch; both name the best rows at both ends. dattri's LoGra
has no command, and its cache on disk wants a GPU: `dattri_logra.py` measures its questions itself, in the
process that cached, so that its start has them in it, too. Peak memory is that of the whole process. With one
thread a time is that of the processor, with more that of a clock.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))
import doc_tables

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "peers-speed.json"
SIDE = 16  # of the double-sided projections: SIDE * SIDE numbers a layer
BATCH_TOKENS = 1024
QUESTIONS = 8
Row = dict[str, Any]
Places = Mapping[str, str]


def make_model(folder: Path, texts: Sequence[str]) -> None:
    """A random Llama of 36 million parameters and a tokenizer for the texts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rapidin.cli.demo_session.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(texts[:200], size=8192)
    tokenizer.model_max_length = BATCH_TOKENS
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=BATCH_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.04,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_texts(count: int) -> list[str]:
    """Sentences of made-up words, 100 to 160 of them."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(2000)]
    return [" ".join(rng.choices(words, k=rng.randint(100, 160))) for _ in range(count)]


def texts_of(data: Path | None, examples: int) -> list[str]:
    """So many texts of a file, and QUESTIONS more to ask; made-up ones without a file."""
    if examples < 2:
        sys.exit(f"peers: --examples must be at least 2, got {examples}")
    wanted = examples + QUESTIONS
    if data is None:
        return make_texts(wanted)
    lines = data.read_text("utf-8").splitlines()[:wanted]
    if len(lines) < wanted:
        sys.exit(f"peers: '{data}' has {len(lines)} lines, not {wanted}")
    return [json.loads(line)["text"] for line in lines]


@dataclass(frozen=True)
class Peer:
    """A package's way to cache and to ask. build, ask: commands, run with the places of model, data and so on
    put in for their names; python: that runs them. typed: `ask` reads the questions from its input, a line
    each, and ends at "exit". times_itself: `build` also writes the seconds of questions to
    OUT/questions.json, and there is no `ask`. once: names of the files that hold nothing of single
    examples."""

    name: str
    python: str
    build: Sequence[str]
    ask: Sequence[str] = ()
    typed: bool = False
    times_itself: bool = False
    once: Sequence[str] = ()


def peers(folder: Path) -> list[Peer]:
    ours, theirs = sys.executable, str(folder / "bin/python")
    rapidin = ["-m", "rapidin"]
    cache = [*rapidin, "cache", "MODEL", "--data", "DATA", "--out", "OUT", "--quiet"]
    cache += ["--batch-tokens", str(BATCH_TOKENS)]
    ask = [*rapidin, "query", "OUT", "--data", "QUESTIONS", "--json", "ANSWERS", "--quiet"]
    build = ["-m", "bergson", "build", "OUT", "--model", "MODEL", "--dataset", "DATA"]
    build += ["--projection_dim", str(SIDE), "--token_batch_size", str(BATCH_TOKENS), "--truncation"]
    query = ["-m", "bergson", "query", "--index", "OUT", "--top_k", "10"]
    once = ("preconditioner.safetensors", "basis.safetensors")
    logra = [str(HERE / "dattri_logra.py"), "MODEL", "DATA", "QUESTIONS", "OUT"]
    return [
        Peer("rapidin, float16", ours, [*cache, "--width", str(SIDE**2)], ask, once=once),
        Peer("rapidin, 2,048 bytes", ours, [*cache, "--bytes", "2048", "--sample", "FEW"], ask, once=once),
        Peer("bergson", theirs, build, query, typed=True),
        Peer("dattri, LoGra", theirs, logra, times_itself=True),
    ]


@dataclass(frozen=True)
class Taken:
    """Seconds and peak memory in MB of a process."""

    seconds: float
    peak_mb: float


Start = Callable[[Peer, Sequence[str], Places, str | None, int], Taken]


def started(peer: Peer, command: Sequence[str], places: Places, typed: str | None, threads: int) -> Taken:
    """Run a process; CalledProcessError with its output where it failed."""
    arguments = [peer.python, *(places.get(word, word) for word in command)]
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    # This checkout is for rapidin alone: its folder `kernels` would hide the package of that name.
    path = {"PYTHONPATH": str(ROOT)} if peer.python == sys.executable else {}
    environment = {**os.environ, **limits, **path}
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as lines:
        lines.write((typed or "").encode())
        lines.seek(0)
        start = time.perf_counter()
        process = subprocess.Popen(
            arguments,
            stdin=lines,
            stdout=log,
            stderr=log,
            cwd=Path(places["OUT"]).parent,
            env=environment,
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise subprocess.CalledProcessError(process.returncode, arguments, log.read())
    if threads == 1:
        seconds = used.ru_utime + used.ru_stime
    return Taken(seconds, used.ru_maxrss * 1024 / 1e6)


def write_texts(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


def measured(
    peer: Peer, model: Path, texts: Sequence[str], work: Path, threads: int, start: Start = started
) -> Row:
    """The row of one way: examples a second, bytes an example, seconds of a further question and of the rest
    of a run with one question, and the peaks of caching and asking. work: a folder of its own."""
    examples = len(texts) - QUESTIONS
    few = examples // 2
    asked = texts[examples:]
    built: dict[int, Taken] = {}
    size: dict[int, int] = {}
    questions: dict[int, Taken] = {}
    own: dict[str, float] = {}
    one, all_of_them = work / "one.jsonl", work / "questions.jsonl"
    write_texts(one, asked[:1])
    write_texts(all_of_them, asked)
    for count in (few, examples):
        out, data = work / f"index-{count}", work / "texts.jsonl"
        write_texts(data, texts[:count])
        places = {"MODEL": str(model.resolve()), "DATA": str(data), "OUT": str(out), "FEW": str(few)}
        places |= {"QUESTIONS": str(all_of_them), "ANSWERS": str(work / "answers.json")}
        built[count] = start(peer, peer.build, places, None, threads)
        if peer.times_itself:
            own = json.loads((out / "questions.json").read_text())
            (out / "questions.json").unlink()
        sizes = {path: path.stat().st_size for path in out.rglob("*") if path.is_file()}
        kept_once = sum(bytes_ for path, bytes_ in sizes.items() if path.name in peer.once)
        size[count] = sum(sizes.values()) - kept_once
        if peer.ask and count == examples:
            for path, chosen in ((one, asked[:1]), (all_of_them, asked)):
                typed = "".join(" ".join(text.split()) + "\n" for text in chosen) + "exit\n"
                given = {**places, "QUESTIONS": str(path)}
                questions[len(chosen)] = start(peer, peer.ask, given, typed if peer.typed else None, threads)
        shutil.rmtree(out)
    more = examples - few
    extra = built[examples].seconds - built[few].seconds
    row: Row = {
        "name": peer.name,
        "examples_per_s": more / extra if extra > 0 else None,
        "bytes": (size[examples] - size[few]) / more,
        "bytes_once": kept_once,
        "build_start_s": built[few].seconds - few * extra / more,
        "build_peak_mb": built[examples].peak_mb,
    }
    if peer.times_itself:
        return row | {"question_s": own["cpu" if threads == 1 else "clock"]}
    question = (questions[QUESTIONS].seconds - questions[1].seconds) / (QUESTIONS - 1)
    row |= {"question_s": question if question > 0 else None}
    rest, peak = questions[1].seconds - question, questions[QUESTIONS].peak_mb
    return row | {"question_start_s": rest, "question_peak_mb": peak}


def failure(error: subprocess.CalledProcessError | OSError) -> str:
    """The last line that a process wrote before it failed."""
    said = (getattr(error, "output", b"") or str(error).encode()).decode(errors="replace").split("\n")
    return next((line for line in reversed(said) if line.strip()), "no output").strip()[:200]


def run(
    folder: Path,
    model: Path | None,
    data: Path | None,
    examples: int,
    threads: int,
    out: Path | None,
    tell: Callable[[str], object] = print,
) -> Row:
    """Measure all ways in turn and say what was found; written to `out` after each."""
    texts = texts_of(data, examples)
    found: Row = {
        "model": model.name if model else "a random Llama of 36 million parameters",
        "examples": examples,
        "threads": threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "torch": version("torch"),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if model is None:
            model = work / "model"
            make_model(model, texts)
        for peer in peers(folder):
            with tempfile.TemporaryDirectory(dir=work) as own:
                try:
                    row = measured(peer, model, texts, Path(own), threads)
                except (subprocess.CalledProcessError, OSError) as error:
                    row = {"name": peer.name, "failed": failure(error)}
            found["rows"].append(row)
            tell(" | ".join(cells(row)))
            if out is not None:
                out.write_text(json.dumps(found, indent=1) + "\n")
    return found


HEADER = (
    "",
    "examples a second",
    "start of caching, s",
    "bytes an example",
    "MB once",
    "a further question, s",
    "start of a question, s",
    "peak of caching, MB",
    "peak of questions, MB",
)


def show(results: Path) -> None:
    """Write the README's table."""
    doc_tables.write(HERE / "README.md", "speed", table(json.loads(results.read_text("utf-8"))))


def table(found: Row) -> str:
    """What was measured, as the README has it."""
    by = "seconds are of the processor" if found["threads"] == 1 else "seconds are of a clock"
    threads = "one thread" if found["threads"] == 1 else f"{found['threads']} threads"
    where = f"{found['date']}, {found['machine']}, {threads}, load average {found['load']:.1f} before; {by}"
    rows = doc_tables.table(HEADER, [cells(row) for row in found["rows"]])
    return f"{found['examples']} examples, {found['model']}, torch {found['torch']} ({where}):\n\n{rows}"


def cells(row: Row) -> list[str]:
    """A row of the table."""
    if "failed" in row:
        return [row["name"], f"failed: {row['failed']}", *[""] * (len(HEADER) - 2)]

    def cell(key: str, form: str) -> str:
        value = row.get(key)
        return "" if value is None else format(value, form)

    return [
        row["name"],
        cell("examples_per_s", ".2f"),
        cell("build_start_s", ".1f"),
        cell("bytes", ",.0f"),
        f"{row['bytes_once'] / 1e6:.1f}",
        cell("question_s", ".2f"),
        cell("question_start_s", ".1f"),
        cell("build_peak_mb", ",.0f"),
        cell("question_peak_mb", ",.0f"),
    ]
