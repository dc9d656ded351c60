"""How accurate are scores from few bytes? Sketches and codecs against exact gradients on a real model.

    python studies/fidelity/collect.py MODEL --out STUDY ...                        the data, once
    python studies/fidelity/fidelity.py judge STUDY --out studies/fidelity/NAME.json    every codec and seed
    python studies/fidelity/fidelity.py shared CACHE [CACHE ...]                   how many shared directions?
    python studies/fidelity/fidelity.py report studies/fidelity/*.json studies/lds/codes.json --out
    docs/measured

`judge` scores each query of the study against all scored texts but itself and the near-duplicates that were
planted for other queries, and compares with the scores from exact gradients, query by query; figures are
means over the queries. Three normalizations: `layer` (mean over the layers of cosines), `none` (dot products)
and `cosine`. Three choices of texts: `all` kinds, `alpaca` alone, `other` (plays and program code: queries
and scored texts both).

- `spearman`: rank correlation; `rmse`: error over the standard deviation of the query's exact scores
- `top10`, `top100`: how many of the exact top 10 and top 100 are found
- `near3`: share of queries whose planted near-duplicate is among the best 3; `exact_near3`: the same for the
  exact scores (some texts come from templates and have many twins); `kept_near3`: share of those with which
  the exact scores are content

`shared` takes caches of float rows. A codec of 2,048 bytes learns from some of their rows, with shared bases
of several sizes, and gives the scores of these and of the others for 100 of the others as queries, which are
compared with the scores by the float rows: the figures are means over queries and seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from scipy.stats import rankdata
from torch import Tensor

from rapidin import ops
from rapidin.cache import Cache
from rapidin.cache.codec import (
    PER_LAYER,
    RESIDUAL,
    ROW_OVERHEAD,
    SHARED,
    Basis,
    CodecConfig,
    PackedCodec,
    fit_shape,
    learn_basis,
    shared_size,
)
from rapidin.errors import UserError

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))
import doc_tables

Scores = npt.NDArray[np.float64]
GROUPS: dict[str, list[str] | None] = {"all": None, "alpaca": ["alpaca"], "other": ["shakespeare", "code"]}
NORMALIZED = ("layer", "none", "cosine")
SHARED_ALONE = "shared basis alone"
THINNED = "every 8th per-layer bit"
FINE, COARSE = 2048, 256  # bytes of the two passes of a search in two steps
CHUNK = 64  # texts that are encoded at a time
FIRST = (0.02, 0.05, 0.1)  # shares of the texts that the second pass sees


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of length 1, float32, and the lengths that they had."""
    x = x.float()
    length = x.norm(dim=-1)
    return x / length.clamp(min=1e-30)[..., None], length


