"""Results on a terminal: the generation, tables of hits, of parts and of groups, and notes on their signs.

Texts of data and models are untrusted: rich markup in them is not interpreted, and control characters and
escape sequences are shown as text instead of sent to the terminal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rapidin.results.confirmation import SURE
from rapidin.results.sinks import sinks_of, without_sinks
from rapidin.results.text import (
    FUSED_MEANING,
    MEANING,
    NET,
    capital,
    decoys_note,
    error_text,
    escaped,
    has_shares,
    no_row_text,
    one_line,
    overlap_text,
    percent_text,
    rank_texts,
    ranks_meaning,
    scale_text,
    score_text,
    share_text,
    shorten,
    shorten_middle,
    title_text,
)
from rapidin.results.types import join_words

if TYPE_CHECKING:
    from rapidin.results.confirmation import Confirmation
    from rapidin.results.decoys import DecoyTest
    from rapidin.results.fusion import Fused
    from rapidin.results.types import Group as ByColumn
    from rapidin.results.types import Hit, QueryResult
    from rapidin.results.verdict import Verdict


_PROMPT_LINES = 4
_COMPLETION_LINES = 6


def make_console(file: TextIO) -> Console:
    """A console that writes plain text if `file` is not a terminal or NO_COLOR is set."""
    console = _Console(file=file, highlight=False, markup=False, emoji=False)
    if console.no_color or not console.is_terminal:
        console = _Console(file=file, highlight=False, markup=False, emoji=False, color_system=None)
    return console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # the command line handles a closed pipe


_WIDTH_FOR_ONE_LINE = 64


class _Example:
    """A training example: prompt, arrow, completion, both shortened to fit on one line, or on one line each
    if that is narrow."""

    def __init__(self, hit: Hit) -> None:
        self.prompt, self.completion = (one_line(text) for text in hit.parts)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(20, max(20, cell_len(self.prompt) + 4 + cell_len(self.completion)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        arrow, ellipsis = (" -> ", "...") if options.ascii_only else (" → ", "…")
        width = options.max_width
        if not (self.prompt and self.completion):
            yield Text(shorten(self.prompt or self.completion, width, ellipsis), no_wrap=True)
            return
        whole = cell_len(self.prompt) + len(arrow) + cell_len(self.completion)
        if whole > width and width < _WIDTH_FOR_ONE_LINE:
            yield Text(shorten(self.prompt, width, ellipsis), no_wrap=True)
            arrow = arrow.lstrip()
            completion = shorten(self.completion, max(1, width - len(arrow)), ellipsis)
            yield Text.assemble((arrow, "dim"), (completion, "cyan"), no_wrap=True)
            return
        room = width - len(arrow)
        # Each side gets half of the room, and what the other does not use of its half.
        first = max(room // 2, room - cell_len(self.completion))
        second = max(room - room // 2, room - cell_len(self.prompt))
        yield Text.assemble(
            shorten(self.prompt, first, ellipsis),
            (arrow, "dim"),
            (shorten(self.completion, second, ellipsis), "cyan"),
            no_wrap=True,
        )


class _Ranks:
    """The ranks of a hit in the rankings that were fused, as many on a line as fit."""

    def __init__(self, fused: Fused) -> None:
        self._parts = [one_line(part) for part in rank_texts(fused)]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(20, max(20, cell_len(", ".join(self._parts))))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        lines = [""]
        for part in self._parts:
            joined = f"{lines[-1]}, {part}" if lines[-1] else part
            if lines[-1] and cell_len(joined) > options.max_width:
                lines.append(part)
            else:
                lines[-1] = joined
        for line in lines:
            yield Text(line, style="dim", no_wrap=True, overflow="ellipsis")


def hits_report(results: Sequence[QueryResult], *, width: int = 80) -> RenderableType:
    """Every query with its most helpful and most harmful training examples, and what the scores mean.

    width: of the terminal; it limits how much of a long prompt or completion is shown.
    """
    report: list[RenderableType] = []
    for number, result in enumerate(results, 1):
        if len(results) > 1:
            title = Text(f"Query {number} of {len(results)}", style="bold underline")
            report.append(Padding(title, (int(number > 1), 0, 0, 0)))
        report.append(_generation(result, width))
        tested = result.decoys
        if not (result.top or result.bottom or (tested is not None and any(tested.listed))):
            report.append(Text("\nNo example in the cache has a sketch, so there are no hits.\n"))
            continue
        bounded = result.bounded
        if result.targets:
            report.append(targets_table(result, bounded=bounded))
        for helpful, hits in ((True, result.helpful), (False, result.harmful)):
            name = title_text(result, helpful=helpful)
            none = none_of(name, helpful=helpful, decoys=tested)
            report.append(hits_table(name, hits, bounded=bounded) if hits else none)
        if tested is not None and tested.sentence:
            report.append(Text(f"\n{tested.sentence}"))
        if result.by is not None:
            report.append(_Groups(result.by, result.groups))
        if result.verdict is not None:
            report.append(_verdict(result.verdict))
        if result.confirmation is not None:
            report.append(_confirmation(result.confirmation, width))
    if results:
        report.append(Text(f"\n{MEANING}\nThe score is {scale_text(results[0])}.", style="dim"))
        report.append(_Notes(results))
    return Group(*report)


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
        grid.add_row("", Text("(generated)", style="dim"))
    return grid


def none_of(title: str, *, helpful: bool, decoys: DecoyTest | None = None) -> RenderableType:
    """What stands in the place of the table of hits of a sign that no row has, or none that passes."""
    text = no_row_text(helpful=helpful, decoys=decoys)
    return Padding(Text.assemble((title, "bold"), f"\n{text}"), (1, 0, 0, 0))


_STRENGTHS = {"strong": "bold green", "weak": "bold yellow", "nothing": "bold", "unknown": "dim"}


def _verdict(verdict: Verdict) -> RenderableType:
    """The verdict, what the hits have in common and what to do next."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("Verdict", Text(one_line(verdict.sentence), style=_STRENGTHS[verdict.strength]))
    if verdict.common:
        grid.add_row("In common", Text(one_line(verdict.common_text)))
    if verdict.next_step:
        grid.add_row("Next", Text(verdict.next_step))
    return Padding(grid, (1, 0, 0, 0))


