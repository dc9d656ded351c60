"""rapidin on the same setting, in this environment: its caches of 2,048 bytes and of floats, its methods.

It takes base and tuned model from the ground truth, so MODEL is not looked at, and every case has a place of
its own. Seconds are of the queries; those of the cache stand beside them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from judge import base_of
from setting import Case, Setting, main
from torch import Tensor

PLACES = ("1", "0.5", "0.1,0.5,0.9")
BUDGET = 2048
WIDTH = 4096  # of the floats
METHODS: tuple[tuple[str, float | None], ...] = (
    ("dot", None), ("datainf", None), ("fisher", None), ("fisher", 0.05), ("fisher", 1.0)
)  # fmt: skip


def cases(setting: Setting) -> Iterator[Case]:
    from rapidin import Attributor, methods
    from rapidin.examples import open_examples
    from rapidin.model import load_model
    from rapidin.scan import Source, all_scores

    truth = setting.truth
    loaded = load_model(str(truth / "tuned"), base=base_of(truth), device="cpu")
    tests = list(open_examples(str(truth / "test.jsonl")))

    def scores(
        cache: Any, sketch: Tensor, options: dict[str, Any], size: float, _: Path
    ) -> tuple[Tensor, float]:
        """`Attributor.scores`, but for the sketches of the test texts, made once for all methods."""
        return all_scores(Source(cache, methods.prepare(sketch, cache, **options))), size

    for seed, code, at in product(setting.seeds, ("2048 bytes", "float16"), PLACES):
        if code == "float16" and seed:
            continue
        folder = setting.work / "cache"
        shutil.rmtree(folder, ignore_errors=True)
        budget = None if code == "float16" else BUDGET
        attributor = Attributor(
            loaded,
            at=[float(a) for a in at.split(",")],
            width="auto" if budget else WIDTH,
            budget=budget,
            seed=seed,
        )
        began = time.perf_counter()
        cache = attributor.cache(str(truth / "train.jsonl"), folder, bytes=budget)
        about = {"at": at, "cache_seconds": round(time.perf_counter() - began, 2)}
        size = float(attributor.format(bytes=budget).row_bytes(len(attributor.layers), attributor.width))
        sketch = attributor.query_sketches(attributor.generations(tests))
        for (method, damping), normalize in product(METHODS, ("layer", "none")):
            if seed and damping is not None:
                continue
            settings: dict[str, Any] = {"normalize": normalize, "code": code, "width": attributor.width}
            if damping is not None:
                settings["damping"] = damping
            options = {"method": method, "normalize": normalize, "damping": damping}
            score = partial(scores, cache, sketch, options, size)
            yield Case(method, settings | {"seed": seed}, score, about=about)


if __name__ == "__main__":
    main("rapidin", cases)
