"""Several processes of a command line at once, as a launcher starts them, without an import of torch for
each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
    SIGKILL: when the last one's receipt is written, or, `torn`, before that. In a torn run a leader that
    dies waits until another process has left a receipt, and one that lives waits with its first shard until
    the others are dead: so it makes no difference which process is slow."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    processes = []
    dying = {rank: folder / f"{rank}.dead" for rank in kill or {}}
    for rank in range(size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RAPIDIN_PATIENCE": str(patience),
        }
        die = (kill[rank], torn, dying[rank]) if kill and rank in kill else None
        awaited = list(dying.values()) if torn and rank == 0 else []
        process = _CONTEXT.Process(
            target=_one, args=(environment, list(arguments), folder / str(rank), die, awaited)
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


def _one(
    environment: dict[str, str],
    arguments: list[str],
    path: Path,
    die: tuple[int, bool, Path] | None,
    awaited: Sequence[Path],
) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{path}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    if die:
        _die_after(*die)
    else:
        _wait_at_files(awaited)
    from rapidin.cli import main

    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _at_files(then: Callable[[Path, bool], None]) -> None:
    """Call `then` with the path of each file that this process writes, and whether it is a shard."""
    from rapidin.cache.names import FITTED, SAMPLE

    replace = os.replace  # by which each file gets its name

    def replaced(source: str | Path, target: str | Path) -> None:
        replace(source, target)
        path = Path(target)
        if not {FITTED, SAMPLE} & set(path.parts):  # the leader makes some of those alone
            then(path, path.name.startswith("shard-") and path.suffix == ".safetensors")  # receipts are JSON

    os.replace = replaced  # type: ignore[assignment]


def _die_after(shards: int, torn: bool, dead: Path) -> None:
    """Have this process killed once it has written so many shards. dead: the file that says so."""
    from rapidin.cache.names import RECEIPTS

    written = 0

    def die(path: Path, shard: bool) -> None:
        nonlocal written
        written += shard
        if written >= shards and (shard if torn else not shard):  # what records it comes after a shard
            if torn and os.environ["RANK"] == "0":
                _wait(lambda: any((path.parent / RECEIPTS).glob("*.json")))
            dead.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    _at_files(die)


def _wait_at_files(awaited: Sequence[Path]) -> None:
    """Have this process wait with each shard until these files are there."""

    def wait(path: Path, shard: bool) -> None:
        if shard:
            _wait(lambda: all(file.exists() for file in awaited))

    _at_files(wait)


def _wait(until: Callable[[], bool]) -> None:
    """Wait a minute at the most."""
    deadline = time.monotonic() + 60.0
    while not until() and time.monotonic() < deadline:
        time.sleep(0.01)


def torchrun(size: int, arguments: Sequence[str], dead: Path, *, restarts: int, dies: int) -> None:
    """Run `rapidin` by torchrun's own agent. dies: shards after which process 1 of the first start dies, and
    leaves the file `dead`; the leader waits for that.

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
    elastic_launch(config, _worker)(list(arguments), dies, dead)


def _worker(arguments: list[str], dies: int, dead: Path) -> int:
    import torch

    torch.set_num_threads(1)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        _die_after(dies, True, dead)
    elif os.environ["RANK"] == "0":
        _wait_at_files([dead])
    from rapidin.cli import main

    code = main(arguments)
    if code:
        raise SystemExit(code)
    return code
