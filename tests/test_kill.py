"""`rapidin cache`, killed again and again with SIGKILL, ends with the bytes of an undisturbed run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from tiny import save_tiny

RUN = "import sys; from rapidin.cli import main; sys.exit(main(sys.argv[1:]))"


def shards(folder: Path) -> int:
    try:
        return len(json.loads((folder / "manifest.json").read_text())["shards"])
    except FileNotFoundError:
        return 0


def test_killed_runs_go_on_and_lose_nothing(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path, lora=True)
    data = tmp_path / "train.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": f"Say {n} ", "completion": f"it is {n * n} " * (1 + n % 5)}) + "\n"
            for n in range(400)
        )
    )

    def command(out: Path) -> list[str]:
        arguments = ["cache", str(saved.model), "--adapter", str(saved.adapter), "--data", str(data)]
        return [
            sys.executable,
            "-c",
            RUN,
            *arguments,
            "--out",
            str(out),
            "--width",
            "32",
            "--shard-rows",
            "2",
        ]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    reached = []
    for wanted in (3, 60, 110):
        process = subprocess.Popen(command(killed), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while shards(killed) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
        reached.append(shards(killed))
    assert sorted(reached) == reached
    assert reached[-1] < 200
    assert subprocess.run(command(killed), check=False).returncode == 0
    assert subprocess.run(command(whole), check=False).returncode == 0
    # What a kill in the middle of a write leaves behind is written over, so the folders are the same.
    assert {p.name: p.read_bytes() for p in killed.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }
