"""What a kernel is held against, measured in the same run on the same threads."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def best_seconds(run: Callable[[], Any], seconds: float = 1.0) -> float:
    """The quickest of the runs that fit into `seconds`, after one to warm up."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def read_seconds(x: Tensor, seconds: float = 1.0) -> float:
    """Time to read a contiguous tensor once: torch's sum over its bytes as float32."""
    words = x.reshape(-1).view(torch.float32)
    return best_seconds(lambda: words.sum(), seconds)


def read_files(paths: Iterable[Path], piece: int) -> None:
    """Read files from end to end, `piece` bytes at a time."""
    buffer = bytearray(piece)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def note(benchmark: Any, **row: Any) -> None:
    """Writes a row's facts beside its times, with what they were measured on."""
    benchmark.extra_info.update(row, threads=torch.get_num_threads(), torch=torch.__version__)
