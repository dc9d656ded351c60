"""Results read back from the JSON that they were written as, such as to make a page of it.

What JSON lacks stays unknown: the rows of the cache (line numbers stand for them), how many examples were
scored, and what each token of an example contributes to each part of the generation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rapidin.results.confirmation import Confirmation
from rapidin.results.decoys import DecoyTest
from rapidin.results.fusion import Fused, Fusion
from rapidin.results.types import Group, Histogram, Hit, QueryResult, Standing, TargetResult, Tokens
from rapidin.results.verdict import Common, Place, Verdict


def query_of(value: Mapping[str, Any]) -> QueryResult:
    """A query of what `rapidin query --json` wrote. Raises KeyError, TypeError or ValueError for anything
    else."""
    by = value.get("by") or {"column": None, "groups": []}
    histogram, verdict, confirmation = (value.get(key) for key in ("histogram", "verdict", "confirmation"))
    return QueryResult(
        prompt=str(value["prompt"]),
        completion=str(value["completion"]),
        generated=bool(value["generated"]),
        top=[_hit(hit) for hit in value["top"]],
        bottom=[_hit(hit) for hit in value["bottom"]],
        normalize=str(value["normalize"]),
        method=str(value["method"]),
        together=int(value.get("together", 0)),
        exact=bool(value.get("exact", False)),
        pieces=tuple(value.get("tokens", ())),
        targets=[_target(target) for target in value.get("targets", ())],
        layers=tuple(value.get("layers", ())),
        histogram=histogram and Histogram(_numbers(histogram["edges"]), tuple(histogram["counts"])),
        by=by["column"],
        groups=[_group(group) for group in by["groups"]],
        overlaps=dict(value.get("overlaps", {})),
        missing=tuple(value.get("missing", ())),
        verdict=verdict and _verdict(verdict),
        confirmation=confirmation and Confirmation.from_json(confirmation),
        fusion=Fusion.from_json(value["fusion"]) if "fusion" in value else None,
        decoys=DecoyTest.from_json(value["decoys"]) if value.get("decoys") else None,
    )


def _number(value: float | None) -> float:
    """A number; null stands for one that is not finite."""
    return math.nan if value is None else float(value)


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(map(_number, values))


def _hit(value: Mapping[str, Any]) -> Hit:
    tokens, decoded, copies = (value.get(key) for key in ("tokens", "decoded", "copies"))
    return Hit(
        rank=int(value["rank"]),
        index=int(value["index"]),
        row=int(value["index"]),
        score=_number(value["score"]),
        example=value.get("example"),
        error=None if value.get("error") is None else float(value["error"]),
        ranks=(int(value["ranks"][0]), int(value["ranks"][1])) if "ranks" in value else None,
        tied=bool(value.get("tied", False)),
        estimate=None if value.get("estimate") is None else float(value["estimate"]),
        copies=tuple(copies["indices"]) if copies else (),
        copies_more=int(copies["more"]) if copies else 0,
        targets=_numbers(value.get("targets", ())),
        layers=_numbers(value.get("layers", ())),
        tokens=tokens
        and Tokens(tuple(tokens["text"]), tuple(tokens["counts"]), _numbers(tokens["contribution"])),
        standings={
            name: Standing(_number(each["score"]), int(each["rank"]))
            for name, each in value.get("baselines", {}).items()
        },
        fused=Fused.from_json(value["fused"]) if "fused" in value else None,
        p=None if value.get("p") is None else float(value["p"]),
        q=None if value.get("q") is None else float(value["q"]),
        decoded=decoded and (str(decoded["prompt"]), str(decoded["completion"])),
    )


def _target(value: Mapping[str, Any]) -> TargetResult:
    return TargetResult(
        text=str(value["text"]),
        positions=tuple(map(int, value["places"])),
        influence=_number(value["influence"]),
        top=[_hit(hit) for hit in value["top"]],
        bottom=[_hit(hit) for hit in value["bottom"]],
    )


def _group(value: Mapping[str, Any]) -> Group:
    total, helpful, harmful = (_number(value[key]) for key in ("total", "helpful", "harmful"))
    net = _number(value["net"]) if "net" in value else None
    return Group(str(value["value"]), int(value["count"]), total, helpful, harmful, net)


def _verdict(value: Mapping[str, Any]) -> Verdict | None:
    """The verdict; None for one of an earlier version, which does not say what it was compared with."""
    places = {name: _place(value[name]) for name in ("questions", "rows") if name in value}
    if None in places.values():
        return None
    return Verdict(
        strength=value["strength"],
        score=value.get("score"),
        questions=places.get("questions"),
        rows=places.get("rows"),
        common=tuple(
            Common(each["text"], each["hits"], each["of"], each["share"], each.get("column"))
            for each in value["common"]
        ),
        reason=str(value.get("reason", "")),
    )


def _place(value: Mapping[str, Any]) -> Place | None:
    return Place(_numbers(value["scores"]), int(value["above"])) if "scores" in value else None
