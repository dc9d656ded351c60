"""rapidin confirm."""

import json as json_module
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rapidin.attribution.options import ModelLocation
from rapidin.cli.caches import model_name
from rapidin.cli.console import check_writable, line, quiet_libraries, write_text
from rapidin.cli.options import Only, Quiet, TrainData, command
from rapidin.errors import UserError
from rapidin.evaluate.settings import ConfirmSettings
from rapidin.files import check_not_input, replace_file
from rapidin.settings import option

if TYPE_CHECKING:
    from rapidin.evaluate.confirm import Confirmed


@dataclass(frozen=True)
class Output:
    """Where the results go."""

    work: str | None = option(
        None,
        help="Folder that keeps each training's result; an unfinished run there is resumed.",
        metavar="DIR",
        panel="Output",
        default="beside HITS, hits.confirm for hits.json",
    )
    json: str | None = option(
        None,
        help="Write the hits with the 'confirmation' of each query; - writes to standard output, without a "
        "table. Give the name of HITS to add it there.",
        metavar="FILE",
        panel="Output",
    )
    report: str | None = option(
        None,
        help="Write the page of the hits, with what came of leaving them out.",
        metavar="FILE.html",
        panel="Output",
    )
    only_cost: bool = option(
        False,
        help="Say how many trainings there are and how long they take, and stop. With --trainer the first "
        "one is run for that, and kept.",
        panel="Run",
    )

    def check(self, hits: str, quiet: bool) -> None:
        """Raise UserError for what cannot be written, before any work is done for it."""
        check_writable(self.json, standard=True)
        check_writable(self.report)
        check_not_input([self.report], [hits])
        if self.only_cost and quiet:
            raise UserError("--quiet hides what --only-cost says", "leave out one of them")


@command("confirm", example="rapidin confirm hits.json --top-k 10 --json confirmed.json")
def confirm(
    hits: Annotated[str, typer.Argument(metavar="HITS", help="The hits that 'rapidin query --json' wrote.")],
    settings: ConfirmSettings,
    output: Output,
    location: Annotated[
        ModelLocation, Only("model", "adapter", "base", "tokenizer", "device", "trust_remote_code")
    ],
    train_data: TrainData = None,
    quiet: Quiet = False,
) -> None:
    """Retrain without the hits: does the model still say what they explain?

    Trains the adapter (or the model, if all of it was tuned) again without the helpful hits of a query and,
    as controls, without as many random rows. Says by how much the log-probability of the generation falls,
    with a p-value, and whether the model's answer changes. That is 23 trainings for one query by default:
    --only-cost says first how long they take. Rerun the same command to resume after an interruption.
    """
    output.check(hits, quiet)
    with quiet_libraries():
        from rapidin.attribution.drop import hits_in, read_text
        from rapidin.evaluate.confirm import confirm
        from rapidin.evaluate.log import no_log
        from rapidin.results.collection import Results

        written = hits_in(read_text(hits, "file of hits not found"))
        if written is not None:
            Results.from_json(written)  # so that no training is in vain
        done = confirm(
            hits,
            settings,
            work=output.work,
            train_data=train_data,
            location=location,
            only_cost=output.only_cost,
            log=no_log if quiet else line,
        )
    if done is not None:
        _show(done, output)


def _show(done: "Confirmed", output: Output) -> None:
    from rapidin.results.collection import Results
    from rapidin.results.html import page
    from rapidin.results.json import plain_json
    from rapidin.results.terminal import confirmation_report, make_console

    results = Results.from_json(done.hits)
    if output.report is not None:
        write_text(output.report, page(results, about=_about(done.hits)))
    text = json_module.dumps(plain_json(done.hits), indent=1)
    if output.json == "-":
        print(text)
        return
    if output.json is not None:
        replace_file(Path(output.json), (text + "\n").encode())
    console = make_console(sys.stdout)
    for number, (query, confirmation) in enumerate(done.confirmations.items()):
        if number:
            console.print()
        console.print(confirmation_report(results[query], console.width))
        if confirmation.is_far:
            line(f"query {query + 1}: {confirmation.recipe_text}")


def _about(hits: Mapping[str, Any]) -> dict[str, str]:
    """What the page says of where its hits come from: names, since a page is sent to other people."""
    facts = {name: hits.get(name) for name in ("model", "adapter", "base")}
    return {name: model_name(str(value)) for name, value in facts.items() if value}
