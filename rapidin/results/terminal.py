"""What a person sees: hits as a table, a cache in a few lines, progress; and JSON for programs.

Texts come from data and models and are never trusted: rich markup in them is not interpreted, and control
characters and escape sequences are shown, not sent to the terminal.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from typing_extensions import Self

    from rapidin.attribution.attributor import Progress
    from rapidin.attribution.plan import Plan
    from rapidin.results.types import Group as ByColumn
    from rapidin.results.types import Hit, QueryResult

MEANING = (
    "Positive: training on the example made this generation more likely (helpful). "
    "Negative: it made it less likely (harmful)."
)
SCALES = {
    "layer": "the mean over the layers of the cosine between the two loss gradients, from -1 to 1",
    "cosine": "the cosine between the two loss gradients, from -1 to 1",
    "none": (
        "the dot product of the two loss gradients: to first order, how far one training step on the example "
        "lowers the generation's loss, per unit of learning rate"
    ),
}

METHODS = {
    "datainf": "the inner product, under DataInf's inverse Hessian,",
    "fisher": "the inner product, under the damped inverse of each layer's second moment,",
}

# Control characters, half characters, line separators, and the marks and overrides that reorder text.
STEERING = "\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_STEERING = re.compile(f"[{STEERING}]")
_PROMPT_LINES = 4
_COMPLETION_LINES = 6


def console(file: TextIO) -> Console:
    """A console that writes plain text where `file` is no terminal or NO_COLOR is set."""
    made = _Console(file=file, highlight=False, markup=False, emoji=False)
    if made.no_color or not made.is_terminal:
        made = _Console(file=file, highlight=False, markup=False, emoji=False, color_system=None)
    return made


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # the command line decides what a closed pipe means


def one_line(text: str) -> str:
    """The text on one line: runs of white space become a space, what could steer a terminal an escape."""
    return escaped(" ".join(text.split()))


def escaped(text: str) -> str:
    """The text with line breaks and tabs as spaces, and an escape for what could steer a terminal."""
    return _STEERING.sub(escape, text.translate(_BREAKS))


_BREAKS = str.maketrans("\t\n\r", "   ")


def escape(match: re.Match[str]) -> str:
    """A character that must not act, as the escape by which Python writes it."""
    code = ord(match[0])
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def shorten(text: str, cells: int, ellipsis: str = "…") -> str:
    """The text cut at the end to at most so many terminal cells."""
    if cell_len(text) <= cells:
        return text
    return set_cell_size(text, max(0, cells - cell_len(ellipsis))).rstrip() + ellipsis


def shorten_middle(text: str, cells: int) -> str:
    """The text with its middle left out, in at most so many terminal cells."""
    if cell_len(text) <= cells:
        return text
    half = max(0, cells - len(" ... ")) // 2
    head, tail = set_cell_size(text, half), set_cell_size(text[::-1], half)[::-1]
    return f"{head.rstrip()} ... {tail.lstrip()}"


class _Example:
    """A training example on one line of any width: prompt, arrow, completion, both shortened."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.prompt, self.completion = (one_line(part) for part in record_parts(record))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(20, max(20, cell_len(self.prompt) + 4 + cell_len(self.completion)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        arrow, ellipsis = (" -> ", "...") if options.ascii_only else (" → ", "…")
        width = options.max_width
        if not (self.prompt and self.completion):
            yield Text(shorten(self.prompt or self.completion, width, ellipsis), no_wrap=True)
            return
        room = width - len(arrow)
        # Each side has half of the room, and what the other leaves of its half.
        first = max(room // 2, room - cell_len(self.completion))
        second = max(room - room // 2, room - cell_len(self.prompt))
        yield Text.assemble(
            shorten(self.prompt, first, ellipsis),
            (arrow, "dim"),
            (shorten(self.completion, second, ellipsis), "cyan"),
            no_wrap=True,
        )


def record_parts(record: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt and the completion of a record, without the forms they are put in for the model."""
    if record.get("prompt") is not None and record.get("completion") is not None:
        return str(record["prompt"]), str(record["completion"])
    if record.get("instruction") is not None and record.get("output") is not None:
        return f"{record['instruction']} {record.get('input') or ''}", str(record["output"])
    messages = record.get("messages")
    if messages:
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        last = answers[-1] if answers else len(messages)
        asked = messages[last - 1]["content"] if last else ""
        return str(asked), str(messages[last]["content"]) if answers else ""
    return str(record.get("text", "")), ""


# ------------------------------------------------------------------------------------------------- hits


def hits_report(results: Sequence[QueryResult], *, width: int = 80) -> RenderableType:
    """Every query with its most helpful and most harmful training examples, and what the scores mean.

    width: of the terminal, which decides how much of a long prompt or completion is shown.
    """
    parts: list[RenderableType] = []
    for number, result in enumerate(results, 1):
        if len(results) > 1:
            title = Text(f"Query {number} of {len(results)}", style="bold underline")
            parts.append(Padding(title, (int(number > 1), 0, 0, 0)))
        parts.append(_generation(result, width))
        if not result.top:
            parts.append(Text("\nNo example in the cache has a sketch, so there are no hits.\n"))
            continue
        bounded = result.bounded
        if result.targets:
            parts.append(targets_table(result, bounded=bounded))
        parts.append(hits_table("Most helpful", result.top, bounded=bounded))
        parts.append(hits_table("Most harmful", result.bottom, bounded=bounded))
        if result.by is not None:
            parts.append(_Groups(result.by, result.groups))
    if results:
        parts.append(Text(f"\n{MEANING}\nThe score is {scale_text(results[0])}.", style="dim"))
        parts.append(_Notes(results))
    return Group(*parts)


def _generation(result: QueryResult, width: int) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    room = max(20, width - 12)
    if result.together:
        grid.add_row("Target", Text(f"{result.together:,} generations, the mean of their scores"))
        return grid
    if result.prompt:
        grid.add_row("Prompt", Text(shorten_middle(one_line(result.prompt), room * _PROMPT_LINES)))
    completion = Text(shorten_middle(one_line(result.completion), room * _COMPLETION_LINES), style="cyan")
    grid.add_row("Completion", shaded(result) or completion)
    if result.generated:
        grid.add_row("", Text("(written by the model just now)", style="dim"))
    return grid


def _titled(title: str, *, expand: bool = False) -> Table:
    """A table without columns yet, as all below a title are."""
    return Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        expand=expand,
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
    )


def _ink(score: float) -> str:
    """The style of a helpful score, or of a harmful one."""
    return "green" if score > 0 else "red" if score < 0 else ""


_SHADES = {  # backgrounds with an ink that can be read on them, from weak to strong
    1: ("black on #d9e8f6", "black on #a9cbea", "black on #6fa8dc", "white on #2f6fb0"),
    -1: ("black on #fbe3d3", "black on #f6bd96", "black on #ee9357", "white on #b4541a"),
}


def shaded(result: QueryResult) -> Text | None:
    """The completion, each token shaded by its influence; None where not each was asked about."""
    places = [target.places for target in result.targets]
    if not places or places != [(n,) for n in range(len(result.pieces))]:
        return None
    most = max(abs(target.influence) for target in result.targets)
    text = Text()
    for piece, target in zip(result.pieces, result.targets, strict=True):
        share = abs(target.influence) / most if most else 0.0
        shades = _SHADES[1 if target.influence > 0 else -1]
        # The eye is to tell a tenth of the strongest from nothing.
        step = math.ceil(len(shades) * math.sqrt(share) - 0.5)
        text.append(escaped(piece), style=shades[step - 1] if step > 0 else "")
    return text


_MOST_TARGETS = 12


def targets_table(result: QueryResult, *, bounded: bool) -> RenderableType:
    """The parts of a generation, the most influential of them where there are many: what each brings to the
    scores of the most helpful examples, and the example that it comes from most."""
    strongest = sorted(result.targets, key=lambda target: (-abs(target.influence), target.places))
    chosen = set(map(id, strongest[:_MOST_TARGETS]))
    shown = [target for target in result.targets if id(target) in chosen]
    title = "Parts of the completion"
    if len(shown) < len(result.targets):
        title += f", the {len(shown)} most influential of {len(result.targets):,}"
    total = sum(hit.score for hit in result.top) / max(1, len(result.top))
    table = _titled(title)
    table.add_column("part", no_wrap=True, max_width=32)
    for name in ("influence", "share", "best index", "its score"):
        table.add_column(name, justify="right", no_wrap=True)
    for target in shown:
        best = target.top[0] if target.top else None
        table.add_row(
            shorten(one_line(target.text) or repr(target.text), 32),
            Text(score_text(target.influence, bounded), style=_ink(target.influence)),
            f"{target.influence / total:.0%}" if total else "",
            "" if best is None else str(best.index),
            "" if best is None else score_text(best.score, bounded),
        )
    return Padding(table, (1, 0, 0, 0))


_MOST_WORDS = 5


def words_text(hit: Hit) -> str:
    """The words that contribute most to a hit's score, with their shares in it."""
    assert hit.tokens is not None
    # Of many tokens each has its part, so the same word's places count together.
    total: dict[str, float] = {}
    for word, value in hit.tokens.words():
        total[word] = total.get(word, 0.0) + value
    sign = -1 if hit.score < 0 else 1
    best = sorted(total.items(), key=lambda item: -sign * item[1])[:_MOST_WORDS]
    return ", ".join(
        f"{one_line(word)} {value / hit.score:.0%}" for word, value in best if value * hit.score > 0
    )


def scale_text(result: QueryResult) -> str:
    """What its scores are, as the end of a sentence."""
    if result.method == "dot":
        return SCALES[result.normalize]
    vectors = {
        "layer": "gradients of length 1 in each layer",
        "cosine": "gradients of length 1",
        "none": "gradients",
    }
    of = f"of the two loss {vectors[result.normalize]}"
    return f"{METHODS[result.method]} {of}: only the order means something"


def hits_table(title: str, hits: Sequence[Hit], *, bounded: bool) -> RenderableType:
    """Hits with their scores and examples; bounded: scores lie between -1 and 1."""
    return Padding(_Hits(title, hits, bounded), (1, 0, 0, 0))


_ROOM_FOR_ERRORS, _ROOM_FOR_MORE = 60, 80  # cells of a terminal


class _Hits:
    """A table of hits on a terminal of any width and encoding."""

    def __init__(self, title: str, hits: Sequence[Hit], bounded: bool) -> None:
        self._title, self._hits, self._bounded = title, hits, bounded

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        hits, signs = self._hits, _signs(options)
        wide = options.max_width >= _ROOM_FOR_MORE
        sure = options.max_width >= _ROOM_FOR_ERRORS and any(hit.error is not None for hit in hits)
        columns: dict[str, list[str]] = {
            "rank": [f"{signs['tied'] if hit.tied else ''}{hit.rank}" for hit in hits],
            "score": [score_text(hit.score, self._bounded) for hit in hits],
        }
        if sure:
            errors = [error_text(hit.error, self._bounded) for hit in hits]
            longest = max(map(len, errors))
            columns["score"] = [
                f"{score} {signs['error']} {error.rjust(longest)}" if error else f"{score}{'':{longest + 3}}"
                for score, error in zip(columns["score"], errors, strict=True)
            ]
        columns["index"] = [str(hit.index) for hit in hits]
        if wide and any(hit.copies for hit in hits):
            counts = [1 + len(hit.copies) + hit.copies_more for hit in hits]
            columns["alike"] = [f"{signs['times']}{count:,}" if count > 1 else "" for count in counts]
        for name in dict.fromkeys(name for hit in hits for name in hit.standings) if wide else ():
            ranks = [hit.standings[name].rank if name in hit.standings else None for hit in hits]
            columns["\n".join(one_line(name).split())] = ["" if r is None else f"#{r:,}" for r in ranks]
        yield self._table(columns)

    def _table(self, columns: Mapping[str, Sequence[str]]) -> Table:
        shown = any(hit.example is not None for hit in self._hits)
        table = _titled(self._title, expand=shown)
        for name, cells in columns.items():
            width = max(map(len, (*name.split("\n"), *cells)))
            table.add_column(name, justify="right", no_wrap=True, width=width)
        if shown:
            table.add_column("example", no_wrap=True, ratio=1)
        for hit, cells in zip(self._hits, zip(*columns.values(), strict=True), strict=True):
            example: list[RenderableType] = [_Example(hit.example or {})] if shown else []
            if shown and hit.tokens is not None:
                words = Text(f"by {words_text(hit)}", style="dim", no_wrap=True, overflow="ellipsis")
                example = [Group(*example, words)]
            rank, score, *others = cells
            table.add_row(rank, Text(score, style=_ink(hit.score)), *others, *example)
        return table


def _signs(options: ConsoleOptions) -> dict[str, str]:
    """What stands for a few words in a table."""
    if options.ascii_only:
        return {"tied": "~", "error": "+/-", "times": "x", "bar": "#"}
    return {"tied": "≈", "error": "±", "times": "×", "bar": "█"}


class _Notes:
    """What the signs in the tables of these results mean."""

    def __init__(self, results: Sequence[QueryResult]) -> None:
        self._results = results

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        hits = [hit for result in self._results for hit in (*result.top, *result.bottom)]
        signs, notes = _signs(options), []
        wide = options.max_width >= _ROOM_FOR_MORE
        if options.max_width >= _ROOM_FOR_ERRORS and any(hit.error is not None for hit in hits):
            notes.append(f"{signs['error']} is the standard error of the sketch's estimate.")
        if any(hit.tied for hit in hits):
            notes.append(f"{signs['tied']}: the sketch cannot tell this one from the one before it.")
        if wide and any(hit.copies for hit in hits):
            notes.append(f"{signs['times']}3: three examples that say the same, the first of them shown.")
        for number, result in enumerate(self._results, 1):
            where = f"Query {number}: of" if len(self._results) > 1 else "Of"
            for name, count in result.overlaps.items():
                best = len(result.top)
                notes.append(f"{where} the top {best}, {one_line(name)} has {count} among its own {best}.")
        if notes:
            yield Text("\n".join(notes), style="dim")


_MOST_GROUPS = 12


class _Groups:
    """The values of a column with the sums of their scores, and bars for their shares."""

    def __init__(self, by: str, groups: Sequence[ByColumn]) -> None:
        self._by, self._groups = by, groups

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        largest = sorted(self._groups, key=lambda g: (-max(g.helpful, g.harmful), g.value))[:_MOST_GROUPS]
        chosen = set(map(id, largest))
        ellipsis = "..." if options.ascii_only else "…"
        title = f"By {shorten(one_line(self._by), 24, ellipsis)}"
        if len(chosen) < len(self._groups):
            title += f", the {len(chosen)} with the largest shares of {len(self._groups):,}"
        bar = _signs(options)["bar"]
        wide = options.max_width >= _ROOM_FOR_MORE
        cells = 6 if wide else 0

        def share(part: float) -> str:
            return f"{bar * round(part * cells):>{cells}} {part:>4.0%}".lstrip() if part else ""

        table = _titled(title)
        room = 20 if wide else 10
        table.add_column("value", no_wrap=True, max_width=room)
        for name in ("examples", *(("sum", "mean") if wide else ()), "helpful", "harmful"):
            table.add_column(name, justify="right", no_wrap=True, overflow="crop")
        for group in self._groups:
            if id(group) not in chosen:
                continue
            table.add_row(
                shorten(one_line(group.value) or repr(group.value), room, ellipsis),
                f"{group.count:,}",
                *((f"{group.total:+.3g}", f"{group.total / max(1, group.count):+.2g}") if wide else ()),
                Text(share(group.helpful), style="green"),
                Text(share(group.harmful), style="red"),
            )
        yield Padding(table, (1, 0, 0, 0))


def error_text(error: float | None, bounded: bool) -> str:
    """A standard error, "" for none: four decimals where the scale is -1 to 1, else two digits."""
    if error is None:
        return ""
    return f"{error:.4f}" if bounded else f"{error:.1e}"


def score_text(score: float, bounded: bool) -> str:
    """A score with its sign: four decimals where the scale is -1 to 1, else four digits."""
    return f"{score:+.4f}" if bounded else f"{score:+.3e}"


def results_json(results: Iterable[QueryResult]) -> str:
    """All queries as one JSON object, in ASCII; a score that is no finite number becomes null."""
    return json.dumps({"queries": [_finite(result.to_json()) for result in results]}, indent=1, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------ cache


def info_report(info: Mapping[str, Any]) -> RenderableType:
    """What `Cache.info()` says, in a few lines."""
    model, sketch, gradient = info["model"]["source"], info["sketch"], info["gradient"]
    data, text = info["data"], info["text"]
    points = " and ".join(f"{point:g}" for point in gradient["at"])
    where = f"at {points} of the way from the base (0) to the tuned model (1)"
    if gradient["at"] == [1.0]:
        where = "at the model itself"
    progress = "all examples are there"
    if not info["complete"]:
        progress = (
            f"unfinished: {info['rows']:,} of {info['rows_wanted']:,}; the same 'rapidin cache' goes on"
        )
    lines = [
        ("cache", info["path"]),
        ("", progress),
        ("model", model.get("model") or "in memory"),
        ("adapter", model.get("adapter")),
        ("base", model.get("base")),
        ("data", f"{_named(data.get('path'))} ({data.get('form')} form)" if data else None),
        ("examples", counts_text(info["counts"])),
        ("gradients", f"taken {where}, {gradient['loss']} loss over the tokens"),
        ("geometry", info.get("geometry")),
        ("included", ", ".join(gradient["include"])),
        ("excluded", ", ".join(gradient["exclude"])),
        (
            "texts",
            f"at most {text['max_length']:,} tokens, longer ones {_TOO_LONG[text['too_long']]}{_eos(text)}",
        ),
        (
            "sketch",
            f"{info['layers']:,} blocks of {sketch['width']:,}: {info['dim']:,} numbers, "
            f"{sketch['projection']} projection, seed {sketch['seed']}",
        ),
        ("kept", kept_text(info)),
        ("size", size_text(info["bytes"], info["bytes_per_example"], info["shards"])),
    ]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in lines:
        if value:
            grid.add_row(name, Text(one_line(str(value))))
    return grid


def _named(path: str | Sequence[str] | None) -> str:
    return "in memory" if path is None else path if isinstance(path, str) else " and ".join(path)


_TOO_LONG = {"truncate": "are cut", "skip": "are skipped"}


def _eos(text: Mapping[str, Any]) -> str:
    return ", end-of-text token added" if text["eos"] else ", no end-of-text token added"


_COUNTS = {
    "empty": "empty",
    "no_target": "without a completion token",
    "too_long": "skipped as too long",
    "nonfinite": "with NaN or Inf gradients",
    "malformed": "malformed",
    "too_large": "too large for the memory",
}


def plan_report(plan: Plan) -> RenderableType:
    """What caching would take, a line a code."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("kept as", no_wrap=True)
    for name in ("an example", "all", "a scan", "memory to learn"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in plan.rows:
        learning = bytes_text(row.learnt) if row.learnt else ""
        table.add_row(row.name, bytes_text(row.example), bytes_text(row.all), time_text(row.scan), learning)
    head = (
        f"{plan.examples:,} examples of {plan.tokens:,.0f} tokens, "
        f"{plan.layers:,} blocks of {plan.width:,} bins: "
        f"about {time_text(plan.seconds)} to cache, {bytes_text(plan.memory)} of memory"
    )
    note = "A scan: one query over all examples in memory. How true each code is: docs/fidelity.md"
    return Group(Text(head), Text(), table, Text(), Text(note, style="dim"))


def kept_text(info: Mapping[str, Any]) -> str:
    """How a cache keeps its sketches."""
    code, packing = info["code"], info["packing"]
    if packing is None:
        return f"in {code['dtype']}" + (f", {code['bytes']:,} bytes an example" if code["bytes"] else "")
    shape, parts = packing["shape"], []
    if shape["head"]:
        parts.append(f"{shape['head']:,} directions of all layers in int8")
    if sum(shape["tail"]):
        parts.append(f"{sum(shape['tail']):,} of single layers in one bit")
    if sum(shape["rest"]):
        rest = "other numbers" if parts else "numbers"
        parts.append(
            f"{sum(shape['rest']):,} {rest} in {'one bit' if shape['dtype'] == 'sign' else shape['dtype']}"
        )
    text = ", ".join(parts)
    if packing["file"]:
        sample = f"{packing['statistics'].get('sample', 0):,.0f}"
        text += f"; learnt from {sample} examples ({bytes_text(packing['bytes'])} for all)"
    return text


def counts_text(counts: Mapping[str, int]) -> str:
    """How many examples have a sketch, and why the others have none."""
    parts = [f"{counts.get('ok', 0):,} with a sketch"]
    parts += [f"{counts[key]:,} {words}" for key, words in _COUNTS.items() if counts.get(key)]
    if counts.get("truncated"):
        parts.append(f"{counts['truncated']:,} cut to fit")
    if counts.get("unlike_sample"):
        parts.append(f"{counts['unlike_sample']:,} unlike the sample that the code learnt from")
    return ", ".join(parts)


def size_text(total: int, each: float | None, shards: int) -> str:
    """Bytes of a cache and of an example."""
    what = f"{bytes_text(total)} in {shards:,} shard{'s' * (shards != 1)}"
    return what if each is None else f"{what}, {bytes_text(each)} an example"


def bytes_text(number: float) -> str:
    """Bytes in the unit that leaves up to three digits before the point."""
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


# --------------------------------------------------------------------------------------------- progress


class _Shown:
    """A bar that is on the terminal inside a `with` block."""

    _bar: Bar

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class CachingBar(_Shown):
    """Shows how far caching is: examples/s, tokens/s and time left; call it with each `Progress`.

    Silent where the console is no terminal. last: the latest progress; seconds: time since the first.
    """

    def __init__(self, console: Console) -> None:
        self.last: Progress | None = None
        self._started = time.perf_counter()
        self._console = console
        self._bar = Bar(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            TextColumn("{task.fields[rates]}", table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("caching", total=None, rates="")

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def __call__(self, progress: Progress) -> None:
        if self.last is None:
            self._started = time.perf_counter()
            if self._console.is_terminal and progress.resumed:
                self._bar.console.print(
                    f"{progress.resumed:,} of {progress.total:,} examples were cached before; going on"
                )
        self.last = progress
        if progress.message and self._console.is_terminal:
            self._bar.console.print(one_line(progress.message))
        rates = f"{progress.done:,}/{progress.total:,}"
        here = progress.done - progress.resumed
        if here and self.seconds > 0:
            each = self.seconds / here
            rates += f" · {1 / each:,.1f} examples/s · {progress.tokens / self.seconds:,.0f} tokens/s"
            rates += f" · {time_text(each * (progress.total - progress.done))} left"
        self._bar.update(self._task, completed=progress.done, total=progress.total, rates=rates)


class BytesBar(_Shown):
    """Shows how many bytes have been read; call it with (done, total). Silent where there is no terminal."""

    def __init__(self, console: Console, label: str) -> None:
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=None)

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)


def time_text(seconds: float) -> str:
    """Seconds as a person says them: 25 ms, 4.5 s, 45 s, 3:20 min, 2:05 h."""
    if seconds < 0.95:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d} h"
