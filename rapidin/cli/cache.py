"""rapidin cache and rapidin plan."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rapidin.cli.console import line, load, messages, quiet_libraries
from rapidin.cli.options import (
    Device,
    Dtype,
    Loss,
    ModelDtype,
    OnError,
    Preconditioner,
    Quiet,
    ShardModel,
    TooLong,
    TrustRemoteCode,
    command,
    points,
)
from rapidin.errors import UserError

if TYPE_CHECKING:
    from rapidin.data.examples import Examples
    from rapidin.gradients.dropout import Thinning


@command("cache", several=True)
def cache(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Hugging Face model: a folder, a name, or a folder with one GGUF file."
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            help="Training examples: jsonl with prompt and completion, instruction, input and output, "
            "messages, or text; or a HF dataset on disk. Several are read one after another.",
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
            help="Bins of each layer's sketch: more is truer, and larger.  [default: as many as pay, 512 for "
            "hundreds of layers, more for fewer]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**64 - 1, help="Of the sketch.")] = 0,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Only the first so many examples.", show_default=False),
    ] = None,
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="Add what is new to a cache that holds the first of the examples: --data has grown, or "
            "another --data follows it.",
        ),
    ] = False,
    on_error: Annotated[
        OnError,
        typer.Option(help="What to do with a malformed example: stop before any work, or count and skip it."),
    ] = OnError.stop,
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
    preconditioner: Preconditioner = "kfac",
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
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only the I-th of N parts, for machines without a common folder: 'rapidin merge' puts them "
            "together. 0/N: only what all parts share.",
            show_default=False,
        ),
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="A trainer's folder of checkpoint-<step>, of adapters on MODEL or of whole models: a cache "
            "of each, added up by the learning rates in the trainer's state (TracIn).",
            show_default=False,
        ),
    ] = None,
    masks: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="K caches of the model thinned by K dropout masks, whose mean counts (IP ensemble).",
            show_default=False,
        ),
    ] = None,
    dropout: Annotated[
        float, typer.Option(metavar="P", help="The share of features that a mask of --masks takes away.")
    ] = 0.1,
    device: Device = None,
    model_dtype: Annotated[
        ModelDtype | None,
        typer.Option(
            help="Of the weights.  [default: float32 on a CPU, else as they are]", show_default=False
        ),
    ] = None,
    shard_model: ShardModel = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Sketch the gradient of every training example into a cache.

    Stopped at any moment, the same command goes on where it was.
    """
    from rapidin.cli.progress import CachingBar
    from rapidin.cli.tables import counts_text
    from rapidin.data.examples import open_examples
    from rapidin.data.sources import join_paths
    from rapidin.distributed import world
    from rapidin.results.text import bytes_text, one_line, time_text

    where, of_parts = points(at), _part(part)
    console = messages(quiet)
    jobs = _jobs(model, adapter, base, checkpoints, masks, dropout, out)
    with console.status("reading the data"):
        # Before the model: mistakes in the data show at once.
        examples = open_examples(join_paths(data), limit=limit, skip=on_error == OnError.skip)
    if console.is_terminal:
        console.print(f"{len(examples):,} examples in {one_line(', '.join(data))}")
    loaded, of = None, None
    for job in jobs:
        with quiet_libraries():
            from rapidin.attribution.attributor import Attributor
            from rapidin.gradients.adam import state_file

            if preconditioner not in ("off", "sample", "kfac"):
                state_file(Path(preconditioner))  # before the model: a mistake in its name shows at once
            if of != job.names:
                loaded = None  # before the next one: two models may not fit
                loaded, of = (
                    load(console, *job.names, device, model_dtype, trust_remote_code, shard_model),
                    job.names,
                )
            attributor = Attributor(
                loaded,
                width=width if width is not None else "auto",
                budget=bytes,
                seed=seed,
                include=include or (),
                exclude=exclude or (),
                at=[1.0] if where is None and checkpoints is not None else where,
                loss=loss.value,
                preconditioner=preconditioner,
                eos=not no_eos,
                max_length=max_length,
                too_long=too_long.value,
                batch_tokens=batch_tokens,
                thinning=job.thinning,
            )
            if console.is_terminal:
                dim = sum(layer.width for layer in attributor.layers)
                console.print(
                    f"{job.words}{len(attributor.layers):,} blocks of {attributor.width:,}: {dim:,} numbers "
                    f"an example; {attributor.coverage:.2%} of the model's parameters count; gradients at "
                    f"{', '.join(f'{point:g}' for point in attributor.points)} on {attributor.loaded.device}"
                )
            if examples.form == "messages":  # a template may refuse a chat: better now than after hours
                with console.status("trying the chat template on all examples"):
                    attributor.encoder.check(examples)
            if job is jobs[0] and world().leads:
                _tell_malformed(examples)
            with CachingBar(console) as bar:
                try:
                    cache = attributor.cache(
                        examples,
                        job.out,
                        dtype=dtype.value if dtype else None,
                        bytes=bytes,
                        sample=sample,
                        shard_rows=shard_rows,
                        part=of_parts,
                        append=append,
                        on_progress=bar,
                    )
                except KeyboardInterrupt as stop:
                    raise type(stop)(_how_to_go_on(job.out, len(examples))) from None
        if quiet or bar.last is None:
            continue
        if of_parts and not of_parts[0]:
            line(f"what all parts share is in {job.out}; copy it to each machine, and go on with --part 1/N")
            continue
        info = cache.info()
        here = bar.last.done - bar.last.resumed
        if here:
            did = f"cached {here:,} examples in {time_text(bar.seconds)}"
            did += f" ({here / bar.seconds:,.1f} examples/s, {bar.last.tokens / bar.seconds:,.0f} tokens/s)"
            if bar.last.resumed:
                did += f" after the {bar.last.resumed:,} that were there"
        else:
            did = f"all {bar.last.total:,} examples were there already"
        counts, size = counts_text(info["counts"]), bytes_text(info["bytes"])
        line(f"{did}: {counts}; {size} in {job.out}")


