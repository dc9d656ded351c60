"""The command line: parse, call, exit code.

Results go to standard output and everything else to standard error. Exit codes: 0; 1 for an error in rapidin,
with its traceback; 2 for a mistake of the user, with one line that says what and how to mend it; 130 and 143
when stopped by Ctrl-C or SIGTERM; 141 when whoever reads the output has gone.
"""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from enum import Enum
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

import rapidin
from rapidin.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from rapidin.model import LoadedModel


Command = Callable[[], int | None]  # None is success


class Dtype(str, Enum):
    float16 = "float16"
    float32 = "float32"
    int8 = "int8"
    int4 = "int4"
    sign = "sign"


class ModelDtype(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    auto = "auto"


class Loss(str, Enum):
    mean = "mean"
    sum = "sum"


class TooLong(str, Enum):
    truncate = "truncate"
    skip = "skip"


class Normalize(str, Enum):
    layer = "layer"
    none = "none"
    cosine = "cosine"


class Method(str, Enum):
    dot = "dot"


class Terminated(KeyboardInterrupt):
    """SIGTERM: leave as for Ctrl-C, with its own exit code."""


# --------------------------------------------------------------------------------------------- commands


def cache_command(
    model: str,
    *,
    data: str,
    out: str,
    adapter: str | None = None,
    base: str | None = None,
    at: str | None = None,
    dtype: Dtype | None = None,
    bytes: int | None = None,
    sample: int | None = None,
    width: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    loss: Loss = Loss.mean,
    eos: bool = True,
    max_length: int | None = None,
    too_long: TooLong = TooLong.truncate,
    batch_tokens: int = 1024,
    shard_rows: int | None = None,
    device: str | None = None,
    model_dtype: ModelDtype | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> None:
    """Sketch the gradient of every training example into the folder `out`, or go on where a run stopped."""
    from rapidin import report
    from rapidin.examples import open_examples

    points = _points(at)
    console = _messages(quiet)
    with console.status("reading the data"):
        examples = open_examples(data, limit=limit)  # before the model: mistakes in the data show at once
    if console.is_terminal:
        console.print(f"{len(examples):,} examples in {report.one_line(data)}")
    with _quiet_libraries():
        from rapidin.attributor import Attributor

        loaded = _load(console, model, adapter, base, device, model_dtype, trust_remote_code)
        attributor = Attributor(
            loaded,
            width=width if width is not None else 512 if bytes is None else "auto",
            budget=bytes,
            seed=seed,
            include=include,
            exclude=exclude,
            at=points,
            loss=loss.value,
            eos=eos,
            max_length=max_length,
            too_long=too_long.value,
            batch_tokens=batch_tokens,
        )
        if console.is_terminal:
            dim = sum(layer.width for layer in attributor.layers)
            console.print(
                f"{len(attributor.layers):,} blocks of {attributor.width:,}: {dim:,} numbers an example; "
                f"{attributor.coverage:.2%} of the model's parameters count; gradients at "
                f"{', '.join(f'{point:g}' for point in attributor.points)} on {loaded.device}"
            )
        if examples.form == "messages":  # a template may refuse a chat: better now than after hours
            with console.status("trying the chat template on all examples"):
                attributor.encoder.check(examples)
        with report.CachingBar(console) as bar:
            try:
                cache = attributor.cache(
                    examples,
                    out,
                    dtype=dtype.value if dtype else None,
                    bytes=bytes,
                    sample=sample,
                    shard_rows=shard_rows,
                    on_progress=bar,
                )
            except KeyboardInterrupt as stop:
                raise type(stop)(_how_to_go_on(out, len(examples))) from None
    if quiet or bar.last is None:
        return
    info = cache.info()
    here = bar.last.done - bar.last.resumed
    if here:
        did = f"cached {here:,} examples in {report.time_text(bar.seconds)}"
        did += f" ({here / bar.seconds:,.1f} examples/s, {bar.last.tokens / bar.seconds:,.0f} tokens/s)"
        if bar.last.resumed:
            did += f" after the {bar.last.resumed:,} that were there"
    else:
        did = f"all {len(examples):,} examples were there already"
    _line(f"{did}: {report.counts_text(info['counts'])}; {report.bytes_text(info['bytes'])} in {out}")


def _load(
    console: "Console",
    model: str,
    adapter: str | None,
    base: str | None,
    device: str | None,
    model_dtype: ModelDtype | None,
    trust_remote_code: bool,
) -> "LoadedModel":
    from rapidin.model import load_model

    with _loading(console, model):
        return load_model(
            model,
            adapter=adapter,
            base=base,
            device=device,
            dtype=model_dtype.value if model_dtype else None,
            trust_remote_code=trust_remote_code,
        )


def _how_to_go_on(out: str, wanted: int) -> str:
    from rapidin.cache import Manifest

    try:
        done = Manifest.read(Path(out)).rows_done
    except UserError:
        done = 0
    return f"stopped with {done:,} of {wanted:,} examples in {out}; the same command goes on from there"


_PLAIN = ("prompt", "completion")


def query_command(
    cache: str,
    *,
    ask: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    data: str | None = None,
    top_k: int = 10,
    normalize: Normalize = Normalize.layer,
    method: Method = Method.dot,
    json: str | None = None,
    max_new_tokens: int = 64,
    model: str | None = None,
    adapter: str | None = None,
    base: str | None = None,
    train_data: str | None = None,
    text: bool = True,
    device: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> None:
    """Find the training examples that helped and harmed each generation most, and print them."""
    from rapidin import report

    _check_query(ask, prompt, completion, data)
    if json is not None and json != "-":
        _check_writable(json)
    console = _messages(quiet)
    with _quiet_libraries():
        from rapidin.attributor import Attributor
        from rapidin.cache import Cache
        from rapidin.scan import training_data

        opened = Cache(cache)
        generations = _generations(ask, prompt, completion, data, str(opened.manifest.data.get("form")))
        # Before the model: a file that has moved shows at once.
        examples = training_data(opened, train_data if text else False)
        with _loading(console, model or opened.manifest.model["source"].get("model") or ""):
            attributor = Attributor.from_cache(
                cache,
                model=model,
                adapter=adapter,
                base=base,
                device=device,
                trust_remote_code=trust_remote_code,
            )
        with console.status(f"explaining {len(generations):,} among {len(opened):,} examples"):
            results = attributor.query(
                opened,
                generations,
                top_k=top_k,
                normalize=normalize.value,
                method=method.value,
                max_new_tokens=max_new_tokens,
                examples=False if examples is None else examples,
            )
    if json == "-":
        print(report.results_json(results))
    else:
        if json is not None:
            try:
                Path(json).write_text(report.results_json(results) + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(f"cannot write {json}: {error.strerror}") from error
        out = report.console(sys.stdout)
        out.print(report.hits_report(results, width=out.width))
    if not quiet:
        seconds = results[0].seconds
        stages = ", ".join(f"{stage} {report.time_text(value)}" for stage, value in seconds.items())
        count = f"{len(results):,} {'query' if len(results) == 1 else 'queries'}"
        line = f"{count} over {len(opened):,} examples: {stages}"
        if not opened.manifest.complete:
            line += f"; the cache is unfinished, {opened.manifest.rows:,} examples were wanted"
        _line(line)


def _check_query(ask: str | None, prompt: str | None, completion: str | None, data: str | None) -> None:
    given = [f"--{n}" for n, v in (("ask", ask), ("prompt", prompt), ("data", data)) if v is not None]
    if len(given) != 1:
        what = f"both {' and '.join(given)}" if given else "nothing to explain"
        raise UserError(what, "give --ask or --prompt (and --completion), or --data with a file of them")
    if data is not None and completion is not None:
        raise UserError(
            "--completion goes with --ask or --prompt", "in --data, a completion is part of its line"
        )
    if completion == "":
        raise UserError("the completion is empty", "leave --completion out and the model writes one")


def _generations(
    ask: str | None, prompt: str | None, completion: str | None, data: str | None, form: str
) -> list[dict[str, Any]]:
    """What is to be explained, as records whose completion may be missing; form: of the training data."""
    from rapidin.examples import open_examples

    if data is not None:
        return list(open_examples(data, generations=True))
    record: dict[str, Any]
    if ask is not None and form == "messages":
        record = {"messages": [{"role": "user", "content": ask}]}
        if completion is not None:
            record["messages"].append({"role": "assistant", "content": completion})
    else:
        asked, answer = ("instruction", "output") if ask is not None and form == "instruction" else _PLAIN
        record = {asked: prompt if ask is None else ask}
        if completion is not None:
            record[answer] = completion
    return list(open_examples([record], generations=True))


def _check_writable(path: str) -> None:
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.path.isdir(folder):
        what = "is a folder" if os.path.isdir(path) else "lies in no folder that exists"
        raise UserError(f"cannot write {path}: it {what}", "name a file, or - for standard output")


def info_command(cache: str) -> None:
    """Print what a cache holds and how it was made."""
    from rapidin import report
    from rapidin.cache import Cache

    report.console(sys.stdout).print(report.info_report(Cache(cache).info()))


def plan_command(
    model: str,
    *,
    examples: int | None = None,
    data: str | None = None,
    tokens: int | None = None,
    adapter: str | None = None,
    base: str | None = None,
    at: str | None = None,
    width: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_length: int | None = None,
    batch_tokens: int = 1024,
    device: str | None = None,
    model_dtype: ModelDtype | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> None:
    """Print what a cache would take with each code: bytes, time and memory."""
    from rapidin import report
    from rapidin.examples import open_examples

    if examples is None and data is None:
        raise UserError("nothing to plan for", "say how many --examples, or name the --data")
    points, console = _points(at), _messages(quiet)
    opened = open_examples(data) if data is not None else None
    with _quiet_libraries():
        from rapidin.attributor import Attributor
        from rapidin.plan import make_plan

        loaded = _load(console, model, adapter, base, device, model_dtype, trust_remote_code)
        attributor = Attributor(
            loaded,
            width=width if width is not None else "auto",
            include=include,
            exclude=exclude,
            at=points,
            max_length=max_length,
            batch_tokens=batch_tokens,
        )
        with console.status("measuring a batch"):
            count = examples if examples is not None else len(opened or ())
            plan = make_plan(attributor, count, opened, tokens)
    report.console(sys.stdout).print(report.plan_report(plan))


def verify_command(cache: str, *, quiet: bool = False) -> None:
    """Read every byte of a cache and compare checksums; UserError where something is not as written."""
    from rapidin import report
    from rapidin.cache import Cache, Manifest

    manifest = Manifest.read(Path(cache))
    with report.BytesBar(_messages(quiet), "reading") as bar:
        problems = Cache.verify(cache, on_progress=bar)
    if problems:
        for problem in problems[1:]:
            print(report.one_line(problem))
        others = f" (and {len(problems) - 1} more, on standard output)" if problems[1:] else ""
        raise UserError(
            problems[0] + others, "delete the file, and the same 'rapidin cache' command makes it again"
        )
    size = report.size_text(sum(shard.bytes for shard in manifest.shards), None, len(manifest.shards))
    rows = f"{manifest.rows_done:,}" + ("" if manifest.complete else f" of {manifest.rows:,}")
    print(f"{report.one_line(cache)}: every byte is as it was written ({rows} examples, {size})")


def demo_command(*, out: str | None = None, seed: int = 0) -> int:
    """Plant a poison, train on it, and find it; 0 where it was found."""
    with _quiet_libraries():
        from rapidin.demo import run

        return run(Path(out) if out is not None else None, seed=seed)


def _points(at: str | None) -> list[float] | None:
    if at is None:
        return None
    try:
        return [float(part) for part in at.split(",")]
    except ValueError:
        raise UserError(f"--at {at} is not a number or numbers between commas", "as in --at 0.5") from None


# ------------------------------------------------------------------------------------------------- help

app = typer.Typer(
    name="rapidin",
    help="Find the training examples behind what a language model says.\n\n"
    "First 'rapidin cache' sketches the gradient of every training example, then 'rapidin query' finds those "
    "behind a generation. A positive score means that training on the example made the generation more "
    "likely (helpful), a negative score that it made it less likely (harmful).",
    add_completion=False,
    rich_markup_mode=None,  # plain help: narrow terminals have room for it, and brackets stay brackets
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="Such as cpu or cuda:1.  [default: a GPU where there is one]",
        show_default=False,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with the model. Only if you trust it."),
]
CacheFolder = Annotated[str, typer.Argument(metavar="CACHE", help="Folder made by 'rapidin cache'.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rapidin {rapidin.__version__}")
        raise typer.Exit


@app.callback()
def _main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("cache")
def _cache(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Hugging Face model: a folder, a name, or a folder with one GGUF file."
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Training examples: jsonl with prompt and completion, instruction, input and output, "
            "messages, or text; or a HF dataset on disk.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str, typer.Option(metavar="CACHE", help="Folder to write; an unfinished cache there is gone on with.")
    ],
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="ADAPTER", help="PEFT adapter on MODEL: then what it trains counts.", show_default=False
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What MODEL was tuned from, if in full.", show_default=False),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="A[,A...]",
            help="Where gradients are taken, from 0 (base) to 1 (tuned model); several points add up.  "
            "[default: 0.5 where the base is known, else 1]",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Of the numbers kept; sign is one bit each.  [default: float16, or with --bytes sign]",
            show_default=False,
        ),
    ] = None,
    bytes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Bytes an example, all told, that a code is fitted to: 2048 is a good start.  "
            "[default: every number of the sketch]",
            show_default=False,
        ),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Examples that the code learns from first; 0: nothing is learnt.  [default: 1024 "
            "with --bytes]",
            show_default=False,
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Bins of each layer's sketch: more is truer and slower.  [default: 512, or with --bytes as "
            "many as pay]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**64 - 1, help="Of the sketch.")] = 0,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Only the first so many examples.", show_default=False),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Only parameters whose name fits; may be repeated.", show_default=False
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="No parameters whose name fits; may be repeated.", show_default=False
        ),
    ] = None,
    loss: Annotated[Loss, typer.Option(help="Over the tokens of a completion.")] = Loss.mean,
    no_eos: Annotated[
        bool, typer.Option("--no-eos", help="Do not end completions with the end-of-text token.")
    ] = False,
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Tokens of an example.  [default: the model's context]",
            show_default=False,
        ),
    ] = None,
    too_long: Annotated[TooLong, typer.Option(help="What to do with longer examples.")] = TooLong.truncate,
    batch_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of a batch: more needs more memory.")
    ] = 1024,
    shard_rows: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Examples of a shard file.  [default: as fill 16 MiB]",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    model_dtype: Annotated[
        ModelDtype | None,
        typer.Option(
            help="Of the weights.  [default: float32 on a CPU, else as they are]", show_default=False
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> Command:
    """Sketch the gradient of every training example into a cache.

    Stopped at any moment, the same command goes on where it was.
    """
    return partial(
        cache_command,
        model,
        data=data,
        out=out,
        adapter=adapter,
        base=base,
        at=at,
        dtype=dtype,
        bytes=bytes,
        sample=sample,
        width=width,
        seed=seed,
        limit=limit,
        include=include or (),
        exclude=exclude or (),
        loss=loss,
        eos=not no_eos,
        max_length=max_length,
        too_long=too_long,
        batch_tokens=batch_tokens,
        shard_rows=shard_rows,
        device=device,
        model_dtype=model_dtype,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )


@app.command("query")
def _query(
    cache: CacheFolder,
    ask: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="A question or instruction, put in the form of the training data: the Alpaca form, the "
            "chat template, or as it stands.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="All that the model read, to the letter: nothing is put around it.",
            show_default=False,
        ),
    ] = None,
    completion: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="What it answered.  [default: the model writes it now]", show_default=False
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Several to explain, in the forms of 'rapidin cache'; where a completion is missing, the "
            "model writes it.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[
        int, typer.Option(metavar="N", min=1, help="Examples to show at each end of the ranking.")
    ] = 10,
    normalize: Annotated[
        Normalize,
        typer.Option(
            help="The scale of the scores. layer: mean over layers of the cosine of the gradients, -1 to 1; "
            "cosine: cosine of the whole gradients, -1 to 1; none: their dot product."
        ),
    ] = Normalize.layer,
    method: Annotated[Method, typer.Option(help="How influence is estimated.")] = Method.dot,
    json: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write the hits as JSON; with - to standard output, and no table.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Of a completion that the model writes.")
    ] = 64,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Where the model has moved.", show_default=False)
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="ADAPTER", help="Where the adapter has moved.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Where the base model has moved.", show_default=False)
    ] = None,
    train_data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Where the training examples have moved.", show_default=False),
    ] = None,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Line numbers and scores only; needs no training examples.")
    ] = False,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> Command:
    """Find the training examples behind a generation.

    A positive score: training on the example made the generation more likely (helpful). A negative score: it
    made it less likely (harmful).
    """
    return partial(
        query_command,
        cache,
        ask=ask,
        prompt=prompt,
        completion=completion,
        data=data,
        top_k=top_k,
        normalize=normalize,
        method=method,
        json=json,
        max_new_tokens=max_new_tokens,
        model=model,
        adapter=adapter,
        base=base,
        train_data=train_data,
        text=not no_text,
        device=device,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )


@app.command("plan")
def _plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for 'rapidin cache'.")],
    examples: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="How many.  [default: as in --data]", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Whose texts' mean length counts.", show_default=False),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Tokens of an example.  [default: as in --data, or 256]",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="ADAPTER", help="PEFT adapter on MODEL.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What MODEL was tuned from.", show_default=False)
    ] = None,
    at: Annotated[
        str | None, typer.Option(metavar="A[,A...]", help="As for 'rapidin cache'.", show_default=False)
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Bins of each layer's sketch.  [default: as many as pay]",
            show_default=False,
        ),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="As for 'rapidin cache'.", show_default=False)
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="As for 'rapidin cache'.", show_default=False)
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Tokens of an example, at most.", show_default=False),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of a batch.")] = 1024,
    device: Device = None,
    model_dtype: Annotated[
        ModelDtype | None, typer.Option(help="Of the weights.", show_default=False)
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> Command:
    """Say what a cache would take: bytes, time and memory with each code, from a short measurement."""
    return partial(
        plan_command,
        model,
        examples=examples,
        data=data,
        tokens=tokens,
        adapter=adapter,
        base=base,
        at=at,
        width=width,
        include=include or (),
        exclude=exclude or (),
        max_length=max_length,
        batch_tokens=batch_tokens,
        device=device,
        model_dtype=model_dtype,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )


@app.command("info")
def _info(cache: CacheFolder) -> Command:
    """Say what a cache holds and how it was made."""
    return partial(info_command, cache)


@app.command("verify")
def _verify(cache: CacheFolder, quiet: Quiet = False) -> Command:
    """Check every byte of a cache against its checksums."""
    return partial(verify_command, cache, quiet=quiet)


@app.command("demo")
def _demo(
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep model, adapter, data and cache here.  [default: a temporary folder]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Of data and training.")] = 0,
) -> Command:
    """Poison made-up data, tune a small model on it, find it.

    A small model is trained from scratch, so nothing is downloaded. Exit code 0 where at least 9 of the 10
    most helpful examples were planted, else 1.
    """
    return partial(demo_command, out=out, seed=seed)


# ------------------------------------------------------------------------------------------------- main

# typer brings its own click from 0.26 on and uses the installed one before; in both this is the class of all
# mistakes in a command line.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # text that the terminal's encoding lacks is escaped, never an error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _terminable():
            command = app(arguments or ["--help"], prog_name="rapidin", standalone_mode=False)
            code = command() if callable(command) else command  # else help or version, printed already
            sys.stdout.flush()
            return int(code or 0)
    except UserError as error:
        return _fail(str(error), 2)
    except _USAGE_ERROR as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "rapidin"
        return _fail(f"{error.format_message().rstrip('.')}; see '{where} --help'", 2)
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted", 143 if isinstance(stop, Terminated) else 130)
    except BrokenPipeError:
        # Python flushes standard output again as it ends; that must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _fail(line: str, code: int) -> int:
    _line(line)
    return code


def _line(line: str) -> None:
    from rapidin.report import one_line

    print(f"rapidin: {one_line(line)}", file=sys.stderr)


def _messages(quiet: bool) -> "Console":
    """Where progress goes: standard error, and nowhere when quiet."""
    from rapidin import report

    console = report.console(sys.stderr)
    return report.console(open(os.devnull, "w")) if quiet else console


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises Terminated, so that what is open is closed and the cache can be gone on with."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """transformers, peft and torch print no bars and warnings; a download keeps its bar on a terminal."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity(logging.ERROR)
    if sys.stderr.isatty():
        enable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _loading(console: "Console", model: str) -> Iterator[None]:
    """Say that a model is loaded; from disk without bars (nothing turns those of GGUF files off)."""
    if not os.path.exists(model):
        if console.is_terminal:
            console.print("loading the model")
        yield
        return
    with console.status("loading the model"), open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield
