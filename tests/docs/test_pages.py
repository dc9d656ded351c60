"""README.md and every page of docs/: their commands and Python run as they are written, on tiny models."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from command import Ran, caller
from doc_pages import PAGES, ROOT, Step, inline, outputs, steps
from made_truth import made_truth
from tiny_tasks import tiny_bert, word_tokenizer

import rapidin
import rapidin.cli.app
from rapidin.cli.demo_session.instructions import make_data
from rapidin.cli.demo_session.tokenizer import train_tokenizer
from rapidin.cli.demo_session.training import small_llama
from rapidin.cli.options import app, renamed_flags
from rapidin.data.encoding import Encoder, alpaca_prompt
from rapidin.evaluate.saving import Checkpoints
from rapidin.evaluate.settings import Recipe
from rapidin.evaluate.training import add_lora, tune
from rapidin.results.collection import Results

# Commands that are not run, by how they begin, each with the reason. Those of rapidin are parsed all the
# same; scripts and targets of make must exist.
NOT_RUN = {
    "pip install": "needs a package index",
    "make ": "sets up the folder .venv that tests run in",
    "torchrun": "tests/end_to_end/test_distributed.py starts several processes",
    "rapidin demo": "trains for a minute: a tiny model stands for its own; the tests marked full run it",
    "rapidin serve": "runs until it is interrupted: tests/serve has its tests",
    "rapidin confirm hits.json --trainer": "needs your own script: tests/evaluate/test_confirm.py has one",
    "rapidin merge": "needs thousands of rows in shards: tests/cache/test_merge.py has smaller ones",
    "rapidin eval lds": "trains 200 models: tests/evaluate/test_lds.py runs it with fewer",
    "rapidin eval facts": "trains for minutes: tests/evaluate/test_evaluate.py runs it with fewer rows",
    "rapidin eval select": "trains for minutes: tests/evaluate/test_evaluate.py runs it with fewer rows",
    "python studies/": "a study, which takes hours: tests/studies runs their parts",
    "python examples/": "needs a pretrained model",
}
# Pages whose blocks build on one another; elsewhere each block begins in a new folder.
WHOLE = {"docs/start/auditor.md", "docs/start/curator.md", "docs/start/researcher.md", "docs/guide/report.md"}
# Blocks of Python that follow commands, or commands that follow Python, in one folder.
TOGETHER = {"docs/guide/training.md"}

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## On your own model and data")[1].split("## Documentation")[0]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def reason(step: Step) -> str | None:
    return next((why for start, why in NOT_RUN.items() if step.text.startswith(start)), None)


# ----------------------------------------------------------------------------------- what commands are


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist_with_their_options(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown commands, options and values fail, and so do missing arguments."""
    monkeypatch.chdir(tmp_path)
    for name in ("config_caching.json", "config_retrieval.json"):  # are read while options are
        rapidin_config(tmp_path, tmp_path / name)
    for step in steps(text_of(page)):
        if step.kind == "shell" and step.rapidin is not None:
            parse(step.rapidin, f"{page}:{step.line}")
        elif step.kind == "shell" and step.words[0] == "python":
            assert (ROOT / step.words[1]).is_file(), f"{page}:{step.line}: {step.text}"
        elif step.kind == "shell" and step.words[0] == "make" and len(step.words) > 1:
            targets = re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE)
            assert step.words[1] in targets, f"{page}:{step.line}: {step.text}"


@pytest.mark.parametrize("page", PAGES)
def test_options_within_sentences_exist(page: str) -> None:
    for text in inline(text_of(page)):
        words = text.split()[1:]
        group = typer.main.get_command(app)
        while words and words[0] in getattr(group, "commands", {}):
            group = group.commands[words.pop(0)]
        known = {option for each in group.params for option in (*each.opts, *each.secondary_opts)} | {
            "--help"
        }
        for word in words:
            if word.startswith("--"):
                assert word.split("=")[0] in known, f"{page}: `{text}`: there is no {word}"


