"""`rapidin cache`, killed at random moments with SIGKILL, ends with the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from inputs import torch_threads
from tiny import save_tiny

from rapidin.cli import main

pytestmark = pytest.mark.full

RUN = "import sys; from rapidin.cli import main; sys.exit(main(sys.argv[1:]))"
KINDS = {
    "float16": ["--width", "32", "--precondition", "off"],
    "learnt": ["--width", "32", "--precondition", "off", "--bytes", "160", "--sample", "16"],
    "preconditioner": ["--width", "32", "--precondition", "kfac"],
}
KILLS = 20


def write(path: Path, rows: int) -> str:
    lines = [{"prompt": f"Say {n} ", "completion": f"it is {n * n} " * (1 + n % 5)} for n in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def command(place: Path, kind: str, rows: int, *more: str) -> list[str]:
    """A command line but for --out."""
    data = write(place / f"train-{rows}.jsonl", rows)
    model = [str(place / "model"), "--adapter", str(place / "adapter")]
    return ["cache", *model, "--data", data, "--shard-rows", "4", "--quiet", *KINDS[kind], *more]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of all cases, by one process that forks."""
    place = tmp_path_factory.mktemp("killed")
    save_tiny(place, lora=True)
    cases: dict[str, Any] = {}
    for name, kind, kills in (
        ("float16", "float16", KILLS),
        ("learnt", "learnt", KILLS),
        ("preconditioner", "preconditioner", 4),
        ("append float16", "float16", 8),
        ("append learnt", "learnt", 4),
    ):
        append = name.startswith("append")
        cases[name] = {
            "begin": command(place, kind, 22) if append else None,
            "command": command(place, kind, 36, *(["--append"] if append else [])),
            "work": str(place / f"work {name}"),
            "kills": kills,
            "seed": len(cases),
        }
    job = {"model": str(place / "model"), "adapter": str(place / "adapter"), "cases": cases}
    (place / "job.json").write_text(json.dumps(job))
    script = [
        sys.executable,
        str(Path(__file__).parents[1] / "support" / "killing.py"),
        str(place / "job.json"),
    ]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads do not live through a fork
    ran = subprocess.run(script, capture_output=True, text=True, check=False, env=alone)
    assert ran.returncode == 0, ran.stderr
    print(ran.stdout)
    return dict(json.loads(ran.stdout))


@pytest.mark.parametrize("name", ["float16", "learnt", "preconditioner", "append float16", "append learnt"])
def test_killed_at_random_moments_it_goes_on_and_loses_nothing(results: dict[str, Any], name: str) -> None:
    found = results[name]
    # Runs that are to kill themselves always do; on a machine that is busy another may end before its moment.
    assert found["kills"] >= len(found["reached"]) // 2, found
    assert len(set(found["reached"])) >= min(3, len(found["reached"]) // 2), found


WHOLE = int(os.environ.get("RAPIDIN_KILLS", "0"))


@pytest.mark.parametrize("kind", ["float16", "learnt"] if WHOLE else ["learnt"])
def test_whole_processes_are_killed(tmp_path: Path, kind: str) -> None:
    """A process started anew for each kill, one after another on one cache: few, for each takes seconds;
    RAPIDIN_KILLS=20 for more."""
    kills = WHOLE or 1
    save_tiny(tmp_path, lora=True)
    rows, rng = 200, random.Random(kind)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    start = [sys.executable, "-c", RUN, *command(tmp_path, kind, rows)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}

    def shards() -> int:
        """Files of the cache and of its sample, as a measure of how far a run is."""
        return sum(len(list(folder.glob("shard-*.safetensors"))) for folder in (killed, killed / "sample"))

    for number in range(kills):
        process = subprocess.Popen([*start, "--out", str(killed)], stderr=subprocess.DEVNULL, env=alone)
        wanted = max(shards(), int((number + rng.random()) / (kills + 1) * rows / 4))
        deadline = time.monotonic() + 120
        while shards() < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert subprocess.run([*start, "--out", str(killed)], check=False, env=alone).returncode == 0
    with torch_threads(1):  # as those processes: other numbers round otherwise
        assert main([*command(tmp_path, kind, rows), "--out", str(whole)]) == 0
    assert {p.name: p.read_bytes() for p in killed.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }
