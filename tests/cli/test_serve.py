"""rapidin serve as a process: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import caller

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'rapidin[serve]'")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'rapidin[serve]'")
from live import tiny_cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("serve")
    tiny_cache(made)
    return made


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """run(*arguments) -> Ran"""
    capsys.readouterr()
    return caller(capsys)


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of the cache, and the line that it begins with."""
    arguments = [sys.executable, "-m", "rapidin", "serve", str(folder / "cache"), "--port", "0", "--quiet"]
    environment = os.environ | {"RAPIDIN_TOKEN": "of-the-environment"}
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            yield process, process.stderr.readline()
        finally:
            process.kill()


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_ends_it(
    server: tuple[subprocess.Popen[str], str], number: signal.Signals
) -> None:
    process, line = server
    found = re.fullmatch(
        r"rapidin: open (http://127\.0\.0\.1:\d+/)\?token=of-the-environment \(Ctrl-C ends the server\)\n",
        line,
    )
    assert found, line
    request = urllib.request.Request(
        found[1] + "about", headers={"Authorization": "Bearer of-the-environment"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        about = json.load(response)
    assert (about["examples"], about["columns"]) == (30, ["source"])
    assert about["facts"]["model"] == "model"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_a_question_that_is_not_answered_is_told(server: tuple[subprocess.Popen[str], str]) -> None:
    process, line = server
    address = line.split("open ")[1].split("?")[0]
    headers = {"Authorization": "Bearer of-the-environment", "Content-Type": "application/json"}
    # Long enough to be at work when the signal comes: the model's context has room for about 100 tokens.
    value = {"prompt": "one two", "max_new_tokens": 100, "words": True, "top_k": 30}
    request = urllib.request.Request(
        address + "query", json.dumps(value).encode(), {**headers, "Accept": "text/event-stream"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        first = response.readline()
        process.send_signal(signal.SIGINT)
        rest = response.read()
    assert first.startswith(b"event: ")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    if b"event: result" in rest:  # it was faster than the signal
        assert errors == ""
    else:
        assert b'"the server is stopping"' in rest
        assert errors == "rapidin: stopped; 1 question was not answered\n"


def test_what_cannot_be_served_is_said_in_one_line(run: Any, folder: Path) -> None:
    cache = str(folder / "cache")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ran = run("serve", cache, "--port", port)
    assert (ran.code, ran.out) == (2, "")
    what = f"cannot listen on 127.0.0.1 port {port}: Address already in use"
    assert ran.err == f"rapidin: {what}; use another --host or --port\n"
    for arguments, pattern in (
        (("--token", "a", "--no-token"), "--token and --no-token do not go together"),
        (("--token", ""), "the token is empty"),
        (("--token", "a;b"), "the token has characters that addresses cannot have"),
        (("--host", "256.1.1.1"), "cannot listen on 256.1.1.1"),
        (("--port", "70000"), "'--port'"),
        (("--train-data", str(folder / "none.jsonl")), "none.jsonl"),
        (("--model", str(folder / "none")), "none"),
    ):
        refused = run("serve", cache, "--port", "0", *arguments)
        assert (refused.code, refused.out) == (2, ""), arguments
        assert pattern in refused.err, arguments
        assert len(refused.err.splitlines()) == 1, refused.err
    assert run("serve", str(folder / "none"), "--port", "0").code == 2
