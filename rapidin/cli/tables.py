"""What is known about a cache, and the plan of one, in a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rapidin.results.text import (
    bytes_text,
    counts_text,
    one_line,
    time_text,
)
from rapidin.tasks.names import CAUSAL

if TYPE_CHECKING:
    from rapidin.attribution.plan import Plan
    from rapidin.gradients.check import GradientCheck


def _loss(gradient: Mapping[str, Any]) -> str:
    """The loss that a cache's gradients are of."""
    task = gradient.get("task", CAUSAL)
    if task != CAUSAL:
        beta = f", beta {gradient['beta']:g}" if "beta" in gradient else ""
        return f"of the task '{task}'{beta}"
    turns = ", of the last turn of chats" if gradient.get("turns") == "last" else ""
    return f"{gradient['loss']} loss over the tokens{turns}"


def info_report(info: Mapping[str, Any]) -> RenderableType:
    """The facts of `Cache.info()`, a line each."""
    model, sketch, gradient = info["model"]["source"], info["sketch"], info["gradient"]
    data, text = info["data"], info["text"]
    points = " and ".join(f"{point:g}" for point in gradient["at"])
    where = f"at {points} of the way from the base (0) to the tuned model (1)"
    if gradient["at"] == [1.0]:
        where = "at the model itself"
    progress = "complete"
    if not info["complete"]:
        progress = (
            f"unfinished: {info['rows']:,} of {info['rows_wanted']:,} examples; "
            "rerun the same 'rapidin cache' command to resume"
        )
    lines = [
        ("cache", info["path"]),
        ("", progress),
        ("model", model.get("model") or "in memory"),
        ("adapter", model.get("adapter")),
        ("base", model.get("base")),
        ("data", f"{_named(data.get('path'))} ({data.get('form')} form)" if data else None),
        ("examples", counts_text(info["counts"])),
        ("gradients", f"taken {where}, {_loss(gradient)}"),
        ("training", _training(gradient)),
        ("used", _coverage(gradient)),
        ("checked", _check(gradient)),
        ("preconditioner", info.get("preconditioner")),
        ("included", ", ".join(gradient["include"])),
        ("excluded", ", ".join(gradient["exclude"])),
        (
            "texts",
            f"at most {text['max_length']:,} tokens, longer ones {_TOO_LONG[text['too_long']]}{_eos(text)}",
        ),
        (
            "sketch",
            f"{_shape(info)}: {info['dim']:,} numbers, "
            f"{sketch['projection']} projection, seed {sketch['seed']}",
        ),
        ("stored", kept_text(info)),
        ("null distribution", _null(info["null"])),
        ("decoys", None if info["decoys"] is None else f"{info['decoys']:,} with a sketch"),
        ("size", size_text(info["bytes"], info["bytes_per_example"], info["shards"])),
    ]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in lines:
        if value:
            grid.add_row(name, Text(one_line(str(value))))
    return grid


def _null(counts: Mapping[str, int]) -> str | None:
    """Whose best scores verdicts compare a query's with; None if there are none."""
    names = {"questions": "neutral questions", "rows": "training rows"}
    texts = [f"{count:,} {names.get(kind, kind)}" for kind, count in counts.items()]
    return f"the best scores of {' and '.join(texts)}" if texts else None


def _training(gradient: Mapping[str, Any]) -> str | None:
    """The steps of a training run that sketches were taken in; None for a cache that was made after it."""
    made = gradient.get("training")
    if made is None:
        return None
    rates = [rate for _, rate in made["learning_rates"]]
    return (
        f"sketched by {made['trainer']} in steps {made['first_step']:,} to {made['last_step']:,}, "
        f"{made['visits']:,} times, with learning rates from {min(rates):.3g} to {max(rates):.3g}; "
        f"{made['seen']:,} examples were seen"
    )


def _coverage(gradient: Mapping[str, Any]) -> str | None:
    """What of the model counts; None if the cache does not say."""
    from rapidin.gradients.coverage import Coverage

    coverage = gradient.get("coverage")
    return None if coverage is None else Coverage.from_json(coverage).text


