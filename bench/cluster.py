"""What docs/guide/cluster.md says in numbers: caching and scanning by one and by two processes, and memory.

    python bench/cluster.py speed --rounds 5      # caching and the scan, in turns; one thread a process
    python bench/cluster.py memory                # a pass of rapidin, training, a model spread over two

Each measurement is a process, or two under torchrun, of this file; the machine may do other things meanwhile,
so one and two processes take turns and medians count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLES = 192
SCANNED = 65536  # rows of 32 blocks of 128 numbers, float16: 512 MiB
HERE = Path(__file__).resolve()


def model_of(hidden: int, layers: int) -> Any:
    """A random Llama with a byte tokenizer's vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=256,
        )
    ).eval()


def run(processes: int, *arguments: str) -> dict[str, Any]:
    """Run this file in so many processes of one thread; what the leader printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else ()), str(HERE), "--worker", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    environment["PYTHONPATH"] = str(HERE.parent.parent)  # of this checkout
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ------------------------------------------------------------------------------------------ workers


def caching(folder: str) -> dict[str, float]:
    """Seconds that caching takes, all processes together; the model is there already."""
    import torch

    from rapidin import Attributor, distributed

    sys.path.insert(0, str(HERE.parent.parent / "tests" / "support"))
    from tiny import tiny_tokenizer

    world = distributed.world()
    attributor = Attributor(model_of(256, 6), tiny_tokenizer(), width=512, at=1.0, preconditioner=None)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(20, 240, (EXAMPLES,), generator=generator).tolist()
    records = [{"prompt": "a" * (n // 2), "completion": "b" * (n - n // 2)} for n in lengths]
    assert attributor.loaded.identity  # hashed beforehand
    world.meet()
    start = time.perf_counter()
    attributor.cache(records, folder, shard_rows=16, null=False)
    world.meet()
    return {"seconds": time.perf_counter() - start}


def scan(folder: str) -> dict[str, float]:
    """Seconds of a scan for one query, of a cache in memory, the best of five."""
    import torch

    from rapidin import distributed
    from rapidin.attribution import methods
    from rapidin.attribution.scan import scan_cache
    from rapidin.attribution.scan_pieces import CacheScan
    from rapidin.cache import Cache

    cache, world = Cache(folder), distributed.world()
    blocks, width = len(cache.layers), cache.manifest.width
    query = torch.randn(1, blocks, width, generator=torch.Generator().manual_seed(0))
    source = CacheScan(cache, methods.prepare(query, cache))
    best = float("inf")
    for _ in range(6):
        world.meet()
        start = time.perf_counter()
        scan_cache(source, 10)
        best = min(best, time.perf_counter() - start)
    return {"seconds": best}


def memory(what: str) -> dict[str, float]:
    """MB that this process holds of weights, of their gradients and of an optimizer's moments; and the most
    that a pass, the second, allocates besides at a time."""
    import torch

    from rapidin import distributed
    from rapidin.gradients import fsdp
    from rapidin.gradients.collector import GradientSketcher
    from rapidin.gradients.parameters import find_targets
    from rapidin.tasks.causal import TokenBatch, example_losses

    world = distributed.world()
    model = model_of(768, 12)
    targets = find_targets(model)
    if not world.alone:
        fsdp.shard(model, world, torch.device("cpu"))
    batch = TokenBatch.of([(list(range(5, 205)), [False] + [True] * 199)] * 4)
    parameters = list(model.parameters())

    def own(p: torch.Tensor) -> torch.Tensor:
        return p.to_local() if fsdp.is_sharded(p) else p  # type: ignore[operator]

    optimizer = torch.optim.AdamW(parameters) if what == "training" else None
    sketcher = GradientSketcher(model, targets, width=512, seed=0)

    def step() -> None:
        if what == "forward":
            with torch.no_grad():
                example_losses(model, batch)
        elif optimizer is None:
            sketcher(batch)
        else:
            example_losses(model, batch).mean().backward()
            optimizer.step()

    step()  # until buffers are made and moments are there
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    held = [0, *itertools.accumulate(e.nbytes() for e in events)]
    moments = [v for state in (optimizer.state.values() if optimizer else ()) for v in state.values()]
    return {
        "weights": sum(own(p).nbytes for p in parameters) / 1e6,
        "grads": sum(own(p.grad).nbytes for p in parameters if p.grad is not None) / 1e6,
        "moments": sum(m.nbytes for m in moments) / 1e6,
        "peak": max(held) / 1e6,
    }


WORKERS: dict[str, Callable[[str], dict[str, float]]] = {"caching": caching, "scan": scan, "memory": memory}


def work(kind: str, value: str) -> None:
    """One process of a measurement."""
    import torch

    from rapidin import distributed

    torch.set_num_threads(1)
    world = distributed.join()
    found = WORKERS[kind](value)
    if world.leads:
        print(json.dumps(found))
    distributed.leave()


# ------------------------------------------------------------------------------------------- tables


def speed(rounds: int) -> None:
    """One process and two, in turns: medians of the ratios."""
    sys.path.append(str(HERE.parent.parent / "studies" / "common"))
    from random_cache import write_cache

    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder) / "scan", 32, 128, SCANNED)
        for kind in ("caching", "scan"):
            ratios, alone = [], []
            for _ in range(rounds):
                seconds = []
                for processes in (1, 2):
                    target = str(Path(folder) / kind)
                    seconds.append(run(processes, kind, target)["seconds"])
                    if kind == "caching":
                        shutil.rmtree(target)
                alone.append(seconds[0])
                ratios.append(seconds[0] / seconds[1])
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(
                f"| {kind} | {statistics.median(alone):.3f} s | {statistics.median(ratios):.2f} ({spread}) |"
            )


def table_of_memory() -> None:
    """MB a process."""
    for name, processes, what in (
        ("forward pass alone", 1, "forward"),
        ("rapidin", 1, "sketch"),
        ("training with AdamW", 1, "training"),
        ("rapidin, spread over two processes", 2, "sketch"),
    ):
        found = run(processes, "memory", what)
        mb = found["weights"], found["grads"] + found["moments"], found["peak"]
        print(f"| {name} | {mb[0]:,.0f} | {mb[1]:,.0f} | {mb[2]:,.0f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3])
    else:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
        parser.add_argument("what", choices=["speed", "memory"])
        parser.add_argument("--rounds", type=int, default=5)
        options = parser.parse_args()
        speed(options.rounds) if options.what == "speed" else table_of_memory()