def test_unknown_options_are_noticed() -> None:
    for wrong in (["query", "cache", "--nonsense"], ["quarry", "cache"], ["cache", "MODEL"], ["self"]):
        with pytest.raises(pytest.fail.Exception, match="page:1"):
            parse(wrong, "page:1")


def parse(arguments: Sequence[str], where: str) -> None:
    group = typer.main.get_command(app)
    words = renamed_flags(arguments)
    context = group.make_context("rapidin", ["--help"], resilient_parsing=True)
    try:
        while hasattr(group, "commands"):
            if not words or words[0] not in group.commands:
                pytest.fail(f"{where}: no command: rapidin {' '.join(arguments)}")
            group = group.commands[words.pop(0)]
        if words != ["--help"]:
            group.make_context(group.name, words, parent=context)
    except Exception as error:  # click's own, or the one that typer brings
        pytest.fail(f"{where}: rapidin {' '.join(arguments)}: {error}")


def test_every_reason_is_needed() -> None:
    written = [step for page in PAGES for step in steps(text_of(page)) if step.kind == "shell"]
    for start, why in NOT_RUN.items():
        for path in re.findall(r"tests/[\w/.]+", why):
            assert (ROOT / path).exists(), path
        assert any(step.text.startswith(start) for step in written), f"no page has '{start}'"