def _check(gradient: Mapping[str, Any]) -> str:
    """What the check before caching found."""
    from rapidin.gradients.check import GradientCheck

    check = gradient.get("check")
    return check_text(None if check is None else GradientCheck.from_json(check))


def check_text(check: GradientCheck | None) -> str:
    """What a check found, with the names of all parameters whose gradient autograd takes."""
    if check is None:
        return "gradients were not compared with autograd's"
    text = check.text
    if len(check.by_autograd) > 1:
        text += f"; by autograd: {', '.join(check.by_autograd)}"
    if check.mixed:
        text += f"; examples one at a time: {check.why_single}"
    return text


def _named(path: str | Sequence[str] | None) -> str:
    return "in memory" if path is None else path if isinstance(path, str) else " and ".join(path)


def _shape(info: Mapping[str, Any]) -> str:
    """The dimensions of a sketch."""
    width, points = info["sketch"]["width"], len(info["gradient"]["at"])
    layers = info["layers"] // max(1, points)
    whole = info["sketch"]["projection"] == "rapidgrad"  # one block for all layers
    shape = f"{width:,} dimensions" if whole else f"{layers:,} layers x {width:,} dimensions"
    return shape if points <= 1 else f"{shape} at each of {points} points"


_TOO_LONG = {"truncate": "are truncated", "skip": "are skipped"}


def _eos(text: Mapping[str, Any]) -> str:
    return ", end-of-text token added" if text["eos"] else ", no end-of-text token added"


def plan_report(plan: Plan) -> RenderableType:
    """The time, memory and size that caching would take, a line for each format."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("stored as", no_wrap=True)
    for name in ("per example", "all", "per scan", "memory to fit"):
        table.add_column(name, justify="right", no_wrap=True)
    for cost in plan.formats:
        fitting = bytes_text(cost.fitting_bytes) if cost.fitting_bytes else ""
        table.add_row(
            cost.name,
            bytes_text(cost.example_bytes),
            bytes_text(cost.cache_bytes),
            time_text(cost.scan_seconds),
            fitting,
        )
    heading = (
        f"{plan.examples:,} examples of {plan.tokens:,.0f} tokens, "
        f"{plan.layers:,} x {plan.width:,} dimensions: "
        f"about {time_text(plan.seconds)} to cache, {bytes_text(plan.memory)} of memory"
    )
    note = (
        "A scan is one query over all examples in memory. Accuracy of each format: docs/measured/fidelity.md"
    )
    model = f"{plan.coverage.text}\n{check_text(plan.check)}"
    return Group(Text(heading), Text(model), Text(), table, Text(), Text(note, style="dim"))


def kept_text(info: Mapping[str, Any]) -> str:
    """How a cache stores its sketches."""
    codec, fitted = info["codec"], info["fitted_codec"]
    if fitted is None:
        return f"in {codec['dtype']}" + (f", {codec['bytes']:,} bytes per example" if codec["bytes"] else "")
    shape, parts = fitted["shape"], []
    if shape["shared"]:
        parts.append(f"{shape['shared']:,} directions of all layers in int8")
    if sum(shape["per_layer"]):
        parts.append(f"{sum(shape['per_layer']):,} of single layers in one bit")
    if sum(shape["residual"]):
        numbers = "other numbers" if parts else "numbers"
        bits = "one bit" if shape["dtype"] == "sign" else shape["dtype"]
        parts.append(f"{sum(shape['residual']):,} {numbers} in {bits}")
    text = ", ".join(parts)
    if fitted["file"]:
        sample = f"{fitted['statistics'].get('sample', 0):,.0f}"
        text += f"; fitted on {sample} examples ({bytes_text(fitted['bytes'])} for all)"
    return text


def size_text(total: int, each: float | None, shards: int) -> str:
    """The bytes of a cache and per example."""
    what = f"{bytes_text(total)} in {shards:,} shard{'s' * (shards != 1)}"
    return what if each is None else f"{what}, {bytes_text(each)} per example"
