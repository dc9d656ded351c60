"""Several processes of a command line at once, as a launcher starts them, without an import of torch for
each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it as it is loaded
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["rapidin.attribution.attributor", "rapidin.attribution.ensemble", "rapidin.cli", "peft", "rich"]
)


class Ended(NamedTuple):
    """code: exit code, or minus the signal."""

    code: int
    out: str
    err: str


def together(
    size: int,
    arguments: Sequence[str],
    folder: Path,
    *,
    kill: Mapping[int, int] | None = None,
    patience: float = 30.0,
    torn: bool = False,
) -> list[Ended]:
    """Run `rapidin` in `size` processes. kill: by rank, the number of shards after which a process dies by
    SIGKILL: when the last one's receipt is written, or, `torn`, before that."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    processes = []
    for rank in range(size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RAPIDIN_PATIENCE": str(patience),
        }
        last = (kill or {}).get(rank)
        process = _CONTEXT.Process(
            target=_one, args=(environment, list(arguments), folder / str(rank), last, torn)
        )
        process.start()
        processes.append(process)
    ended = []
    for rank, process in enumerate(processes):
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
        texts = [Path(f"{folder / str(rank)}.{name}").read_text() for name in ("out", "err")]
        ended.append(Ended(process.exitcode or 0, *texts))
    return ended


def _one(environment: dict[str, str], arguments: list[str], path: Path, last: int | None, torn: bool) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{path}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    if last is not None:
        _die_after(last, torn)
    from rapidin.cli import main

    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_after(shards: int, torn: bool) -> None:
    """Have this process killed once it has written so many shards: each file gets its name by os.replace."""
    replace, written = os.replace, 0

    def dying(source: str | Path, target: str | Path) -> None:
        nonlocal written
        replace(source, target)
        path = Path(target)
        if "sample" in str(path.parent):
            return
        shard = path.name.startswith("shard-") and path.suffix == ".safetensors"  # receipts are JSON
        written += shard
        if written >= shards and (shard if torn else not shard):  # what records it comes after a shard
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying


def torchrun(size: int, arguments: Sequence[str], *, restarts: int, dies: int) -> None:
    """Run `rapidin` by torchrun's own agent. dies: shards after which process 1 of the first start dies.

    Raises what torchrun raises where the run fails."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        max_restarts=restarts,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="rapidin-tests",
        start_method="forkserver",
    )
    elastic_launch(config, _worker)(list(arguments), dies)


def _worker(arguments: list[str], dies: int) -> int:
    import torch

    torch.set_num_threads(1)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        _die_after(dies, torn=True)
    from rapidin.cli import main

    code = main(arguments)
    if code:
        raise SystemExit(code)
    return code