@dataclass(frozen=True)
class Sketches:
    """Unit blocks [n, layers, width] and their lengths [n, layers] of the sample and of the scored texts."""

    sample: Tensor
    sample_length: Tensor
    scored: Tensor
    scored_length: Tensor

    @property
    def width(self) -> int:
        return self.scored.shape[2]

    def folded(self, width: int) -> Sketches:
        """A smaller dimension: the sketch of half the width is the sum of the two halves."""

        def fold(x: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
            short, factor = unit(x.unflatten(2, (-1, width)).float().sum(2))
            return short, length * factor

        return Sketches(*fold(self.sample, self.sample_length), *fold(self.scored, self.scored_length))


class Study:
    """What collect.py left in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "study.json").read_text())
        exact = load_file(folder / "exact.safetensors")
        self.products, self.double = exact["products"], exact["double"]
        self.length_scored, self.length_query = exact["length_scored"], exact["length_query"]
        self.kinds = np.array(self.meta["scored"])
        self.sample_kinds = np.array(self.meta["sample"])
        self.queries: list[int] = self.meta["queries"]
        self.near: list[int] = self.meta["near_duplicates"]
        self.layers = len(self.meta["layers"])
        self.exact = scores(self.products, self.length_query, self.length_scored)

    def seeds(self) -> list[int]:
        return sorted(int(p.stem.split("-")[1]) for p in self.folder.glob("sketch-*.safetensors"))

    def sketches(self, seed: int) -> Sketches:
        found = load_file(self.folder / f"sketch-{seed}.safetensors")
        names = ("sample", "sample_length", "scored", "scored_length")
        return Sketches(*(found[name] for name in names))

    def judged(self, got: dict[str, Scores]) -> dict[str, dict[str, dict[str, float]]]:
        """Figures by normalization and choice of texts."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for name in got:
            groups = GROUPS if name == "layer" else ("all", "alpaca")
            found[name] = {
                group: self.compare(got[name], self.exact[name], GROUPS[group]) for group in groups
            }
        return found

    def compare(self, got: Scores, exact: Scores, kinds: list[str] | None) -> dict[str, float]:
        rows = []
        chosen = np.ones(len(self.kinds), bool) if kinds is None else np.isin(self.kinds, kinds)
        for i, (query, near) in enumerate(zip(self.queries, self.near, strict=True)):
            if not chosen[query]:
                continue
            ranks = [
                int((row[chosen] > row[near]).sum() - (row[query] > row[near])) for row in (got[i], exact[i])
            ]
            seen = chosen.copy()
            seen[query] = False
            seen[self.near] = False
            rows.append(
                {
                    **figures(exact[i][seen], got[i][seen]),
                    "near3": float(ranks[0] < 3),
                    "exact_near3": float(ranks[1] < 3),
                    "kept_near3": float(ranks[0] < 3) if ranks[1] < 3 else float("nan"),
                }
            )
        return {key: round(float(np.nanmean([row[key] for row in rows])), 4) for key in rows[0]}


def figures(exact: Scores, got: Scores) -> dict[str, float]:
    """Of the scores [N] of one query."""
    order, found = np.argsort(-exact), np.argsort(-got)
    return {
        "spearman": float(np.corrcoef(rankdata(exact), rankdata(got))[0, 1]),
        "rmse": float(np.sqrt(np.mean((exact - got) ** 2)) / exact.std()),
        "top10": float(len(set(order[:10]) & set(found[:10]))),
        "top100": float(len(set(order[:100]) & set(found[:100]))),
    }


def scores(products: Tensor, query: Tensor, scored: Tensor) -> dict[str, Scores]:
    """Scores [Q, N] of each normalization from cosines by layer [Q, N, L] and lengths [Q, L], [N, L]."""
    weights = {
        "layer": (torch.ones_like(query) / query.shape[1], torch.ones_like(scored)),
        "none": (query, scored),
        "cosine": (query / query.norm(dim=1, keepdim=True), scored / scored.norm(dim=1, keepdim=True)),
    }
    return {
        name: torch.einsum("qnl,ql,nl->qn", products.double(), q.double(), x.double()).numpy()
        for name, (q, x) in weights.items()
    }


def by_layer(queries: Tensor, rows: Tensor) -> Tensor:
    """Products by layer [Q, N, L]."""
    return torch.bmm(queries.transpose(0, 1), rows.permute(1, 2, 0)).permute(1, 2, 0)


def bytes_of_floats(numbers: int, layers: int) -> int:
    """A row in float16, with a length a layer in float32."""
    return 2 * numbers + 4 * layers + ROW_OVERHEAD


def build(
    wanted: CodecConfig, sketches: Sketches, seed: int, shared: int | None = None
) -> PackedCodec | None:
    """The codec that a cache would use, or one with `shared` directions of all layers; None where the
    budget has room for none."""
    layers = sketches.scored.shape[1]
    try:
        shared = shared_size(wanted, layers) if shared is None else shared
        learnt = learn_basis(sketches.sample, shared) if wanted.sample else None
        shape = fit_shape(wanted, layers, sketches.width, learnt)
    except UserError:
        return None
    basis = None if learnt is None else Basis.of(learnt, shape, sketches.sample_length, seed).rounded()
    return PackedCodec(shape, sketches.width, seed, basis)


def encode(codec: PackedCodec, x: Sketches) -> dict[str, Tensor]:
    """The tensors of all scored texts."""
    pairs = zip(x.scored.split(CHUNK), x.scored_length.split(CHUNK), strict=True)
    pieces = [codec.encode(*pair) for pair in pairs]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


class Judge:
    def __init__(self, study: Study, budgets: Sequence[int], out: Path | None) -> None:
        self.study, self.budgets, self.out = study, budgets, out
        self.start = time.perf_counter()
        self.results: list[dict[str, Any]] = []
        self.coarse: list[dict[str, Any]] = []

    def keep(self, codec: str, size: int, got: dict[str, Scores], **about: Any) -> None:
        entry = {"codec": codec, "bytes": size, **about, "figures": self.study.judged(got)}
        self.results.append(entry)
        figures = entry["figures"]["layer"]
        shown = "  ".join(
            f"{figures[g]['spearman']:.3f} {figures[g]['top10']:.2f} {figures[g]['kept_near3']:.2f}"
            for g in figures
        )
        about_text = " ".join(f"{k}={v}" for k, v in about.items())
        print(
            f"{time.perf_counter() - self.start:5.0f} s  {codec} {size} B {about_text}: {shown}", flush=True
        )

    def save(self) -> None:
        if self.out is None:
            return
        study = self.study
        whole = {
            "study": study.folder.name,
            "layers": study.layers,
            "numbers": sum(o * i for o, i in study.meta["shapes"]),
            "sample": {k: int((study.sample_kinds == k).sum()) for k in sorted(set(study.sample_kinds))},
            "scored": {k: int((study.kinds == k).sum()) for k in sorted(set(study.kinds))},
            "queries": len(study.queries),
        }
        lines = [json.dumps(entry) for entry in self.results]
        coarse = [json.dumps(entry) for entry in self.coarse]
        head = json.dumps(whole)[:-1]
        body = ",\n".join(lines), ",\n".join(coarse)
        self.out.write_text(f'{head},\n"results": [\n{body[0]}\n],\n"coarse": [\n{body[1]}\n]}}\n')

    def floats(self, whole: Sketches, seed: int) -> None:
        width = whole.width
        while width >= 64:
            x = whole.folded(width)
            got = self.scores(x.scored, x.scored_length, x)
            self.keep(
                "float16",
                bytes_of_floats(width * self.study.layers, self.study.layers),
                got,
                seed=seed,
                width=width,
            )
            width //= 2

    def scores(self, rows: Tensor, lengths: Tensor, x: Sketches) -> dict[str, Scores]:
        """Queries in floats against rows as they were decoded."""
        queries = self.study.queries
        return scores(by_layer(x.scored[queries], rows), x.scored_length[queries], lengths)

    def decoded_scores(
        self, codec: PackedCodec, tensors: dict[str, Tensor], x: Sketches
    ) -> dict[str, Scores]:
        queries, n = self.study.queries, len(x.scored)
        asked, found = x.scored[queries], []
        for i in range(0, n, CHUNK):
            found.append(by_layer(asked, codec.decode({k: v[i : i + CHUNK] for k, v in tensors.items()})))
        return scores(torch.cat(found, 1), x.scored_length[queries], codec.lengths(tensors))

    def packed(self, name: str, wanted: CodecConfig, x: Sketches, seed: int) -> PackedCodec | None:
        codec = build(wanted, x, seed)
        if codec is None:
            return None
        tensors = encode(codec, x)
        got = self.decoded_scores(codec, tensors, x)
        size = codec.row_bytes + ROW_OVERHEAD
        shape = codec.shape
        about = {
            "seed": seed, "width": x.width, "dtype": wanted.dtype, "budget": wanted.bytes,
            "shared": shape.shared,
            "per_layer": sum(shape.per_layer), "residual": sum(shape.residual),
            "length_bits": shape.length_bits,
            "residual_weight": round(float(codec.basis.residual_weight), 4),
        }  # fmt: skip
        self.keep(name, size, got, **about)
        if shape.shared and wanted.bytes == FINE and name == "learnt":
            zeroed = {**tensors, "scale": tensors["scale"] * torch.tensor([1.0, 0.0, 0.0]).half()}
            got = self.decoded_scores(codec, zeroed, x)
            size = shape.shared + 2 + 4 + ROW_OVERHEAD
            self.keep(
                SHARED_ALONE, size, {"layer": got["layer"]}, seed=seed, width=x.width, shared=shape.shared
            )
        return codec

    def two_passes(self, x: Sketches, coarse: PackedCodec, fine: PackedCodec, seed: int) -> None:
        """Is the best 10 of the fine codec among what a coarse one puts first?"""
        vectors = x.scored[self.study.queries] / self.study.layers
        whole = row_parts(fine, vectors, x)
        short = row_parts(coarse, vectors, x)
        passes = {
            "256-byte codec": sum(v for k, v in short.items() if k != THINNED),
            SHARED_ALONE: whole[SHARED],
        }
        # Of the per-layer bits every eighth; the weight of a bit was chosen among 1, 2, 4 and 8 on seed 0.
        if THINNED in whole:
            for weight in (1, 2, 4, 8):
                passes[f"shared basis and every 8th per-layer bit, x {weight}"] = (
                    whole[SHARED] + weight * whole[THINNED]
                )
        best = whole[SHARED] + whole[PER_LAYER] + whole.get(RESIDUAL, 0)
        for query, n in enumerate(self.study.queries):
            best[query, n] = -np.inf
        for name, first in passes.items():
            same, found = [], []
            for query, n in enumerate(self.study.queries):
                row = first[query].copy()
                row[n] = -np.inf
                top = set(np.argsort(-best[query])[:10])
                order = np.argsort(-row)
                shares = [len(top & set(order[: round(share * len(row))])) / 10 for share in FIRST]
                found.append(shares)
                same.append([share == 1 for share in shares])
            self.coarse.append(
                {"first": name, "seed": seed, "shares": FIRST, "same": np.sum(same, 0).tolist(),
                 "found": np.round(np.mean(found, 0), 4).tolist(), "queries": len(found)}
            )  # fmt: skip
            print(f"coarse {name}: same {np.sum(same, 0)}, found {np.mean(found, 0)}", flush=True)

    def double_sided(self) -> None:
        """P_out G P_in^T (LoGra, Bergson). A corner of it is a smaller projection of the same kind. Lengths
        are the exact ones, which favours it a little."""
        study = self.study
        side = round(study.double.shape[2] ** 0.5)
        square = study.double.float().unflatten(2, (side, side))
        kept = 1
        while kept <= side:
            corner, _ = unit(square[:, :, :kept, :kept].flatten(2))
            queries = corner[study.queries]
            got = scores(by_layer(queries, corner), study.length_query, study.length_scored)
            numbers = kept * kept * study.layers
            self.keep("double-sided, float16", bytes_of_floats(numbers, study.layers), got, side=kept)
            if kept * kept >= 16:
                bits = torch.where(corner < 0, -1.0, 1.0) * (corner.abs().mean(2, keepdim=True)).clamp(
                    min=1e-30
                )
                bits /= (
                    (bits * corner).sum(2, keepdim=True).clamp(min=1e-30)
                )  # its own product is exact, as for ours
                bits[study.length_scored == 0] = 0
                got = scores(by_layer(queries, bits), study.length_query, study.length_scored)
                size = numbers // 8 + study.layers * 3 + ROW_OVERHEAD  # a float16 scale, a byte of length
                self.keep("double-sided, 1 bit", size, got, side=kept)
            kept *= 2

    def run(self, seed: int, width: int, first: bool, floats: bool = True) -> None:
        """Everything at one seed, codecs at one width; what hardly depends on the seed at the first alone."""
        whole = self.study.sketches(seed)
        if floats:
            self.floats(whole, seed)
        x = whole.folded(width)
        del whole
        if first:
            for budget in self.budgets:
                self.packed("nothing learnt", CodecConfig("sign", budget), x, seed)
            for dtype in ("int8", "int4", "sign"):
                self.packed("all numbers", CodecConfig(dtype), x, seed)
            self.save()
        codecs = {
            budget: self.packed("learnt", CodecConfig("sign", budget, len(x.sample)), x, seed)
            for budget in self.budgets
        }
        coarse, fine = codecs.get(COARSE), codecs.get(FINE)
        if coarse is not None and fine is not None:
            self.two_passes(x, coarse, fine, seed)
        self.save()

    def unlike(self, seed: int, width: int) -> None:
        """Learnt from instructions alone, all kinds scored."""
        whole = self.study.sketches(seed)
        chosen = torch.from_numpy(self.study.sample_kinds == "alpaca")
        part = Sketches(
            whole.sample[chosen], whole.sample_length[chosen], whole.scored, whole.scored_length
        ).folded(width)
        for budget in self.budgets:
            self.packed("learnt from Alpaca", CodecConfig("sign", budget, len(part.sample)), part, seed)
        self.save()


def row_parts(codec: PackedCodec, vectors: Tensor, x: Sketches) -> dict[str, Scores]:
    """What each part of a codec adds to the layer-normalized scores, as a scan would find it."""
    tensors = encode(codec, x)
    prepared = codec.prepare(vectors)
    plan = prepared.plan(tensors, None)
    assert plan.scales is None
    found: dict[str, Scores] = {}
    start = 0
    for name, part in zip(codec.packed_parts(tensors), plan.parts, strict=True):
        assert isinstance(part, ops.Packed)
        queries, rows = plan.queries[:, start : start + part.width], ops.unpack(part)
        found[name] = (queries @ rows.T).double().numpy()
        if name == PER_LAYER:
            found[THINNED] = (queries[:, ::8] @ rows[:, ::8].T).double().numpy()
        start += part.width
    return found


def judge(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    study = Study(args.study)
    work = Judge(study, [int(b) for b in args.budgets.split(",")], args.out)
    work.double_sided()
    for seed in study.seeds():
        work.run(seed, args.width, first=seed == study.seeds()[0])
    work.unlike(study.seeds()[0], args.width)
    for seed in study.seeds():
        widest = study.sketches(seed).width
        if widest > args.width:
            work.run(seed, widest, first=False, floats=False)


def shared_bases(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    keys = {"spearman": 3, "rmse": 2, "top10": 1}  # digits
    titles = ["cache", "learnt from", "shared directions"]
    titles += [f"{which}, {key}" for which in ("others", "learnt from") for key in keys]
    lines = []
    for folder in args.caches:
        cache = Cache(folder)
        rows, lengths = cache.sketches().unflatten(1, (-1, cache.manifest.width)), cache.lengths()
        live = (lengths > 0).all(1)
        rows, lengths = rows[live], lengths[live]
        for shared in map(int, args.sizes.split(",")):
            found = [
                of_shared_size(rows, lengths, args.sample, shared, args.bytes, seed)
                for seed in range(args.seeds)
            ]
            line = [folder.name, f"{args.sample:,} of {len(rows):,}", str(shared)]
            for which in range(2):
                line += [
                    f"{np.mean([f[which][key] for f in found]):.{digits}f}" for key, digits in keys.items()
                ]
            lines.append(line)
            print(line, flush=True)
    print("\n" + doc_tables.table(titles, lines))


def of_shared_size(
    rows: Tensor, lengths: Tensor, sample: int, shared: int, size: int, seed: int
) -> list[dict[str, float]]:
    """Of a codec that learns from some of the rows [n, layers, width], the figures for the others and for
    these, as means over 100 of the others as queries."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    taught, others = order[:sample], order[sample:]
    x = Sketches(rows[taught], lengths[taught], rows, lengths)
    codec = build(CodecConfig("sign", size, sample), x, seed, shared)
    assert codec is not None
    tensors = encode(codec, x)
    asked = others[:100]  # as queries
    queries = rows[asked].flatten(1)
    exact, got = (queries @ each.flatten(1).T for each in (rows, codec.decode(tensors)))
    found = []
    for scored in (others, taught):
        by_query = []
        for i, query in enumerate(asked):
            own = scored[scored != query]
            by_query.append(figures(exact[i, own].double().numpy(), got[i, own].double().numpy()))
        found.append({key: float(np.mean([f[key] for f in by_query])) for key in by_query[0]})
    return found


# ------------------------------------------------------------------------------------------- report


def mean(entries: list[dict[str, Any]], group: str, key: str, normalized: str = "layer") -> float:
    """Over the seeds."""
    return float(np.mean([e["figures"][normalized][group][key] for e in entries]))


def lines_of(results: list[dict[str, Any]], codec: str, **wanted: Any) -> list[list[dict[str, Any]]]:
    """The entries of a codec, those of all seeds and one setting together, by size."""
    settings: dict[Any, list[dict[str, Any]]] = {}
    for entry in results:
        if entry["codec"] == codec and all(entry.get(k) == v for k, v in wanted.items()):
            setting = (entry.get("width"), entry.get("dtype"), entry.get("budget"), entry.get("side"))
            settings.setdefault(setting, []).append(entry)
    return sorted(settings.values(), key=lambda entries: entries[0]["bytes"])


def shown_codecs(study: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """What a table and a plot of a study show: names and entries."""
    results = study["results"]
    widths = sorted({e["width"] for e in results if e["codec"] == "learnt"})
    found: list[tuple[str, list[dict[str, Any]]]] = []
    for width in widths:
        found += [(f"learnt, dimension {width}", e) for e in lines_of(results, "learnt", width=width)]
    found += [("nothing learnt, 1 bit", e) for e in lines_of(results, "nothing learnt")]
    found += [(f"all numbers, {e[0]['dtype']}", e) for e in lines_of(results, "all numbers")]
    found += [("float16 sketch", e) for e in lines_of(results, "float16")]
    for name in ("double-sided, float16", "double-sided, 1 bit"):
        found += [(name, e) for e in lines_of(results, name)]
    sizes: dict[tuple[str, int], tuple[str, list[dict[str, Any]]]] = {}
    for name, entries in found:  # a budget of more than one bit for each number changes nothing
        sizes.setdefault((name, entries[0]["bytes"]), (name, entries))
    return list(sizes.values())


def spread(entries: list[dict[str, Any]], group: str) -> str:
    values = [e["figures"]["layer"][group]["spearman"] for e in entries]
    middle, low, high = np.mean(values), min(values), max(values)
    return f"{middle:.3f}" if high - low < 0.0025 else f"{middle:.3f} ({low:.3f} to {high:.3f})"


def fidelity_table(codecs: list[tuple[str, list[dict[str, Any]]]]) -> str:
    rows = []
    for name, entries in codecs:
        what = f", dimension {entries[0]['width']}" if name.startswith("float16") else ""
        rows.append(
            [
                name + what, f"{entries[0]['bytes']:,}", spread(entries, "all"),
                f"{mean(entries, 'alpaca', 'spearman'):.3f}", f"{mean(entries, 'other', 'spearman'):.3f}",
                f"{mean(entries, 'all', 'rmse'):.2f}",
                *(f"{mean(entries, g, 'top10'):.1f}" for g in ("all", "alpaca", "other")),
                f"{mean(entries, 'all', 'top100'):.0f}", f"{mean(entries, 'all', 'kept_near3'):.2f}",
                str(len(entries)),
            ]
        )  # fmt: skip
    head = [
        "codec", "bytes", "Spearman, all", "Alpaca", "other", "error", "top 10, all", "Alpaca", "other",
        "top 100", "twin", "seeds",
    ]  # fmt: skip
    return doc_tables.table(head, rows)


def normalized_table(study: dict[str, Any]) -> str:
    rows = []
    for name, entries in shown_codecs(study):
        if name.startswith(("learnt", "float16", "double-sided, f")):
            name += f", dimension {entries[0]['width']}" if name.startswith("float16") else ""
            figures = [
                f"{mean(entries, 'all', key, normalized):.{digits}f}"
                for normalized in NORMALIZED
                for key, digits in (("spearman", 3), ("rmse", 2), ("top10", 1))
            ]
            rows.append([name, f"{entries[0]['bytes']:,}", *figures])
    head = ["codec", "bytes"] + [f"{n}: {k}" for n in NORMALIZED for k in ("Spearman", "error", "top 10")]
    return doc_tables.table(head, rows)


def unlike_table(study: dict[str, Any]) -> str:
    rows = []
    for codec in ("learnt", "learnt from Alpaca"):
        for entries in lines_of(study["results"], codec, seed=0, width=512):
            figures = [f"{mean(entries, g, 'spearman'):.3f}" for g in GROUPS]
            figures += [f"{mean(entries, g, 'top10'):.1f}" for g in GROUPS]
            name = "all kinds" if codec == "learnt" else "Alpaca alone"
            row = [name, f"{entries[0]['bytes']:,}", *figures]
            rows += [row] if row not in rows else []  # a budget beyond one bit a number changes nothing
    head = ["learnt from", "bytes", *(f"Spearman, {g}" for g in GROUPS), *(f"top 10, {g}" for g in GROUPS)]
    return doc_tables.table(head, rows)


def coarse_table(study: dict[str, Any]) -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in study["coarse"]:
        groups.setdefault(entry["first"], []).append(entry)
    rows = []
    for name, entries in groups.items():
        same, found = np.sum([e["same"] for e in entries], 0), np.mean([e["found"] for e in entries], 0)
        total = sum(e["queries"] for e in entries)
        rows.append([name, *(f"{s} of {total}, {100 * f:.1f} %" for s, f in zip(same, found, strict=True))])
    return doc_tables.table(["first pass", *(f"best {share:.0%} rescored" for share in FIRST)], rows)


def lds_mean(results: list[dict[str, Any]], key: str, **wanted: Any) -> float | None:
    values = [e[key] for e in results if all(e.get(k) == v for k, v in wanted.items())]
    return float(np.mean(values)) if values else None


LDS_SCORES = ("layer", "fisher 0.1", "fisher 1.0")


def lds_settings(results: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    seen: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = {}
    for e in results:
        about = {"codec": e["codec"], "budget": e.get("budget"), "width": e.get("width")}
        seen.setdefault(tuple(about.values()), (e["codec"], about))
    order = list(dict.fromkeys(codec for codec, _ in seen.values()))
    return sorted(seen.values(), key=lambda x: order.index(x[0]))


def lds_table(results: list[dict[str, Any]]) -> str:
    names = sorted({e["set"] for e in results})
    rows = []
    for codec, about in lds_settings(results):
        size = round(lds_mean(results, "bytes", **about) or 0)
        values = [lds_mean(results, key, set=name, **about) for name in names for key in LDS_SCORES]
        label = f"{codec}, dimension {about['width']}" if codec == "float16" else codec
        rows.append([label, f"{size:,}", *("" if v is None else f"{v:.3f}" for v in values)])
    return doc_tables.table(["codec", "bytes", *(f"{n}: {k}" for n in names for k in LDS_SCORES)], rows)


def goals_table(studies: list[dict[str, Any]], lds: list[dict[str, Any]]) -> str:
    rows = []

    def line(goal: str, wanted: float, values: dict[str, float], digits: int, at_most: bool = False) -> None:
        def met(v: float) -> bool:
            v = round(v, digits)
            return v <= wanted if at_most else v >= wanted

        text = "; ".join(f"{name} {v:.{digits}f}" for name, v in values.items())
        verdict = "met" if all(map(met, values.values())) else "not met"
        if verdict == "not met" and any(map(met, values.values())):
            verdict = "met by " + ", ".join(name for name, v in values.items() if met(v))
        rows.append([goal, text, verdict])

    def learnt(budget: int, key: str) -> dict[str, float]:
        return {
            s["study"]: max(mean(e, "all", key) for e in lines_of(s["results"], "learnt", budget=budget))
            for s in studies
        }

    for budget, wanted in ((2048, 0.96), (8192, 0.98), (16384, 0.99)):
        line(f"Spearman at least {wanted} at {budget:,} bytes", wanted, learnt(budget, "spearman"), 3)
    line("9 of the exact top 10 at 2,048 bytes", 9, learnt(2048, "top10"), 2)
    line("near-duplicates in the top 3 at 2,048 bytes", 1, learnt(2048, "kept_near3"), 2)
    for keys, loss in ((("layer",), 0.02), (LDS_SCORES[1:], 0.03)):
        for key in keys:
            losses = {}
            for name in sorted({e["set"] for e in lds}):
                exact = lds_mean(lds, key, set=name, codec="exact")
                got = lds_mean(lds, key, set=name, codec="learnt from all", budget=2048)
                if exact is not None and got is not None:
                    losses[name] = exact - got
            line(f"LDS at 2,048 bytes within {loss} of exact, {key}", loss, losses, 3, at_most=True)
    for share, place in zip(FIRST, range(len(FIRST)), strict=True):
        values = {}
        for s in studies:
            chosen = [e for e in s["coarse"] if e["first"] == "256-byte codec"]
            values[s["study"]] = (
                100 * sum(e["same"][place] for e in chosen) / sum(e["queries"] for e in chosen)
            )
        line(
            f"top 10 unchanged for 99 queries in 100, 256 bytes first, best {share:.0%} rescored",
            99,
            values,
            1,
        )
    return doc_tables.table(["goal", "measured", ""], rows)


def plot_study(study: dict[str, Any], out: Path) -> None:
    from matplotlib import pyplot as plt

    styles = {
        "learnt": "o-",
        "nothing": "s--",
        "float16": "^-",
        "double-sided, f": "v-",
        "double-sided, 1": "x--",
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for ax, key, label in ((axes[0], "spearman", "Spearman"), (axes[1], "top10", "of the exact top 10")):
        lines: dict[str, list[tuple[int, float]]] = {}
        for name, entries in shown_codecs(study):
            if not name.startswith("all numbers"):
                lines.setdefault(name, []).append((entries[0]["bytes"], mean(entries, "all", key)))
        for name, points in lines.items():
            style = next(v for k, v in styles.items() if name.startswith(k))
            ax.plot(*zip(*sorted(points), strict=True), style, label=name, markersize=5)
        ax.set_xscale("log")
        ax.set_xlabel("bytes an example")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    axes[0].set_ylim(0.6, 1.005)
    axes[1].set_ylim(4, 10)
    axes[0].axhline(0.96, color="grey", linewidth=0.8)
    axes[1].axhline(9, color="grey", linewidth=0.8)
    axes[1].legend(fontsize=8, loc="lower right")
    figure.suptitle(f"{study['study']}: layer-normalized scores against exact gradients, all kinds of text")
    figure.tight_layout()
    figure.savefig(out, dpi=80)
    plt.close(figure)


def plot_lds(results: list[dict[str, Any]], out: Path) -> None:
    from matplotlib import pyplot as plt

    names = sorted({e["set"] for e in results})
    figure, axes = plt.subplots(2, len(names), figsize=(3.6 * len(names), 6), squeeze=False)
    for row, key in zip(axes, ("layer", "fisher 1.0"), strict=True):
        for ax, name in zip(row, names, strict=True):
            lines: dict[str, list[tuple[float, float]]] = {}
            for codec, about in lds_settings(results):
                size, value = (lds_mean(results, k, set=name, **about) for k in ("bytes", key))
                if size is None or value is None:
                    continue
                if codec == "exact":
                    ax.axhline(value, color="black", linewidth=0.8)
                else:
                    lines.setdefault(codec, []).append((size, value))
            for codec, points in lines.items():
                style = "o-" if codec.startswith(("learnt", "float16")) else "x--"
                ax.plot(*zip(*sorted(points), strict=True), style, label=codec, markersize=4)
            ax.set_xscale("log")
            ax.set_title(f"{name}: {key}", fontsize=10)
            ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("bytes an example")
    for row in axes:
        row[0].set_ylabel("LDS (line: exact gradients)")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=58)
    plt.close(figure)


def tables(results: Sequence[Path]) -> dict[str, str]:
    """The tables of docs/fidelity.md, by name."""
    studies, lds = read(results)
    made = {"goals": goals_table(studies, lds), "lds": lds_table(lds)}
    for study in studies:
        name = study["study"]
        shared_alone = [(SHARED_ALONE, entry) for entry in lines_of(study["results"], SHARED_ALONE)]
        made[f"{name}-codecs"] = fidelity_table(shown_codecs(study))
        made[f"{name}-shared"] = fidelity_table(shared_alone)
        made[f"{name}-normalized"] = normalized_table(study)
        made[f"{name}-unlike"] = unlike_table(study)
        made[f"{name}-coarse"] = coarse_table(study)
    return made


def read(results: Sequence[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(what `judge` wrote, a dictionary a study; the rows of studies/lds/codes.json)."""
    contents = [json.loads(path.read_text()) for path in results]
    studies = [content for content in contents if "study" in content]
    return studies, [row for content in contents if "at" in content for row in content["results"]]


def report(args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    images = args.out.parent / "img"
    images.mkdir(parents=True, exist_ok=True)
    studies, lds = read(args.results)
    for study in studies:
        plot_study(study, images / f"fidelity-{study['study']}.png")
    plot_lds(lds, images / "fidelity-lds.png")
    for name, table in tables(args.results).items():
        doc_tables.write(args.out / "fidelity.md", name, table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    judging = commands.add_parser("judge", help="every codec on the data of a study")
    judging.add_argument("study", type=Path)
    judging.add_argument("--budgets", default="256,1024,2048,8192,16384", help="bytes an example")
    judging.add_argument("--width", type=int, default=512, help="dimension of the sketches that are packed")
    judging.add_argument("--threads", type=int, default=1)
    judging.add_argument("--out", type=Path)
    judging.set_defaults(command=judge)
    sizing = commands.add_parser("shared", help="a codec of float rows, by the size of its shared basis")
    sizing.add_argument("caches", type=Path, nargs="+")
    sizing.add_argument("--sizes", default="83,166,247,384")
    sizing.add_argument("--sample", type=int, default=690, help="number of rows that the codec learns from")
    sizing.add_argument("--bytes", type=int, default=FINE)
    sizing.add_argument("--seeds", type=int, default=2)
    sizing.add_argument("--threads", type=int, default=1)
    sizing.set_defaults(command=shared_bases)
    reporting = commands.add_parser("report", help="tables and plots from the results")
    reporting.add_argument("results", type=Path, nargs="+")
    reporting.add_argument(
        "--out", type=Path, required=True, help="folder of fidelity.md, whose tables are rewritten"
    )
    reporting.set_defaults(command=report)
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()
