"""rapidin query."""

import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rapidin.cli.caches import open_caches, with_models
from rapidin.cli.console import check_writable, line, messages, quiet_libraries, write_text
from rapidin.cli.options import (
    CacheFolders,
    Damping,
    Device,
    MaxNewTokens,
    Method,
    MethodOption,
    MovedAdapter,
    MovedBase,
    MovedModel,
    Normalize,
    NormalizeOption,
    Quiet,
    ShardModel,
    TrainData,
    TrustRemoteCode,
    command,
)
from rapidin.data.spans import HOTWORDS
from rapidin.distributed import world
from rapidin.errors import UserError

if TYPE_CHECKING:
    from rapidin.attribution.ensemble import Ensemble


@command("query", several=True)
def query(
    cache: CacheFolders,
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
    normalize: NormalizeOption = Normalize.layer,
    method: MethodOption = Method.dot,
    damping: Damping = None,
    tokens: Annotated[
        bool,
        typer.Option("--tokens", help="Hits for each token of a completion by itself, too, from one scan."),
    ] = False,
    hotwords: Annotated[
        str | None,
        typer.Option(
            metavar="WORDS",
            help="Hits for words of the completion, as in 'planet|Zorgon'; in --data the column 'hotwords' "
            "names them.",
            show_default=False,
        ),
    ] = None,
    contributions: Annotated[
        bool,
        typer.Option(
            "--contributions",
            help="Which tokens of each hit made its score: takes the gradients of the hits again.",
        ),
    ] = False,
    together: Annotated[
        bool,
        typer.Option(
            "--together",
            help="One ranking for all of --data as a target set: the mean of the scores, by the column "
            "'weight' where there is one.",
        ),
    ] = False,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Sum the scores of all examples by a column of the training data, such as their source; "
            "'file' for the files they are from.",
            show_default=False,
        ),
    ] = None,
    fold: Annotated[
        bool,
        typer.Option("--fold", help="Show hits that say the same, or nearly, once, with a count."),
    ] = False,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Where BM25 and the model's own hidden states rank the hits. Reads all training texts, and "
            "takes a forward pass over each.",
        ),
    ] = False,
    json: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write the hits as JSON; with - to standard output, and no table.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.html",
            help="Write a page to look at: a click on a token ranks the hits for it, and shows which of "
            "their words did it. Implies --tokens, but with --hotwords or --together, and --contributions "
            "and --fold.",
            show_default=False,
        ),
    ] = None,
    rescore: Annotated[
        str | None,
        typer.Option(
            metavar="CACHE|exact",
            help="Order the best of --candidates anew: by a cache of the same examples that keeps more of "
            "each, or by their exact gradients.",
            show_default=False,
        ),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="At each end, that --rescore looks at.  [default: 1000 of a cache, twice --top-k exact]",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    model: MovedModel = None,
    adapter: MovedAdapter = None,
    base: MovedBase = None,
    train_data: TrainData = None,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Line numbers and scores only; needs no training examples.")
    ] = False,
    device: Device = None,
    shard_model: ShardModel = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Find the training examples behind a generation.

    A positive score: training on the example made the generation more likely (helpful). A negative score: it
    made it less likely (harmful).
    """
    from rapidin.results.json import results_json
    from rapidin.results.terminal import hits_report, make_console
    from rapidin.results.text import bytes_text, time_text

    _check_query(ask, prompt, completion, data)
    if tokens and hotwords is not None:
        raise UserError("both --tokens and --hotwords", "a word's tokens are among all tokens")
    leads = world().leads
    for path in (json, report):
        if path is not None and path != "-":
            check_writable(path)
    if report is not None:
        tokens = tokens or not (together or hotwords)
        contributions = fold = True
    console = messages(quiet)
    with quiet_libraries():
        from rapidin.attribution.groups import check_column
        from rapidin.attribution.training_data import training_data
        from rapidin.cache import Cache
        from rapidin.data.sources import join_paths

        ensemble = open_caches(cache)
        finer: Cache | Literal["exact"] | None = None
        if rescore is not None:
            finer = "exact" if rescore == "exact" else Cache(rescore)
        opened = ensemble.caches[-1]
        generations = _generations(ask, prompt, completion, data, str(opened.manifest.data.get("form")))
        if hotwords is not None:
            generations = [record | {HOTWORDS: hotwords} for record in generations]
        named = any(record.get(HOTWORDS) for record in generations)
        # Before the model: a file that has moved, or lacks a column, shows at once.
        examples = training_data(opened, False if no_text or not leads else join_paths(train_data))
        if by is not None and examples is not None:
            check_column(examples, by)
        ready = with_models(console, ensemble, model, adapter, base, device, trust_remote_code, shard_model)
        said = f"explaining {len(generations):,} among {len(opened):,} examples"
        with console.status(said) as status:
            results = ready.query(
                generations,
                top_k=top_k,
                normalize=normalize.value,
                method=method.value,
                damping=damping,
                together=together,
                max_new_tokens=max_new_tokens,
                examples=False if examples is None else examples,
                targets="tokens" if tokens else "hotwords" if named and not together else None,
                contributions=contributions,
                fold=fold,
                by=by,
                baselines=baselines,
                layers=report is not None,
                histogram=report is not None,
                rescore=finer,
                candidates=candidates,
                on_stage=lambda stage, done, of: status.update(f"{said}: {stage} {done:,}/{of:,}"),
            )
    if not leads:
        return
    if json == "-":
        print(results_json(results))
    else:
        if json is not None:
            write_text(json, results_json(results) + "\n")
        out = make_console(sys.stdout)
        out.print(hits_report(results, width=out.width))
    if report is not None:
        from rapidin.results.html import page

        text = page(results, about=_about(ensemble))
        write_text(report, text)
        if not quiet:
            line(f"the page is in {report} ({bytes_text(len(text.encode()))})")
    for n, result in enumerate(results, 1):
        if result.missing:
            words = ", ".join(f"'{word}'" for word in result.missing)
            line(f"the completion of query {n} does not say {words}")
    if not quiet:
        seconds = results[0].seconds
        stages = ", ".join(f"{stage} {time_text(value)}" for stage, value in seconds.items())
        count = f"{len(generations):,} {'query' if len(generations) == 1 else 'queries'}"
        said = f"{count} over {len(opened):,} examples: {stages}"
        if not opened.manifest.complete:
            said += f"; the cache is unfinished, {opened.manifest.rows:,} examples were wanted"
        line(said)


def _about(ensemble: "Ensemble") -> dict[str, str]:
    """What a page says of where its hits come from."""
    from rapidin import __version__

    cache = ensemble.caches[-1]
    source = cache.manifest.model.get("source", {})
    facts = {
        "model": source.get("model"),
        "adapter": source.get("adapter"),
        "base": source.get("base"),
        "caches": ", ".join(str(cache.path) for cache in ensemble.caches),
        "examples": f"{len(cache):,}",
        "made": f"{datetime.now().astimezone():%Y-%m-%d %H:%M} by rapidin {__version__}",
    }
    return {name: value for name, value in facts.items() if value}


_PLAIN = ("prompt", "completion")


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
    from rapidin.data.examples import open_examples

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