def _titled(title: str, *, expand: bool = False) -> Table:
    """A table with a title and no columns yet, in the style of all tables of a report."""
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


def _color(score: float) -> str:
    """The style of a score: green if helpful, red if harmful."""
    return "green" if score > 0 else "red" if score < 0 else ""


_SHADES = {  # background colors from weak to strong, each with a readable text color
    1: ("black on #d9e8f6", "black on #a9cbea", "black on #6fa8dc", "white on #2f6fb0"),
    -1: ("black on #fbe3d3", "black on #f6bd96", "black on #ee9357", "white on #b4541a"),
}


def shaded(result: QueryResult) -> Text | None:
    """The completion, each token shaded by its influence; None unless each token is a target."""
    positions = [target.positions for target in result.targets]
    if not positions or positions != [(n,) for n in range(len(result.pieces))]:
        return None
    most = max(abs(target.influence) for target in result.targets)
    text = Text()
    for piece, target in zip(result.pieces, result.targets, strict=True):
        share = abs(target.influence) / most if most else 0.0
        shades = _SHADES[1 if target.influence > 0 else -1]
        # The square root makes a tenth of the strongest visible.
        step = math.ceil(len(shades) * math.sqrt(share) - 0.5)
        text.append(escaped(piece), style=shades[step - 1] if step > 0 else "")
    return text


_MAX_TARGETS = 12


def targets_table(result: QueryResult, *, bounded: bool) -> RenderableType:
    """The parts of a generation, or the most influential of many: the influence of each (its part of the
    scores
    of the most helpful examples), and its own most helpful example."""
    strongest = sorted(result.targets, key=lambda target: (-abs(target.influence), target.positions))
    largest = set(map(id, strongest[:_MAX_TARGETS]))
    shown = [target for target in result.targets if id(target) in largest]
    title = "Parts of the completion"
    if len(shown) < len(result.targets):
        title += f", the {len(shown)} most influential of {len(result.targets):,}"
    total = sum(hit.score for hit in result.helpful) / max(1, len(result.helpful))
    shared = has_shares(total, [target.influence for target in result.targets])
    table = _titled(title)
    table.add_column("part", no_wrap=True, max_width=32)
    for name in ("influence", "share", "best index", "best score"):
        table.add_column(name, justify="right", no_wrap=True)
    for target in shown:
        best = target.top[0] if target.top else None
        table.add_row(
            shorten(one_line(target.text) or repr(target.text), 32),
            Text(score_text(target.influence, bounded), style=_color(target.influence)),
            percent_text(target.influence / total) if shared else "",
            "" if best is None else str(best.index),
            "" if best is None else score_text(best.score, bounded),
        )
    return Padding(table, (1, 0, 0, 0))


_MAX_WORDS = 5


