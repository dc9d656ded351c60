"""rapidin on the same setting, in this environment: its caches of 2,048 bytes and of floats, its methods.

It takes base and tuned model from the ground truth, so MODEL is not looked at, and every case has a place of
its own. Methods have their default damping. Seconds of the first case of a cache are those of the cache too.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from judge import base_of
from setting import Case, Setting, main
from torch import Tensor

from rapidin.attribution.caching import format_of
from rapidin.attribution.generate import generations_of
from rapidin.attribution.options import CacheOptions
from rapidin.attribution.provenance import checked
from rapidin.attribution.query_sketch import sketch_generations

CODECS = ("2048 bytes", "float16")
PLACES = ("1", "0.5", "0.1,0.5,0.9")
BUDGET = 2048
WIDTH = 4096  # of the floats
METHODS = ("dot", "datainf", "fisher")


@dataclass
class Cached:
    """A cache, and the sketches of the test texts, made when first asked for.

    codec: "2048 bytes" or "float16"; at: points as on the command line; preconditioner: as `Attributor` takes
    it.
    """

    loaded: Any
    truth: Path
    folder: Path
    codec: str
    at: str
    preconditioner: str
    seed: int
    seconds: float = 0.0
    made: tuple[Any, Tensor, float] | None = None

    def make(self) -> tuple[Any, Tensor, float]:
        """(the cache, the sketches, bytes of a row)."""
        if self.made is None:
            from rapidin import Attributor
            from rapidin.data.examples import open_examples

            budget = None if self.codec == "float16" else BUDGET
            attributor = Attributor(
                self.loaded,
                at=[float(a) for a in self.at.split(",")],
                width="auto" if budget else WIDTH,
                bytes_per_example=budget,
                preconditioner=self.preconditioner,
                seed=self.seed,
            )
            shutil.rmtree(self.folder, ignore_errors=True)
            began = time.perf_counter()
            cache = attributor.cache(str(self.truth / "train.jsonl"), self.folder, bytes=budget, null=False)
            self.seconds = round(time.perf_counter() - began, 2)
            size = float(
                format_of(CacheOptions(bytes=budget), attributor.source.width).row_bytes(
                    len(attributor.layers), attributor.source.width
                )
            )
            source = checked(attributor.source, cache.manifest)  # with the cache's preconditioner
            tests = generations_of(source, list(open_examples(str(self.truth / "test.jsonl"))))
            self.made = cache, sketch_generations(source, tests), size
        return self.made

    def scores(self, method: str, normalize: str, about: dict[str, Any], _: Path) -> tuple[Tensor, float]:
        """`Attributor.scores`, but for the sketches of the test texts, made once for all methods."""
        from rapidin.attribution import methods
        from rapidin.attribution.scan import all_scores
        from rapidin.attribution.scan_pieces import CacheScan

        cache, sketch, size = self.make()
        began = time.perf_counter()
        found = all_scores(
            CacheScan(cache, methods.prepare(sketch, cache, method=method, normalize=normalize))
        )
        about |= {"cache_seconds": self.seconds, "scan_seconds": round(time.perf_counter() - began, 2)}
        return found, size


def cases(setting: Setting) -> Iterator[Case]:
    from rapidin.gradients.load import load_model

    loaded = load_model(str(setting.truth / "tuned"), base=base_of(setting.truth), device="cpu")
    for preconditioner, seed, codec, at in product(("off", "kfac"), setting.seeds, CODECS, PLACES):
        if codec == "float16" and seed:
            continue
        cached = Cached(loaded, setting.truth, setting.work / "cache", codec, at, preconditioner, seed)
        for method, normalize in product(METHODS, ("layer", "none")):
            about = {"at": at}
            settings = {"normalize": normalize, "codec": codec, "seed": seed}
            if preconditioner != "off":
                settings["preconditioner"] = preconditioner
            yield Case(method, settings, partial(cached.scores, method, normalize, about), about=about)


if __name__ == "__main__":
    main("rapidin", cases)
