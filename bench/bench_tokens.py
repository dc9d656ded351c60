"""A query for every token of a completion, against as many bare single-token passes, and one query of it all.

pytest bench/bench_tokens.py --benchmark-json=tokens.json

The bare pass is one forward and one input-only backward pass over a batch with a copy of the text for each
token, the loss of that token alone; `of_bare` is its time over that of `Attributor.target_sketches`, which
sketches each gradient besides, from copies that end before their token. `of_bare_cut` is against passes over
those shorter copies in the same batches: what hooks and sketches cost. One scan serves all tokens: its time
is beside that of a scan for the completion alone.

RAPIDIN_BENCH_MODEL=FOLDER takes a real model; otherwise it is a random Llama of SmolLM2-135M's shape.
"""

import os
import tempfile

import pytest
import torch
from bench_caching import bare_loop, make_model
from limits import note
from turns import clear_peak, in_turns, peak_mb, sized

from rapidin import Attributor
from rapidin.attribution import methods
from rapidin.attribution.query_sketch import sketch_generations, sketch_targets, target_texts
from rapidin.attribution.scan import scan_cache
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.data.encoding import Encoded, Status, by_length
from rapidin.data.generations import Generation
from rapidin.data.spans import Span

PROMPT = sized(40, 6)
COMPLETION = sized(64, 5)
ROWS = sized(200, 12)  # of the cache that is scanned
REPEATS = sized(20, 1)


@pytest.mark.parametrize("kind", ["linear layers", "LoRA"])
def bench_tokens(benchmark, kind):
    name = os.environ.get("RAPIDIN_BENCH_MODEL", "random Llama")
    benchmark.group = f"a query for each of {COMPLETION} tokens, {name}, {kind}"
    loaded = make_model(kind)
    bare = bare_loop(loaded.model)
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(vocabulary, (PROMPT + COMPLETION,), generator=generator).tolist()
    counted = [n >= PROMPT for n in range(len(ids))]
    spans = tuple(Span("", (place,)) for place in range(COMPLETION))
    text = Generation("", "", False, Encoded(ids, counted, Status.OK), spans=spans)
    plain = Attributor(loaded).source
    source = plain.with_preconditioner(plain.fit_preconditioner([text.encoded]))  # as a cache has it
    whole = [Encoded(ids, [n == t for n in range(len(ids))], Status.OK) for t in range(PROMPT, len(ids))]
    cut = target_texts([text], source.settings.loss).texts
    batches = by_length(range(len(cut)), cut, source.settings.batch_tokens)

    counted_memory = clear_peak()
    sketch_targets(source, [text])
    peak = peak_mb() if counted_memory else 0.0
    beside = in_turns(
        benchmark,
        lambda: sketch_targets(source, [text]),
        {
            "bare, one batch": lambda: bare(whole),
            "bare, cut": lambda: [bare([cut[n] for n in chosen]) for chosen in batches],
            "the completion as one": lambda: sketch_generations(source, [text]),
        },
        rounds=2,
        seconds=240.0,
    )
    best = benchmark.stats.stats.min
    note(
        benchmark,
        of_bare=beside["bare, one batch"] / best,
        of_bare_cut=beside["bare, cut"] / best,
        cost_of_one=best / beside["the completion as one"],
        peak_MB=peak,
    )


def bench_scan_for_tokens(benchmark):
    """One scan for a completion and its tokens, against a scan for each of them."""
    benchmark.group = f"a scan for {COMPLETION} tokens and their completion"
    loaded = make_model("LoRA")
    attributor = Attributor(loaded, preconditioner="off")
    rows = [{"text": f"{n} is {n * n} or so"} for n in range(ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        cache = attributor.cache(rows, folder, null=False)
        sketch = torch.randn(COMPLETION, len(cache.layers), cache.manifest.width)
        targets = (sketch / COMPLETION, [0] * COMPLETION)
        one = CacheScan(cache, methods.prepare(sketch.mean(0, keepdim=True), cache))
        all_of_them = CacheScan(cache, methods.prepare(sketch.mean(0, keepdim=True), cache, targets=targets))

        def scan(source):
            for _ in range(REPEATS):
                scan_cache(source, 10)

        beside = in_turns(benchmark, lambda: scan(all_of_them), {"the completion": lambda: scan(one)})
        best = benchmark.stats.stats.min
        note(benchmark, times_a_scan_each=(COMPLETION + 1) * beside["the completion"] / best)