@dataclass(frozen=True)
class _Job:
    """One cache to make. names: of model, adapter and base; words: what it is, where there are several."""

    out: str
    names: tuple[str, str | None, str | None]
    thinning: "Thinning | None" = None
    words: str = ""


def _jobs(
    model: str,
    adapter: str | None,
    base: str | None,
    checkpoints: str | None,
    masks: int | None,
    dropout: float,
    out: str,
) -> list[_Job]:
    """The caches that a command makes; of several, `out` says what they are."""
    if checkpoints is None and masks is None:
        return [_Job(out, (model, adapter, base))]
    from rapidin.attribution.checkpoints import find_checkpoints
    from rapidin.attribution.ensemble import Ensemble
    from rapidin.distributed import world
    from rapidin.gradients.dropout import Thinning

    folder = Path(out)
    if os.path.exists(folder / "manifest.json"):
        raise UserError(f"'{out}' is a single cache", "name another folder with --out")
    if masks is not None:
        if checkpoints is not None:
            raise UserError("both --checkpoints and --masks", "give one of them")
        thinned = [Thinning(dropout, number) for number in range(masks)]
        names = [f"mask-{number}" for number in range(masks)]
        if world().leads:
            Ensemble.write(folder, "mean", [(name, 1.0) for name in names])
        return [
            _Job(str(folder / name), (model, adapter, base), thinning, f"{name}: ")
            for name, thinning in zip(names, thinned, strict=True)
        ]
    assert checkpoints is not None
    if adapter is not None:
        raise UserError("both --checkpoints and --adapter", "checkpoints of an adapter hold their own")
    found, rated = find_checkpoints(checkpoints)
    leads = world().leads
    if not rated and leads:
        line(f"no learning rates in {checkpoints}: steps weigh alike")
    if leads:
        Ensemble.write(folder, "tracin", [(each.path.name, each.weight) for each in found])
    jobs = []
    for each in found:
        of = (model, str(each.path), None) if each.is_adapter else (str(each.path), None, base)
        jobs.append(_Job(str(folder / each.path.name), of, words=f"{each.path.name}: "))
    return jobs


def _part(text: str | None) -> tuple[int, int] | None:
    """The numbers of --part; UserError where they are none."""
    if text is None:
        return None
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal()):
        raise UserError(f"--part {text} is not two numbers", "as in --part 1/4")
    return int(number), int(parts)


def _tell_malformed(examples: "Examples") -> None:
    """A line for each of the first examples that are skipped, said even when quiet: they are lost."""
    for problem in examples.problems:
        line(f"skipped: {problem}")
    more = len(examples.malformed) - len(examples.problems)
    if more:
        line(f"skipped: {more:,} more malformed examples")


def _how_to_go_on(out: str, wanted: int) -> str:
    from rapidin.cache import Manifest

    try:
        done = Manifest.read(Path(out)).rows_done
    except UserError:
        done = 0
    return f"stopped with {done:,} of {wanted:,} examples in {out}; the same command goes on from there"


@command("plan")
def plan(
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
    preconditioner: Preconditioner = "kfac",
    batch_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of a batch.")] = 1024,
    device: Device = None,
    model_dtype: Annotated[
        ModelDtype | None, typer.Option(help="Of the weights.", show_default=False)
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Say what a cache would take: bytes, time and memory with each code, from a short measurement."""
    from rapidin.cli.tables import plan_report
    from rapidin.data.examples import open_examples
    from rapidin.results.terminal import make_console

    if examples is None and data is None:
        raise UserError("nothing to plan for", "say how many --examples, or name the --data")
    where, console = points(at), messages(quiet)
    opened = open_examples(data) if data is not None else None
    with quiet_libraries():
        from rapidin.attribution.attributor import Attributor
        from rapidin.attribution.plan import make_plan

        loaded = load(console, model, adapter, base, device, model_dtype, trust_remote_code)
        attributor = Attributor(
            loaded,
            width=width if width is not None else "auto",
            include=include or (),
            exclude=exclude or (),
            at=where,
            preconditioner=preconditioner,
            max_length=max_length,
            batch_tokens=batch_tokens,
        )
        with console.status("measuring a batch"):
            count = examples if examples is not None else len(opened or ())
            plan = make_plan(attributor, count, opened, tokens)
    make_console(sys.stdout).print(plan_report(plan))