def words_text(hit: Hit, sinks: frozenset[int] = frozenset({0})) -> str:
    """The words that contribute most to a hit's score, with their shares of it; sinks: positions of tokens
    that are left out."""
    assert hit.tokens is not None
    # The contributions of all occurrences of a word are added up.
    total: dict[str, float] = {}
    for word, value in join_words(hit.tokens.pieces, without_sinks(hit.tokens, sinks)):
        total[word] = total.get(word, 0.0) + value
    sign = -1 if hit.score < 0 else 1
    best = sorted(total.items(), key=lambda item: -sign * item[1])[:_MAX_WORDS]
    shared = has_shares(hit.score, hit.tokens.contributions)
    return ", ".join(
        f"{one_line(word)} {percent_text(value / hit.score)}" if shared else one_line(word)
        for word, value in best
        if value * hit.score > 0
    )


def hits_table(title: str, hits: Sequence[Hit], *, bounded: bool) -> RenderableType:
    """Hits with their scores and examples; bounded: as of a result."""
    return Padding(_Hits(title, hits, bounded), (1, 0, 0, 0))


# The terminal widths from which errors, and copies and baselines, have a column.
_WIDTH_FOR_ERRORS, _WIDTH_FOR_MORE = 60, 80


class _Hits:
    """A table of hits on a terminal of any width and encoding."""

    def __init__(self, title: str, hits: Sequence[Hit], bounded: bool) -> None:
        self._title, self._hits, self._bounded = title, hits, bounded

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        hits, signs = self._hits, _signs(options)
        wide = options.max_width >= _WIDTH_FOR_MORE
        with_errors = options.max_width >= _WIDTH_FOR_ERRORS and any(hit.error is not None for hit in hits)
        columns: dict[str, list[str]] = {
            "rank": [f"{signs['tied'] if hit.tied else ''}{hit.rank}" for hit in hits],
            "score": self._scores(signs["error"] if with_errors else None),
            "index": [str(hit.index) for hit in hits],
        }
        if wide and any(hit.p is not None for hit in hits):
            columns |= {"p": [share_text(hit.p) for hit in hits], "q": [share_text(hit.q) for hit in hits]}
        if wide and any(hit.copies for hit in hits):
            counts = [1 + len(hit.copies) + hit.copies_more for hit in hits]
            columns["copies"] = [f"{signs['times']}{count:,}" if count > 1 else "" for count in counts]
        fused = [hit.fused for hit in hits if hit.fused is not None]
        if fused:
            columns["fused"] = [f"{each.score:.4f}" for each in fused]
        standings = dict.fromkeys(name for hit in hits for name in hit.standings)
        for name in standings if wide and not fused else ():
            ranks = [hit.standings[name].rank if name in hit.standings else None for hit in hits]
            columns["\n".join(one_line(name).split())] = ["" if r is None else f"#{r:,}" for r in ranks]
        yield self._table(columns)

    def _scores(self, sign: str | None) -> list[str]:
        """The scores of all hits, with errors after `sign` unless that is None."""
        scores = [score_text(hit.score, self._bounded) for hit in self._hits]
        if sign is None:
            return scores
        errors = [error_text(hit.error, self._bounded) for hit in self._hits]
        longest = max(map(len, errors))
        return [
            f"{score} {sign} {error.rjust(longest)}" if error else f"{score}{'':{longest + 3}}"
            for score, error in zip(scores, errors, strict=True)
        ]

    def _table(self, columns: Mapping[str, Sequence[str]]) -> Table:
        shown = any(hit.example is not None for hit in self._hits)
        sinks = sinks_of(self._hits)
        table = _titled(self._title, expand=shown)
        for name, cells in columns.items():
            width = max(map(len, (*name.split("\n"), *cells)))
            table.add_column(name, justify="right", no_wrap=True, width=width)
        if shown:
            table.add_column("example", no_wrap=True, ratio=1)
        for hit, cells in zip(self._hits, zip(*columns.values(), strict=True), strict=True):
            example: list[RenderableType] = [_Example(hit)] if shown else []
            if shown and hit.fused is not None:
                example += [_Ranks(hit.fused)]
            if shown and hit.tokens is not None:
                words = Text(f"by {words_text(hit, sinks)}", style="dim", no_wrap=True, overflow="ellipsis")
                example += [words]
            rank, score, *others = cells
            table.add_row(
                rank, Text(score, style=_color(hit.score)), *others, *([Group(*example)] if shown else [])
            )
        return table


def _signs(options: ConsoleOptions) -> dict[str, str]:
    """The signs in tables, in ASCII if the terminal has no more."""
    if options.ascii_only:
        return {"tied": "~", "error": "+/-", "times": "x", "bar": "#"}
    return {"tied": "≈", "error": "±", "times": "×", "bar": "█"}


