"""rapidin on the same setting, in this environment: its caches of 2,048 bytes and of floats, its methods.

The second argument is the folder of the ground truth, not a model: base and tuned model are both needed.
Seconds are of the queries; those of the cache stand beside them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from judge import base_of
from setting import Case, Setting, main
from torch import Tensor

PLACES = ("1", "0.5", "0.1,0.5,0.9")
BUDGET = 2048
WIDTH = 4096  # of the floats
METHODS: tuple[tuple[str, float | None], ...] = (
    ("dot", None), ("datainf", None), ("fisher", None), ("fisher", 0.1), ("fisher", 1.0)
)  # fmt: skip


def scores(
    attributor: Any, cache: Any, tests: Any, options: dict[str, Any], size: float, folder: Path
) -> Any:
    found: Tensor = attributor.scores(cache, tests, **options)
    return found, size


def cases(setting: Setting) -> Iterator[Case]:
    from rapidin import Attributor
    from rapidin.examples import open_examples
    from rapidin.model import load_model

    truth = setting.model_folder
    loaded = load_model(str(truth / "tuned"), base=base_of(truth), device="cpu")
    tests = list(open_examples(str(truth / "test.jsonl")))
    for at in PLACES:
        points = [float(a) for a in at.split(",")]
        for code in ("2048 bytes", "float16"):
            for seed in setting.seeds:
                folder = setting.work / "cache"
                shutil.rmtree(folder, ignore_errors=True)
                began = time.perf_counter()
                if code == "float16":
                    attributor = Attributor(loaded, at=points, width=WIDTH, seed=seed)
                    cache = attributor.cache(str(truth / "train.jsonl"), folder)
                else:
                    attributor = Attributor(loaded, at=points, width="auto", budget=BUDGET, seed=seed)
                    cache = attributor.cache(str(truth / "train.jsonl"), folder, bytes=BUDGET)
                about = {"at": at, "cache_seconds": round(time.perf_counter() - began, 2)}
                size = float(
                    attributor.format(bytes=None if code == "float16" else BUDGET).row_bytes(
                        len(attributor.layers), attributor.width
                    )
                )
                for method, damping in METHODS:
                    for normalize in ("layer", "none"):
                        options: dict[str, Any] = {"method": method, "normalize": normalize}
                        if damping is not None:
                            options["damping"] = damping
                        score = partial(scores, attributor, cache, tests, options, size)
                        settings = {"normalize": normalize, "code": code, "width": attributor.width}
                        if damping is not None:
                            settings["damping"] = damping
                        yield Case(method, settings | {"seed": seed}, score, about=about)


if __name__ == "__main__":
    main("rapidin", cases)
