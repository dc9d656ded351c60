"""rapidin query."""

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rapidin.attribution.options import MAP, ModelLocation, QueryOptions
from rapidin.cli.caches import facts_of, open_caches, open_queries, with_models
from rapidin.cli.console import check_writable, line, messages, quiet_libraries, write_text
from rapidin.cli.options import CacheFolders, Quiet, TrainData, command
from rapidin.cli.rapidin_config import RapidInConfig
from rapidin.data.fields import FieldMap
from rapidin.data.spans import HOTWORDS
from rapidin.distributed import world
from rapidin.errors import UserError
from rapidin.settings import option
from rapidin.tasks.names import CAUSAL

if TYPE_CHECKING:
    from rapidin.attribution.ensemble import Ensemble
    from rapidin.cache import Cache
    from rapidin.data.examples import Examples
    from rapidin.results.collection import Results


@dataclass(frozen=True)
class QuerySource:
    """The generations to explain. Raises UserError if there is none, or more than one way is used."""

    ask: str | None = option(
        None,
        help="A question or instruction, put in the form of the training data: the Alpaca form, the chat "
        "template, or as it is.",
        metavar="TEXT",
        panel="Generation",
    )
    prompt: str | None = option(
        None,
        help="The whole text that the model read; nothing is put around it.",
        metavar="TEXT",
        panel="Generation",
    )
    completion: str | None = option(
        None,
        help="What the model answered.",
        metavar="TEXT",
        panel="Generation",
        default="the model generates it now",
    )
    data: str | None = option(
        None,
        help="Several generations to explain, in the forms of 'rapidin cache'; the model generates missing "
        "completions.",
        metavar="FILE",
        panel="Generation",
    )
    map: FieldMap | None = MAP
    tokens: bool = option(
        False,
        help="Find hits for each token of a completion too, in the same scan.",
        panel="Generation",
    )
    hotwords: str | None = option(
        None,
        help="Find hits for words of the completion, as in 'planet|Zorgon'; in --data the column 'hotwords' "
        "names them.",
        metavar="WORDS",
        panel="Generation",
    )

    def __post_init__(self) -> None:
        given = [f"--{name}" for name in ("ask", "prompt", "data") if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"{' and '.join(given)} do not go together" if given else "nothing to explain"
            raise UserError(what, "use --ask or --prompt (and --completion), or --data with a file of them")
        if self.data is not None and self.completion is not None:
            raise UserError(
                "--completion goes with --ask or --prompt", "in --data, a completion is part of its line"
            )
        if self.map is not None and self.data is None:
            raise UserError("--map names fields of --data", "use --data too")
        if self.completion == "":
            raise UserError("the completion is empty", "leave out --completion, and the model generates one")
        if self.tokens and self.hotwords is not None:
            raise UserError("--tokens and --hotwords do not go together", "all tokens include a word's")


@dataclass(frozen=True)
class Output:
    """Where the results go."""

    json: str | None = option(
        None,
        help="Write the hits as JSON; - writes to standard output, without a table.",
        metavar="FILE",
        panel="Output",
    )
    report: str | None = option(
        None,
        help="Write an HTML page: a click on a token ranks the hits for it and shows which of their words "
        "contribute. Implies --tokens (unless --hotwords or --together is used), --contributions and --fold.",
        metavar="FILE.html",
        panel="Output",
    )
    no_text: bool = option(
        False, help="Show line numbers and scores only; needs no training examples.", panel="Output"
    )

    def check(self) -> None:
        """Raise UserError if a file cannot be written, before any work is done for it."""
        check_writable(self.json, standard=True)
        check_writable(self.report)


@command(
    "query",
    several=True,
    example="rapidin query CACHE --ask 'Which planet is the largest?' --report hits.html",
)
def query(
    cache: CacheFolders,
    source: QuerySource,
    options: QueryOptions,
    output: Output,
    location: ModelLocation,
    rapidin_config: RapidInConfig = None,
    train_data: TrainData = None,
    quiet: Quiet = False,
) -> None:
    """Find the training examples behind a generation.

    A positive score: training on the example made the generation more likely (helpful). A negative score: it
    made it less likely (harmful).
    """
    output.check()
    console = messages(quiet)
    with quiet_libraries():
        from rapidin.attribution.decoys import has_decoys
        from rapidin.attribution.groups import check_column
        from rapidin.attribution.progress import query_text
        from rapidin.attribution.provenance import task_name
        from rapidin.attribution.training_data import training_data
        from rapidin.data.sources import join_paths

        ensemble = open_caches(cache)
        opened = ensemble.caches[-1]
        generations = _generations(source, opened, cache[-1])
        by_token = task_name(opened.manifest) == CAUSAL
        for_page = output.report is not None
        options = _completed(options, source, generations, for_page=for_page, by_token=by_token)
        # Before the model: a cache without decoys, a file that has moved or lacks a column show at once.
        has_decoys(ensemble.caches, options)
        examples = training_data(
            opened, False if output.no_text or not world().leads else join_paths(train_data)
        )
        if options.by is not None and examples is not None:
            check_column(examples, options.by)
        ready = with_models(console, ensemble, location)
        results = ready.query(
            generations,
            options,
            examples=False if examples is None else examples,
            progress=False if quiet else None,
        )
    if not world().leads:
        return
    _show(results, output, ensemble, _made(ensemble, options, examples), quiet)
    if not quiet:
        line(query_text(results[0], len(generations), opened))


def _completed(
    options: QueryOptions,
    source: QuerySource,
    generations: list[dict[str, Any]],
    *,
    for_page: bool,
    by_token: bool,
) -> QueryOptions:
    """The options with what --tokens, --hotwords and --report imply; by_token: whether tokens have scores of
    their own in the cache's task."""
    tokens = source.tokens
    if for_page:
        tokens = tokens or (by_token and not (options.together or source.hotwords))
        options = replace(options, fold=True, layers=True, histogram=True)
        options = replace(options, contributions=by_token or options.contributions)
    if tokens:
        return replace(options, targets="tokens")
    named = any(record.get(HOTWORDS) for record in generations)
    return replace(options, targets="hotwords" if named and not options.together else None)


def _made(ensemble: "Ensemble", options: QueryOptions, examples: "Examples | None") -> dict[str, Any]:
    """What --json says of where the hits come from."""
    from rapidin import __version__
    from rapidin.attribution.provenance import task_name

    source = ensemble.caches[-1].manifest.model.get("source", {})
    return {
        "version": __version__,
        **{name: source.get(name) for name in ("model", "adapter", "base")},
        "caches": [str(cache.path.resolve()) for cache in ensemble.caches],
        "train_data": None if examples is None else examples.path,
        "reading": {} if examples is None else examples.reading.to_json(),
        "task": task_name(ensemble.caches[-1].manifest),
        "settings": options.to_json(),
    }


def _show(
    results: "Results", output: Output, ensemble: "Ensemble", made: dict[str, Any], quiet: bool
) -> None:
    from rapidin.results.json import results_json
    from rapidin.results.terminal import hits_report, make_console
    from rapidin.results.text import bytes_text

    if output.json == "-":
        print(results_json(results, made))
    else:
        if output.json is not None:
            write_text(output.json, results_json(results, made) + "\n")
        out = make_console(sys.stdout)
        out.print(hits_report(results, width=out.width))
    if output.report is not None:
        from rapidin.results.html import page

        text = page(results, about=facts_of(ensemble))
        write_text(output.report, text)
        if not quiet:
            line(f"the page is in {output.report} ({bytes_text(len(text.encode()))})")
    for n, result in enumerate(results, 1):
        if result.missing:
            words = ", ".join(f"'{word}'" for word in result.missing)
            line(f"the completion of query {n} does not contain {words}")


def _generations(source: QuerySource, cache: "Cache", folder: str) -> list[dict[str, Any]]:
    """What is to be explained, as records in which something may be missing."""
    from rapidin.attribution.questions import asked, continued

    if source.ask is not None:
        given = asked(cache.manifest, source.ask, source.completion)
        records = list(open_queries(folder, [given]))
    elif source.prompt is not None:
        given = continued(cache.manifest, source.prompt, source.completion)
        records = list(open_queries(folder, [given]))
    else:
        records = list(open_queries(folder, source.data, map=source.map))
    if source.hotwords is not None:
        records = [record | {HOTWORDS: source.hotwords} for record in records]
    return records