class _Notes:
    """The meaning of the signs in the tables of these results, and the overlap with baselines."""

    def __init__(self, results: Sequence[QueryResult]) -> None:
        self._results = results

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        hits = [hit for result in self._results for hit in (*result.helpful, *result.harmful)]
        signs, notes = _signs(options), []
        wide = options.max_width >= _WIDTH_FOR_MORE
        if options.max_width >= _WIDTH_FOR_ERRORS and any(hit.error is not None for hit in hits):
            notes.append(f"{signs['error']} is the standard error of the sketch's estimate.")
        if any(hit.tied for hit in hits):
            notes.append(f"{signs['tied']}: tied with the previous hit, within error.")
        if wide and any(hit.copies for hit in hits):
            notes.append(f"{signs['times']}3: three examples with the same text, of which the best is shown.")
        depths = {result.fusion.depth for result in self._results if result.fusion is not None}
        if depths:
            notes += [FUSED_MEANING, ranks_meaning(max(depths))]
        tested = next((result.decoys for result in self._results if result.decoys is not None), None)
        if wide and tested is not None and any(hit.p is not None for hit in hits):
            notes.append(decoys_note(tested))
        for number, result in enumerate(self._results, 1):
            prefix = f"Query {number}: " if len(self._results) > 1 else ""
            if result.fusion is not None:
                notes.append(f"{prefix}{capital(result.fusion.sentence)}.")
            for name, count in result.overlaps.items():
                notes.append(f"{prefix}{overlap_text(one_line(name), count, result)}.")
        if notes:
            yield Text("\n".join(notes), style="dim")


_MAX_GROUPS = 12


class _Groups:
    """The values of a column with the sums of their scores, and bars for their shares of all scores."""

    def __init__(self, by: str, groups: Sequence[ByColumn]) -> None:
        self._by, self._groups = by, groups

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        net = any(group.net is not None for group in self._groups)

        def size(group: ByColumn) -> tuple[float, str]:
            share = max(group.helpful, group.harmful)
            return -(abs(group.effect) if net else share), group.value

        largest = sorted(self._groups, key=size)[:_MAX_GROUPS]
        shown = set(map(id, largest))
        ellipsis = "..." if options.ascii_only else "…"
        title = f"By column: {shorten(one_line(self._by), 24, ellipsis)}"
        if len(shown) < len(self._groups):
            of_what = "net sums" if net else "shares"
            title += f", the {len(shown)} with the largest {of_what} of {len(self._groups):,}"
        bar = _signs(options)["bar"]
        wide = options.max_width >= _WIDTH_FOR_MORE
        cells = 6 if wide else 0

        def bar_of(share: float) -> str:
            return f"{bar * round(share * cells):>{cells}} {share:>4.0%}".lstrip() if share else ""

        table = _titled(title)
        room = 20 if wide else 10
        table.add_column("value", no_wrap=True, max_width=room)
        sums = ("sum", "net") if net else ("sum", "mean") if wide else ()
        for name in ("examples", *sums, "helpful", "harmful"):
            table.add_column(name, justify="right", no_wrap=True, overflow="crop")
        for group in self._groups:
            if id(group) not in shown:
                continue
            values = {
                "sum": f"{group.total:+.3g}",
                "net": f"{group.effect:+.3g}",
                "mean": f"{group.total / max(1, group.count):+.2g}",
            }
            table.add_row(
                shorten(one_line(group.value) or repr(group.value), room, ellipsis),
                f"{group.count:,}",
                *(values[name] for name in sums),
                Text(bar_of(group.helpful), style="green"),
                Text(bar_of(group.harmful), style="red"),
            )
        yield Padding(table, (1, 0, 0, 0))
        if net:
            yield Text(f"{NET}.", style="dim")


# ------------------------------------------------------------------------------------------ confirmation


def confirmation_report(result: QueryResult, width: int = 80) -> RenderableType:
    """A generation, and what retraining without rows did to it."""
    assert result.confirmation is not None
    return Group(_generation(result, width), _confirmation(result.confirmation, width))


def _confirmation(confirmation: Confirmation, width: int) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for effect in confirmation.effects:
        sure = effect.p <= SURE
        sentence = one_line(capital(effect.sentence(confirmation.said)))
        grid.add_row("Retrained", Text(f"{sentence}.", style="bold green" if sure else "bold"))
        grid.add_row("", Text(one_line(capital(effect.detail)) + "."))
        if effect.changed:
            answer = shorten_middle(one_line(effect.answer), max(20, width - 12) * _COMPLETION_LINES)
            grid.add_row("Now says", Text(answer, style="cyan"))
    grid.add_row("Recipe", Text(one_line(capital(confirmation.recipe_text)) + ".", style="dim"))
    return Padding(grid, (1, 0, 0, 0))
