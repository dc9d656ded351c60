"""Ctrl-C ends `rapidin query` with 130 and one line at whatever moment it arrives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import records, save_tiny

from rapidin.attribution.attributor import Attributor
from rapidin.gradients.load import load_model

SUMMARY = "1 query over 30 examples"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    saved = save_tiny(folder, lora=True)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in records()))
    loaded = load_model(str(saved.model), adapter=str(saved.adapter))
    return Attributor(loaded, width=32, preconditioner="off").cache(data, folder / "cache").path


def start(cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rapidin", "query", str(cache), "--prompt", "one two", "--completion", " six"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell that starts the tests in the background lets its children ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def worked(process: subprocess.Popen[str]) -> float:
    """Seconds of the CPU that a process has had: how far it is, on a busy machine too."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("moments", [pytest.param(3, id="some"), pytest.param(40, id="many")])
@pytest.mark.full
def test_a_query_that_is_interrupted_says_so(cache: Path, moments: int) -> None:
    process = start(cache)
    whole = 0.0
    while process.poll() is None:
        whole = max(whole, worked(process))
        time.sleep(0.01)
    out, err = process.communicate()
    assert (process.returncode, SUMMARY in err) == (0, True), err
    for number in range(moments):
        # Before rapidin is imported Python itself ends by the signal.
        moment = 0.15 + (whole - 0.15) * number / moments
        process = start(cache)
        while process.poll() is None and worked(process) < moment:
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        found = process.communicate(timeout=120)
        if SUMMARY in found[1]:  # the signal came when all was done
            assert (process.returncode, found[0]) in ((0, out), (130, out)), (moment, process.returncode)
            continue
        assert (process.returncode, found[1]) == (130, "rapidin: interrupted\n"), (moment, whole, found)
