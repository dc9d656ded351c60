"""How accurate are the standard errors of scores? Against exact gradients, and between seeds.

    python studies/score_errors/score_errors.py MODEL --data FILE
        [--include layers.0. layers.14.] [--width 64 512] [--codec float16 sign:1024] [--normalize layer]
        [--method dot] [--precondition kfac] [--seeds 4] [--json FILE]

z = (score - exact) / SE for every pair of a query (the last texts) and a row (the other texts). The root mean
square of z is 1 where the errors are right, and its mean is the bias. `differences`: z of the difference of
two rows' scores. `between`: (score - score') / sqrt(SE^2 + SE'^2) of two seeds, which needs no exact scores.
A codec is given as a dtype, or a dtype and the bytes of an example.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rapidin.attribution import token_contributions
from rapidin.attribution.attributor import Attributor
from rapidin.attribution.generate import generations_of
from rapidin.attribution.methods.vectors import mean_factor
from rapidin.attribution.options import NORMALIZE, ScoringConfig
from rapidin.attribution.provenance import checked
from rapidin.attribution.query_sketch import QuerySketch, scans_of, sketch_generations
from rapidin.attribution.score_errors import details
from rapidin.data.encoding import Encoded
from rapidin.gradients.load import load_model
from rapidin.gradients.source import GradientSource


def exact_scores(source: GradientSource, queries: int, encoded: list[Encoded], normalize: str) -> Tensor:
    """Exact scores of the last `queries` texts with all other texts: [queries, rows] float64."""
    asked, rows = encoded[-queries:], encoded[:-queries]
    by_row = token_contributions.exact(source, asked, [1.0] * queries, range(queries), rows, normalize)
    return torch.stack([positions.sum(1) for positions in by_row], 1)


def differences(seeds: list[tuple[Tensor, Tensor]], true: Tensor) -> Iterator[Tensor]:
    """z of the differences between the scores of the best rows, taking their errors as independent."""
    for (scores, errors), exact in zip(seeds, true, strict=True):
        best = exact.topk(max(2, exact.shape[1] // 10)).indices
        off, error = (scores - exact).gather(1, best), errors.gather(1, best)
        n, m = torch.triu_indices(best.shape[1], best.shape[1], 1)
        yield ((off[:, n] - off[:, m]) / torch.hypot(error[:, n], error[:, m])).flatten()


def rounded(x: Tensor) -> float:
    """Six digits, as results are kept."""
    return float(f"{float(x):.6g}")


def figures(z: Tensor) -> dict[str, float]:
    z = z.flatten()
    return {
        "mean": rounded(z.mean()),
        "rms": rounded(z.square().mean().sqrt()),
        "within 1.96": rounded((z.abs() < 1.96).double().mean()),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model folder or name")
    parser.add_argument("--data", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--include", nargs="*", default=[])
    parser.add_argument("--texts", type=int, default=60)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--width", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--codec", nargs="+", default=["float16"])
    parser.add_argument("--normalize", nargs="+", default=list(NORMALIZE))
    parser.add_argument("--method", default="dot")
    parser.add_argument("--precondition", dest="preconditioner", default="kfac")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write settings and results here")
    args = parser.parse_args(arguments)
    records = [json.loads(line) for line in Path(args.data).read_text().splitlines()[: args.texts]]
    loaded = load_model(args.model, adapter=args.adapter)
    results = []
    rows = len(records) - args.queries
    every = torch.arange(rows).expand(args.queries, rows)
    truth: dict[tuple[int, str], Tensor] = {}
    for width, codec in itertools.product(args.width, args.codec):
        dtype, _, size = codec.partition(":")
        made: dict[str, list[tuple[Tensor, Tensor]]] = {}
        known: dict[str, list[Tensor]] = {}
        for seed in range(args.seeds):
            attributor = Attributor(
                loaded,
                width=width,
                seed=seed,
                include=args.include,
                preconditioner=args.preconditioner,
                max_length=args.max_length,
            )
            with tempfile.TemporaryDirectory() as folder:
                cache = attributor.cache(
                    records[:rows],
                    Path(folder) / "cache",
                    dtype=dtype,
                    bytes=int(size) if size else None,
                    sample=rows if size else 0,
                )
                source = checked(attributor.source, cache.manifest)
                texts = generations_of(source, records[rows:])
                sketch = sketch_generations(source, texts)
                for normalize in args.normalize:
                    scoring = ScoringConfig(normalize, args.method)
                    got = details(scans_of([QuerySketch(cache, sketch)], texts, scoring), every)
                    made.setdefault(normalize, []).append((got.scores.double(), got.errors.double()))
                    here = (
                        seed if args.preconditioner == "kfac" else 0
                    )  # K-FAC's directions depend on the seed
                    if args.method == "dot":
                        if (here, normalize) not in truth:
                            encoded = [source.encoder(record) for record in records]
                            truth[here, normalize] = exact_scores(source, args.queries, encoded, normalize)
                        unit = mean_factor(cache, normalize)  # of this seed's sketches
                        known.setdefault(normalize, []).append(truth[here, normalize] / unit)
        for normalize, seeds in made.items():
            row: dict[str, Any] = {"width": width, "codec": codec, "normalize": normalize}
            row["error"] = rounded(torch.stack([e for _, e in seeds]).square().mean().sqrt())
            if normalize in known:
                true = torch.stack(known[normalize])
                row["spread"] = rounded(true.std())
                z = torch.stack([(s - t) / e for (s, e), t in zip(seeds, true, strict=True)])
                row["exact"] = figures(z)
                # hits are what is far from zero
                row["exact, best tenth"] = figures(z[true >= true.quantile(0.9, dim=2, keepdim=True)])
                row["differences, best tenth"] = figures(torch.cat(list(differences(seeds, true))))
            pairs = [(a - b) / torch.hypot(x, y) for (a, x), (b, y) in itertools.combinations(seeds, 2)]
            if pairs:
                row["between"] = figures(torch.stack(pairs))
            results.append(row)
            words = [f"{width:5} {codec:10} {normalize:6}  SE {row['error']:.2e}"]
            for name in ("exact", "exact, best tenth", "differences, best tenth", "between"):
                if name in row:
                    z = row[name]
                    words.append(f"{name}: z {z['mean']:+.2f} rms {z['rms']:.2f} in {z['within 1.96']:.1%}")
            print("   ".join(words), flush=True)
    if args.json is not None:
        setting = json.dumps({key: value for key, value in vars(args).items() if key != "json"})
        lines = ",\n".join(json.dumps(row) for row in results)
        args.json.write_text(f'{{"setting": {setting},\n"results": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