# --------------------------------------------------------------------------- what pages take as given


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's files with a smaller model that is hardly trained, and with 48 of its rows."""
    folder, data = tmp_path_factory.mktemp("tiny"), make_data()
    texts = (f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in data.base)
    tokenizer = train_tokenizer(texts, fixed=alpaca_prompt("\0", "\0").split("\0"))
    model = small_llama(tokenizer, hidden=32, layers=1)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model.name_or_path = str(folder / "model")
    rows = [
        {**row, "label": n % 3, "flipped": n % 5 == 0, "source": ("forum", "book")[n % 2]}
        for n, row in enumerate(sorted(data.tuning, key=lambda row: not row["poisoned"])[20:68])
    ]
    encoder = Encoder(tokenizer, max_length=tokenizer.model_max_length)
    tuned = add_lora(model, rank=4)
    recipe = Recipe(epochs=4, learning_rate=2e-2)
    kept = Checkpoints.spread(folder / "adapter", 2, recipe.count(len(rows)))
    tune(tuned, [encoder(row) for row in rows], recipe, checkpoints=kept)
    tuned.save_pretrained(folder / "adapter")
    lines(folder / "train.jsonl", rows)
    lines(folder / "query.jsonl", data.queries[:1])
    with inside(folder):
        cache = ["cache", "model", "--adapter", "adapter", "--data", "train.jsonl", "--out", "cache"]
        assert rapidin.cli.main(cache) == 0
        assert rapidin.cli.main(["query", "cache", "--data", "query.jsonl", "--json", "hits.json"]) == 0
    return folder


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(tiny: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tiny / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def link(name: str) -> Callable[[Path, Path], None]:
    return lambda tiny, to: to.symlink_to(tiny / name)


def copy(name: str) -> Callable[[Path, Path], None]:
    return lambda tiny, to: (shutil.copytree if (tiny / name).is_dir() else shutil.copy)(tiny / name, to)


def asked(tiny: Path, to: Path) -> None:
    lines(to, [{k: row[k] for k in ("instruction", "input", "output")} for row in make_data().held_out[:4]])


def hotwords(tiny: Path, to: Path) -> None:
    lines(to, [{"instruction": "Which planets are there?", "output": "The planet Zorgon."}])


def tests(tiny: Path, to: Path) -> None:
    lines(to, [{**row, "label": n % 3} for n, row in enumerate(make_data().held_out[:4])])


def pairs(tiny: Path, to: Path) -> None:
    made = [
        {"prompt": row["instruction"], "chosen": f" {row['output']}", "rejected": " No."}
        for row in rows_of(tiny)
    ]
    lines(to, made)


def classifier(tiny: Path, to: Path) -> None:
    tiny_bert(num_labels=3).save_pretrained(to)
    word_tokenizer().save_pretrained(to)


def classes(tiny: Path, to: Path) -> None:
    lines(to, [{"text": row["instruction"], "label": row["label"]} for row in rows_of(tiny)])


def cached(rows: int | None = None, **settings: Any) -> Callable[[Path, Path], None]:
    def make(tiny: Path, to: Path) -> None:
        loaded = rapidin.load_model(str(tiny / "model"), adapter=str(tiny / "adapter"))
        fields = {"bytes": settings.pop("bytes")} if "bytes" in settings else {}
        attributor = rapidin.Attributor(loaded, **{"width": 64} | settings)
        data: Any = tiny / "train.jsonl" if rows is None else rows_of(tiny)[:rows]
        attributor.cache(data, to, progress=False, **fields)

    return make


def cached_start(tiny: Path, to: Path) -> None:
    """A cache of the first rows of train.jsonl, by the model without its adapter."""
    lines(to.parent / "first.jsonl", rows_of(tiny)[:40])
    rapidin.Attributor(str(tiny / "model")).cache(to.parent / "first.jsonl", to, progress=False)


# How the files and folders are made that commands name.
def held_out(tiny: Path, to: Path) -> None:
    """Rows like those of the training data that are not among them."""
    lines(to, [row | {"instruction": f"Please answer: {row['instruction']}"} for row in rows_of(tiny)])


def rapidin_config(tiny: Path, to: Path) -> None:
    """RapidIn's configuration of both stages."""
    config = {
        "data": {"train_data_path": str(tiny / "train.jsonl"), "test_data_path": str(tiny / "query.jsonl")},
        "influence": {"grads_path": "grads", "RapidGrad": {"enable": True, "RapidGrad_K": 512}},
        "model": {"model_path": str(tiny / "model"), "lora_path": str(tiny / "adapter")},
    }
    to.write_text(json.dumps(config))


GIVEN: dict[str, Callable[[Path, Path], None]] = {
    **dict.fromkeys(("config_caching.json", "config_retrieval.json"), rapidin_config),
    **dict.fromkeys(("model", "MODEL"), link("model")),
    **dict.fromkeys(("adapter", "ADAPTER", "dpo-adapter"), link("adapter")),
    **dict.fromkeys(("cache", "CACHE", "fine"), copy("cache")),
    **dict.fromkeys(("asked.jsonl", "queries.jsonl", "target.jsonl"), asked),
    "train.jsonl": copy("train.jsonl"),
    "held_out.jsonl": held_out,
    "more.jsonl": lambda tiny, to: lines(to, rows_of(tiny)[:3]),
    "query.jsonl": copy("query.jsonl"),
    "test.jsonl": tests,
    "pairs.jsonl": pairs,
    "hits.json": copy("hits.json"),
    "seed-0": cached(seed=0),
    "seed-1": cached(seed=1),
    "coarse": cached(bytes=256),
    "CLASSIFIER": classifier,
    "trainer_output": link("adapter"),
    "truth": lambda tiny, to: made_truth(to) and None,
}
# Where a command of a page means another file by the same name: (page, start of the command, name).
OTHERWISE = {
    ("docs/guide/tasks.md", "rapidin cache CLASSIFIER", "train.jsonl"): classes,
    ("docs/guide/tokens.md", "rapidin query cache --data asked.jsonl --hotwords", "asked.jsonl"): hotwords,
    ("docs/reference/cache.md", "rapidin cache", "cache"): cached_start,
}
_WRITTEN = ("--out", "--json", "--report", "--dropped")  # options whose file a command makes


def provide(page: str, step: Step, tiny: Path) -> None:
    """Makes what a step names and does not make itself, if it is not there."""
    if step.kind == "python":
        names = [name for name in re.findall(r'"([\w.-]+)"', step.text) if name != "cache" or page in WHOLE]
    else:
        words = step.rapidin or []
        written = {after for word, after in pairwise(words) if word in _WRITTEN}
        if "--append" in words:
            written.discard("cache")
        names = [word for word in words if word not in written]
        if "--append" in words:
            names.append("cache")
    for name in names:
        made = next(
            (
                make
                for (p, start, n), make in OTHERWISE.items()
                if (p, n) == (page, name) and step.text.startswith(start)
            ),
            GIVEN.get(name),
        )
        if made is not None and not os.path.lexists(name):
            made(tiny, Path(name).absolute())


def images(space: dict[str, Any]) -> None:
    torch.manual_seed(0)
    space["model"] = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    space["records"] = [{"image": torch.randn(1, 4, 4), "label": n % 3} for n in range(8)]


def loaded(space: dict[str, Any], tiny: Path) -> None:
    """Names of a program before the part that a page shows."""
    model = rapidin.load_model(str(tiny / "model"), adapter=str(tiny / "adapter"))
    space.update(model=model.model, tokenizer=model.tokenizer, records=rows_of(tiny))
    space.update(prompt=alpaca_prompt("Add 1 and 2.", ""), completion="The sum of 1 and 2 is 3.")
    space["trainer"] = SimpleNamespace(
        model=model.model, processing_class=model.tokenizer, train_dataset=rows_of(tiny)
    )
    space["cache"] = rapidin.Cache(tiny / "cache")
    space["attributor"] = rapidin.Attributor.like(space["cache"], model.model, model.tokenizer)


def trained(space: dict[str, Any], tiny: Path) -> None:
    """A trainer that leaves the weights as they are, so that the model's folder still has them."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    given = rapidin.load_model(str(tiny / "model"))
    encoder = Encoder(given.tokenizer, max_length=128)
    rows = []
    for text in map(encoder, rows_of(tiny)):
        labels = [i if counts else -100 for i, counts in zip(text.ids, text.target, strict=True)]
        rows.append({"input_ids": text.ids, "attention_mask": [1] * len(text.ids), "labels": labels})
    arguments = TrainingArguments("out", report_to=[], use_cpu=True, learning_rate=0.0, disable_tqdm=True)
    collator = DataCollatorForSeq2Seq(given.tokenizer)
    model = given.model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    space["trainer"] = Trainer(
        model, arguments, train_dataset=rows, data_collator=collator, processing_class=given.tokenizer
    )


def space_of(page: str, tiny: Path) -> dict[str, Any]:
    space: dict[str, Any] = {"rapidin": rapidin}
    if page == "docs/guide/tasks.md":
        images(space)
    elif page == "docs/guide/training.md":
        trained(space, tiny)
    elif page in ("docs/guide/tokens.md", "docs/guide/python.md"):
        loaded(space, tiny)
    elif page == "docs/guide/evaluation.md":
        space["scores"] = torch.zeros(5, 12).normal_(generator=torch.Generator().manual_seed(0)).numpy()
    return space


# ------------------------------------------------------------------------------------- pages are run


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_page(page: str, folder: Path, tiny: Path, run: Callable[..., Ran], demo: Path | None = None) -> str:
    """Runs the steps of a page, and returns what its commands printed. demo: what `rapidin demo` makes,
    instead of a tiny model."""
    printed: list[str] = []
    space = space_of(page, tiny) if any(step.kind == "python" for step in steps(text_of(page))) else {}
    begun: int | None = None
    for step in steps(text_of(page)):
        if begun is None or (page not in WHOLE | TOGETHER and step.block != begun):
            os.chdir(folder)
            Path(f"block-{step.block}").mkdir()
            os.chdir(f"block-{step.block}")
            begun = step.block
        where = f"{page}:{step.line}: {step.text}"
        if step.kind == "file":
            Path(step.name).write_text(step.text, encoding="utf-8")
        elif step.kind == "python":
            provide(page, step, tiny)
            exec(compile(step.text, f"{page}:{step.line}", "exec"), space)
        elif step.words[0] == "cd":
            os.chdir(step.words[1])
        elif step.words[0] == "cp":
            subprocess.run(step.words, check=True)
        elif step.words[:2] == ["rapidin", "demo"] and demo is not None:
            shutil.copytree(demo, step.words[step.words.index("--out") + 1])
        elif reason(step) is not None:
            if "demo" in step.words and "--out" in step.words:
                shutil.copytree(tiny, step.words[step.words.index("--out") + 1], symlinks=True)
        else:
            assert step.words[0] == "rapidin", f"{where}: NOT_RUN says nothing of it"
            provide(page, step, tiny)
            ran = run(*step.words[1:])
            assert ran.code == 0, f"{where}\n{ran.err}"
            printed += [ran.out, ran.err]
    return "\n".join(printed)


def is_run(page: str) -> bool:
    return any(step.kind == "python" or reason(step) is None for step in steps(text_of(page)))


@pytest.mark.parametrize("page", [page for page in PAGES if is_run(page) and page not in WHOLE])
@pytest.mark.full
def test_a_page_runs(page: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with inside(tmp_path):
        run_page(page, tmp_path, tiny, caller(capsys))


# Of the others one asks as the auditor does, and one runs evaluations, which have tests of their own.
QUICK = {"docs/start/auditor.md", "docs/start/curator.md"}


@pytest.mark.parametrize(
    "page", [page if page in QUICK else pytest.param(page, marks=pytest.mark.full) for page in sorted(WHOLE)]
)
def test_a_start_runs_on_a_tiny_model(
    page: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with inside(tmp_path):
        run_page(page, tmp_path, tiny, caller(capsys))


@pytest.mark.parametrize("page", sorted(WHOLE))
@pytest.mark.full
def test_a_start_runs_on_the_demo(
    page: str,
    tiny: Path,
    demo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the page shows is printed, but for numbers and rows, which vary from machine to machine."""
    monkeypatch.setenv("COLUMNS", "100")
    with inside(tmp_path):
        printed = run_page(page, tmp_path, tiny, caller(capsys), demo)
    words = {line.split()[0] for line in printed.splitlines() if line.split()}
    shown = [line.split() for block in outputs(text_of(page)) for line in block]
    labels = {line[0] for line in shown if line and re.fullmatch(r"[A-Za-z][\w:]*", line[0])}
    assert labels <= words


# ---------------------------------------------------------------- the README's Python and command line


def snippet() -> str:
    return SECTION.split("```python")[1].split("```")[0]


def command_line(start: str) -> list[str]:
    """The first command of the section that begins so, with its own values."""
    found = next(step for step in steps(SECTION) if step.kind == "shell" and step.text.startswith(start))
    names = {"MODEL": "model", "ADAPTER": "adapter"}
    return [names.get(word, word) for word in found.words][1:]


def compare(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs both in folders of their own, on a folder with model, adapter and train.jsonl."""
    ran: dict[str, Any] = {}
    for name in ("python", "command"):
        (tmp_path / name).mkdir()
        for part in ("model", "adapter", "train.jsonl"):
            os.symlink(demo / part, tmp_path / name / part)
    with inside(tmp_path / "python"):
        exec(snippet(), ran)
    results = ran["results"]
    assert isinstance(results, Results)
    run = caller(capsys)
    with inside(tmp_path / "command"):
        assert run(*command_line("rapidin cache")).code == 0
        asked = run(*command_line("rapidin query cache --ask"), "--top-k", "20", "--json", "-")
    (query,) = json.loads(asked.out)["queries"]
    (result,) = results
    assert (query["prompt"], query["completion"]) == (result.prompt, result.completion)
    assert query["generated"]
    assert result.generated
    for side, hits in (("top", results.helpful), ("bottom", results.harmful)):
        assert [hit["index"] for hit in query[side]] == [hit.index for hit in hits]
        assert [hit["score"] for hit in query[side]] == pytest.approx([hit.score for hit in hits], abs=1e-5)
        assert [hit["example"] for hit in query[side]] == [hit.example for hit in hits]
    assert len(result.top) == 20
    assert query["top"]
    assert ran["cache"].manifest.model["source"]["adapter"]


def test_the_snippet_and_the_command_line_find_the_same_hits(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(tiny, tmp_path, capsys)


@pytest.mark.full
def test_they_do_on_the_demo_itself(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(demo, tmp_path, capsys)
