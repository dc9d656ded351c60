"""rapidin show."""

import sys
from typing import Annotated

import typer

from rapidin.attribution.options import CacheOptions
from rapidin.cli.cache import DataFiles, ModelName, task_to_load
from rapidin.cli.console import line, messages, quiet_libraries
from rapidin.cli.options import ModelOptions, Only, command
from rapidin.gradients.settings import GradientSettings


@command("show", example="rapidin show MODEL --adapter ADAPTER --data train.jsonl --limit 3")
def show(
    model: ModelName,
    data: DataFiles,
    reading: Annotated[CacheOptions, Only("map", "streaming", limit=3)],
    loading: Annotated[ModelOptions, Only("adapter", "tokenizer", "trust_remote_code")],
    settings: Annotated[GradientSettings, Only("task", "turns", "date", "eos", "max_length", "too_long")],
    json: Annotated[
        bool, typer.Option("--json", help="Write the examples as JSON.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Show the first examples as the model reads them, with the tokens that have a loss.

    Those tokens are green on a terminal, and between [[ and ]] elsewhere. The weights of the model are not
    loaded.
    """
    from rapidin.data.examples import open_examples
    from rapidin.data.sources import join_paths
    from rapidin.results.terminal import make_console
    from rapidin.tasks.names import forms_of

    task = task_to_load(settings, model, loading, data)
    examples = open_examples(
        join_paths(data),
        limit=reading.limit,
        forms=forms_of(task),
        map=reading.map,
        streaming=reading.streaming,
    )
    with quiet_libraries(), messages(False).status("loading the tokenizer"):
        from rapidin.attribution.reading import read_examples
        from rapidin.gradients.reader import load_reader

        reader, tokenizer, note = load_reader(
            model,
            task,
            settings,
            adapter=loading.adapter,
            tokenizer=loading.tokenizer,
            trust_remote_code=loading.trust_remote_code,
        )
        shown = read_examples(reader, tokenizer, examples, reading.limit or 1)
    for each in [note, *shown.notes]:
        if each:
            line(each)
    if json:
        print(shown.to_json())
        return
    out = make_console(sys.stdout)
    if out.color_system is None:
        print(shown)
    else:
        out.print(shown.report(), soft_wrap=True)
