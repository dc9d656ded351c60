"""`rapidin cache` in processes that are killed, each a fork of this one, which has loaded the libraries.

    python tests/support/killing.py JOB.json        # writes its results as JSON on standard output

A job names command lines and how often each is to be killed. Half of the kills come from outside, at a
moment drawn from the length of an undisturbed run; half come from the run itself, at a system call drawn from
all those that change a file or folder: before it, after it, or in the middle of a write. After each the cache
must open and verify, with no fewer examples than before the run, and the same command must end with the bytes
of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rapidin.cache import Cache, Manifest
from rapidin.cli import main
from rapidin.cli.console import quiet_libraries

# What changes files and folders, by name in `os`; what is opened for writing is counted too.
CALLS = ("fsync", "replace", "unlink", "rmdir", "mkdir", "write")


class Calls:
    """Counts the system calls that change something, and kills this process at one of them."""

    def __init__(self, at: int | None, how: str) -> None:
        self.count, self.at, self.how = 0, at, how

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._wrapped(getattr(os, name)))
        fdopen = os.fdopen

        def opened(number: int, mode: str = "r", *rest: Any) -> Any:
            file = fdopen(number, mode, *rest)
            return _Writing(self, file) if "w" in mode else file

        os.fdopen = opened  # type: ignore[assignment]

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if self.due() and self.how != "after":
                die()
            result = call(*arguments, **options)
            if self.count == self.at:
                die()
            return result

        return wrapper

    def due(self) -> bool:
        self.count += 1
        return self.count == self.at


class _Writing:
    """A file whose first write may be the one at which the process dies, half of it done."""

    def __init__(self, calls: Calls, file: Any) -> None:
        self.calls, self.file = calls, file

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        if self.calls.due():
            if self.calls.how != "before":
                self.file.write(data[: len(data) // 2 if self.calls.how == "middle" else len(data)])
                self.file.flush()
            die()
        self.file.write(data)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def start(command: list[str], calls: Calls | None = None, count: Path | None = None) -> int:
    """The process id of a fork that runs a command line."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        if calls is not None:
            calls.install()
        code = main(command)
        if calls is not None and count is not None:
            count.write_text(str(calls.count))
    finally:
        os._exit(code)


def finish(command: list[str]) -> None:
    """Run a command line to its end."""
    _, status = os.waitpid(start(command), 0)
    assert os.waitstatus_to_exitcode(status) == 0, (command, status)


def files(folder: Path) -> dict[str, bytes]:
    """What a folder holds, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(folder: Path) -> int:
    """Examples in a cache, all of whose bytes are as they were written; 0 where there is none yet."""
    if not (folder / "manifest.json").exists():
        return 0
    if Manifest.read(folder).shards:  # without shards a code may not be learnt yet
        problems = Cache.verify(folder)
        assert not problems, problems
    return len(Cache(folder))


def kill_again_and_again(
    command: list[str], begin: Path | None, work: Path, kills: int, seed: int
) -> dict[str, Any]:
    """Kills runs of a command that makes a cache in `work`, or goes on with the one in `begin`."""
    rng = random.Random(seed)
    out = [*command, "--out", str(work)]

    def fresh() -> int:
        shutil.rmtree(work, ignore_errors=True)
        if begin is not None:
            shutil.copytree(begin, work)
        return rows(work)

    fresh()
    counted = work.with_name(work.name + ".calls")
    _, status = os.waitpid(start(out, Calls(None, ""), counted), 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
    whole, calls = files(work), int(counted.read_text())
    fresh()
    began = time.perf_counter()
    finish(out)  # the first run is slower
    seconds = time.perf_counter() - began
    assert files(work) == whole
    reached: list[int] = []
    killed = 0
    for number in range(kills):
        before = fresh()
        if number % 2:
            # One of the calls in each stretch of the run, so that all of it is seen.
            at = 1 + int((number // 2 + rng.random()) / (kills // 2) * calls)
            child = start(out, Calls(at, rng.choice(("before", "middle", "after"))))
        else:
            child = start(out)
            time.sleep((number // 2 + rng.random()) / ((kills + 1) // 2) * seconds)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        reached.append(rows(work))
        assert reached[-1] >= before, "examples were lost"
        finish(out)
        found = files(work)
        assert found.keys() == whole.keys(), (sorted(found), sorted(whole))
        assert found == whole, [name for name in whole if found[name] != whole[name]]
    return {"kills": killed, "seconds": seconds, "calls": calls, "reached": reached}


def work_off(job: dict[str, Any]) -> dict[str, Any]:
    """The results of a job, by name."""
    torch.set_num_threads(1)
    with quiet_libraries():  # the libraries and the model are loaded once, for all runs
        import rapidin.attribution.attributor
        import rapidin.results.terminal

        main(["cache", "none", "--data", "none", "--out", "none"])  # refused, but parsed
        loaded = rapidin.gradients.load.load_model(job["model"], adapter=job["adapter"])
    loaded.identity  # noqa: B018 (known from here on)
    rapidin.gradients.load.load_model = lambda *_, **__: loaded
    results = {}
    for name, case in job["cases"].items():
        begin = None
        if case["begin"] is not None:
            begin = Path(case["work"] + ".begin")
            finish([*case["begin"], "--out", str(begin)])
        results[name] = kill_again_and_again(
            case["command"], begin, Path(case["work"]), case["kills"], case["seed"]
        )
    return results


if __name__ == "__main__":
    print(json.dumps(work_off(json.loads(Path(sys.argv[1]).read_text()))))
