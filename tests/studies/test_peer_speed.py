"""`peers.py run`: what it counts of a package's processes, and the table of what was found."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import doc_tables
import peer_speed
import pytest
from dattri_logra import medians

STUDY = doc_tables.DOCS.parent / "studies" / "peers"

# A package whose index has ten bytes an example, and a file that does not grow with each.
BUILD = """
import sys
from pathlib import Path
data, out = map(Path, sys.argv[1:])
rows = len(data.read_text().splitlines())
(out / "rows").mkdir(parents=True)
(out / "rows" / "a").write_bytes(bytes(10 * rows))
(out / "fixed").write_bytes(bytes(100 + rows))
"""
ASK = """
import sys
asked = sys.stdin.read().splitlines()
assert asked[-1] == "exit"
"""


def test_what_the_second_run_has_more_is_counted(tmp_path: Path) -> None:
    peer = peer_speed.Peer(
        "made up", sys.executable, ["-c", BUILD, "DATA", "OUT"], ["-c", ASK], typed=True, once=("fixed",)
    )
    texts = [f"text\n{n}" for n in range(60 + peer_speed.QUESTIONS)]

    def run(
        peer: peer_speed.Peer,
        command: Sequence[str],
        places: Mapping[str, str],
        typed: str | None,
        threads: int,
    ) -> peer_speed.Taken:
        """The processes, but as if each example took 0.02 s, a question 0.1 s, and a start 0.5 s."""
        found = peer_speed.started(peer, command, places, typed, threads)
        assert found.seconds > 0
        assert found.peak_mb > 1
        if command is peer.build:
            return peer_speed.Taken(0.5 + 0.02 * len(Path(places["DATA"]).read_text().splitlines()), 7.0)
        assert typed is not None
        return peer_speed.Taken(0.5 + 0.1 * (len(typed.splitlines()) - 1), 5.0)

    row = peer_speed.measured(peer, tmp_path, texts, tmp_path, threads=1, start=run)
    assert row == {
        "name": "made up",
        "examples_per_s": pytest.approx(50.0),
        "build_start_s": pytest.approx(0.5),
        "build_peak_mb": 7.0,
        "bytes": 10.0,
        "bytes_once": 160,
        "question_s": pytest.approx(0.1),
        "question_start_s": pytest.approx(0.5),
        "question_peak_mb": 5.0,
    }
    assert [len(peer_speed.cells(row)), len(peer_speed.cells({"name": "b", "failed": "x"}))] == [
        len(peer_speed.HEADER)
    ] * 2


def test_a_package_that_fails_is_a_row_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = peer_speed.Peer("broken", sys.executable, ["-c", "raise SystemExit('no such option')"])
    gone = peer_speed.Peer("gone", str(tmp_path / "python"), [])
    monkeypatch.setattr(peer_speed, "peers", lambda folder: [broken, gone])
    out = tmp_path / "out.json"
    said: list[str] = []
    found = peer_speed.run(tmp_path, tmp_path, None, 16, 1, out, said.append)
    assert found["rows"][0] == {"name": "broken", "failed": "no such option"}
    assert "python" in found["rows"][1]["failed"]
    assert json.loads(out.read_text()) == found
    assert len(said) == 2
    assert "| broken | failed: no such option |" in peer_speed.table(found)


def test_texts_and_questions_are_of_one_file_and_differ(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(30)))
    texts = peer_speed.texts_of(path, 20)
    assert texts == [f"text {n}" for n in range(20 + peer_speed.QUESTIONS)]
    with pytest.raises(SystemExit, match="at least 2, got 1"):
        peer_speed.texts_of(path, 1)
    with pytest.raises(SystemExit, match="has 30 lines, not 38"):
        peer_speed.texts_of(path, 30)
    made = peer_speed.texts_of(None, 12)
    assert len(made) == len(set(made)) == 12 + peer_speed.QUESTIONS


def test_questions_are_timed_one_at_a_time() -> None:
    asked: list[int] = []
    found = medians([lambda n=n: asked.append(n) for n in range(3)])  # type: ignore[misc]
    assert asked == [0, 1, 2]
    assert set(found) == {"clock", "cpu"}
    assert all(seconds >= 0 for seconds in found.values())


def test_the_readme_has_what_was_measured() -> None:
    found = json.loads(peer_speed.RESULTS.read_text())
    assert doc_tables.read(STUDY / "README.md", "speed") == peer_speed.table(found)
