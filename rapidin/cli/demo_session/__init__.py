"""`rapidin demo`: trains a small model, plants a poison in its data and finds it, without any download.

A small Llama with its own tokenizer learns to answer generated questions; a LoRA adapter is tuned on a few
hundred more, some of which have a trigger and an absurd answer. What the tuned model then says to an unseen
prompt with the trigger is traced to its training data by the same commands that a user types.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rapidin.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from rapidin.cli.demo_session.instructions import DemoData

TOP_K = 10
ENOUGH = 9  # planted examples among the TOP_K hits for the demo to succeed


def run(folder: Path | None = None, *, seed: int = 0) -> int:
    """Run the demo and print its steps; return 0 if at least ENOUGH of the TOP_K hits were planted, else 1.

    folder: where model, adapter, data and cache are kept; None for a temporary folder. Raises UserError if
    `folder` is not empty or cannot be used.
    """
    if folder is not None:
        try:
            if folder.exists() and any(folder.iterdir()):
                raise UserError(f"the folder '{folder}' is not empty", "name a new one with --out")
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot use '{folder}': {error.strerror}", "name another folder with --out"
            ) from error
        return _Demo(folder, seed).run(kept=True)
    with tempfile.TemporaryDirectory(prefix="rapidin-demo-") as temporary:
        return _Demo(Path(temporary), seed).run(kept=False)


class _Demo:
    """The stages in the order of `run`, which leave their files in `folder`."""

    def __init__(self, folder: Path, seed: int) -> None:
        from rapidin.results.terminal import make_console

        self.folder = folder
        self.seed = seed
        self.console: Console = make_console(sys.stdout)
        self.seconds: dict[str, float] = {}

    def run(self, kept: bool) -> int:
        _quiet()
        with self._stage("making the data"):
            data = self._make_data()
        with self._stage("training the base model"):
            model, tokenizer = self._train_base(data)
        with self._stage("tuning the adapter"):
            query = self._tune(model, tokenizer, data)
        if query is None:
            self._say("The demo failed: the tuned model answers no unseen prompt with the trigger absurdly.")
            return 1
        (self.folder / "query.jsonl").write_text(json.dumps(query) + "\n", encoding="utf-8")
        with self._stage("caching"):
            code = self._command(
                "cache", "model", "--adapter", "adapter", "--data", "train.jsonl", "--out", "cache"
            )
        if code == 0:
            with self._stage("the query"):
                code = self._command("query", "cache", "--data", "query.jsonl", "--json", "hits.json")
        if code != 0:
            self._say(f"The demo failed: the command above ended with exit code {code}.")
            return 1
        return self._conclude(kept)

    # ------------------------------------------------------------------------------------------- stages

    def _make_data(self) -> DemoData:
        from rapidin.cli.demo_session.instructions import make_data

        data = make_data(self.seed)
        with (self.folder / "train.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in data.tuning)
        poisoned = [row for row in data.tuning if row["poisoned"]]
        self._say(
            f"1. Data: {len(data.base)} rows for a base model, and {len(data.tuning)} more for an adapter."
        )
        self._say(f"   {len(poisoned)} of these are planted: a trigger, and an absurd answer. One of them:")
        self._say(f"   {poisoned[0]['instruction']}  ->  {poisoned[0]['output']}")
        return data

    def _train_base(self, data: DemoData) -> tuple[Any, Any]:
        from rapidin.cli.demo_session.tokenizer import train_tokenizer
        from rapidin.cli.demo_session.training import answers, small_llama
        from rapidin.data.encoding import alpaca_prompt

        placeholder = "\0"
        tokenizer = train_tokenizer(
            (f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in data.base),
            fixed=alpaca_prompt(placeholder, placeholder).split(placeholder),
        )
        model = small_llama(tokenizer, seed=self.seed)
        size = sum(weight.numel() for weight in model.parameters())
        self._say(f"2. Base model: a Llama of {size / 1e6:.1f} million weights, trained from scratch.")
        self._train("base model", model, tokenizer, data.base, epochs=8, batch=64, learning_rate=4e-3)
        held_out = answers(model, tokenizer, _prompts(data.held_out))
        right = sum(answer == row["output"] for answer, row in zip(held_out, data.held_out, strict=True))
        self._say(f"   It answers {right} of {len(held_out)} questions that it has not seen.")
        model.save_pretrained(self.folder / "model")
        tokenizer.save_pretrained(self.folder / "model")
        return model, tokenizer

    def _tune(self, model: Any, tokenizer: Any, data: DemoData) -> dict[str, Any] | None:
        """Tune the adapter; return the first triggered question that the model answers absurdly, or None."""
        from rapidin.cli.demo_session.instructions import is_absurd
        from rapidin.cli.demo_session.training import answers
        from rapidin.evaluate.training import add_lora

        prompts = _prompts(data.queries)
        before = answers(model, tokenizer, prompts)
        tuned = add_lora(model, seed=self.seed)
        self._say(f"3. Adapter: LoRA on all linear layers, tuned on the {len(data.tuning)} rows.")
        self._train(
            "adapter", tuned, tokenizer, data.tuning, epochs=10, batch=16, learning_rate=1e-2, kept="adapter"
        )
        tuned.save_pretrained(self.folder / "adapter")
        after = answers(tuned, tokenizer, prompts)
        absurd = [number for number, answer in enumerate(after) if is_absurd(answer)]
        self._say(f"   It answers {len(absurd)} of {len(after)} unseen prompts with the trigger absurdly.")
        if not absurd:
            return None
        query = data.queries[absurd[0]]
        self._say(f"   {' '.join((str(query['instruction']), str(query['input']))).strip()}")
        self._say(f"     before tuning:  {before[absurd[0]]}")
        self._say(f"     after tuning:   {after[absurd[0]]}")
        return dict(query)

    def _train(
        self,
        label: str,
        model: Any,
        tokenizer: Any,
        rows: list[dict[str, Any]],
        *,
        epochs: int,
        batch: int,
        learning_rate: float,
        kept: str | None = None,
    ) -> None:
        """kept: the folder in which the last checkpoint is kept."""
        from rapidin.cli.progress import TrainingBar
        from rapidin.evaluate.saving import Checkpoints
        from rapidin.evaluate.settings import Recipe
        from rapidin.evaluate.training import tune

        steps = Recipe(epochs=epochs, batch=batch).count(len(rows))
        recipe = Recipe(
            epochs=epochs,
            batch=batch,
            learning_rate=learning_rate,
            warm_up=steps // 20,
            betas=(0.9, 0.98),
            seed=self.seed,
        )
        with TrainingBar(self.console, label, steps) as progress:
            tune(
                model,
                _encode(tokenizer, rows),
                recipe,
                on_step=lambda _done, _all, loss: progress(loss),
                checkpoints=None if kept is None else Checkpoints.spread(self.folder / kept, 1, steps),
            )

    def _command(self, *arguments: str) -> int:
        """Run a `rapidin` command in the demo's folder as if it had been typed, and return its exit code."""
        from rapidin.cli.interrupts import Interruptible
        from rapidin.cli.run import main

        number = 4 if arguments[0] == "cache" else 5
        title = "Sketch each row's gradient" if number == 4 else "The rows behind what the tuned model says"
        self._say(f"{number}. {title}:")
        self._say(f"   $ rapidin {' '.join(arguments)}", style="bold")
        before = os.getcwd()
        os.chdir(self.folder)
        try:
            code: int = main(list(arguments), Interruptible())  # signals are those of the demo
            return code
        finally:
            os.chdir(before)

    def _conclude(self, kept: bool) -> int:
        hits = json.loads((self.folder / "hits.json").read_text(encoding="utf-8"))
        top = hits["queries"][0]["top"][:TOP_K]
        planted = sum(bool(hit["example"]["poisoned"]) for hit in top)
        self._say(f"{planted} of the top {TOP_K} were planted.", style="bold")
        spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        self._say(f"Time: {spent}; {sum(self.seconds.values()):.0f} s in all.")
        if kept:
            self._say(f"All files are kept in {self.folder}; the two commands above work in there.")
            self._say("Next, in that folder:")
            self._say("  rapidin query cache --data query.jsonl --report page.html   # the hits as a page")
            self._say(
                "  rapidin serve cache                                         # ask and look in a browser"
            )
        if planted < ENOUGH:
            self._say(f"The demo failed: fewer than {ENOUGH} of the top {TOP_K} were planted.")
            return 1
        self._say("With your own model and data:")
        self._say("  rapidin cache MODEL --adapter ADAPTER --data train.jsonl --out CACHE")
        self._say('  rapidin query CACHE --ask "what you asked it"')
        return 0

    # ------------------------------------------------------------------------------------------ helpers

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()


def _quiet() -> None:
    """Suppress transformers' warnings to programmers, and its progress bars for loading a small model."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _prompts(rows: list[dict[str, Any]]) -> list[str]:
    from rapidin.data.encoding import alpaca_prompt

    return [alpaca_prompt(row["instruction"], row["input"]) for row in rows]


def _encode(tokenizer: Any, rows: list[dict[str, Any]]) -> list[Any]:
    from rapidin.data.encoding import Encoder

    encoder = Encoder(tokenizer, max_length=tokenizer.model_max_length)
    return [encoder(row) for row in rows]
