"""rapidin cache and rapidin plan."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rapidin.cli.console import line, load, messages, quiet_libraries
from rapidin.cli.options import (
    Device,
    Dtype,
    Loss,
    ModelDtype,
    Quiet,
    TooLong,
    TrustRemoteCode,
    command,
    points,
)
from rapidin.errors import UserError


@command("cache")
def cache(
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
) -> None:
    """Sketch the gradient of every training example into a cache.

    Stopped at any moment, the same command goes on where it was.
    """
    from rapidin import report
    from rapidin.examples import open_examples

    where = points(at)
    console = messages(quiet)
    with console.status("reading the data"):
        examples = open_examples(data, limit=limit)  # before the model: mistakes in the data show at once
    if console.is_terminal:
        console.print(f"{len(examples):,} examples in {report.one_line(data)}")
    with quiet_libraries():
        from rapidin.attributor import Attributor

        loaded = load(console, model, adapter, base, device, model_dtype, trust_remote_code)
        attributor = Attributor(
            loaded,
            width=width if width is not None else 512 if bytes is None else "auto",
            budget=bytes,
            seed=seed,
            include=include or (),
            exclude=exclude or (),
            at=where,
            loss=loss.value,
            eos=not no_eos,
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
    line(f"{did}: {report.counts_text(info['counts'])}; {report.bytes_text(info['bytes'])} in {out}")


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
    batch_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of a batch.")] = 1024,
    device: Device = None,
    model_dtype: Annotated[
        ModelDtype | None, typer.Option(help="Of the weights.", show_default=False)
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Say what a cache would take: bytes, time and memory with each code, from a short measurement."""
    from rapidin import report
    from rapidin.examples import open_examples

    if examples is None and data is None:
        raise UserError("nothing to plan for", "say how many --examples, or name the --data")
    where, console = points(at), messages(quiet)
    opened = open_examples(data) if data is not None else None
    with quiet_libraries():
        from rapidin.attributor import Attributor
        from rapidin.plan import make_plan

        loaded = load(console, model, adapter, base, device, model_dtype, trust_remote_code)
        attributor = Attributor(
            loaded,
            width=width if width is not None else "auto",
            include=include or (),
            exclude=exclude or (),
            at=where,
            max_length=max_length,
            batch_tokens=batch_tokens,
        )
        with console.status("measuring a batch"):
            count = examples if examples is not None else len(opened or ())
            plan = make_plan(attributor, count, opened, tokens)
    report.console(sys.stdout).print(report.plan_report(plan))
