"""Nothing is lost: examples added to a cache, malformed ones, batches without memory, disks that fail."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from command import Ran, caller
from passes import at_pass
from tiny import save_tiny

from rapidin.attribution.attributor import Attributor
from rapidin.cache import Cache, codec
from rapidin.data.encoding import Status
from rapidin.errors import UserError
from rapidin.files import lock_folder
from rapidin.gradients import preconditioner as preconditioner_room
from rapidin.gradients.collector import GradientSketcher
from rapidin.gradients.load import load_model
from rapidin.gradients.model import LoadedModel

ROWS = [{"prompt": f"Give {n} tips.", "completion": " One, two," * (1 + n % 4) + f" {n}."} for n in range(40)]


class Place(NamedTuple):
    folder: Path
    model: str
    loaded: LoadedModel


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    model = str(save_tiny(folder, chat=True).model)
    return Place(folder, model, load_model(model))


@pytest.fixture
def run(place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """run(*arguments) -> Ran; the model is loaded already."""
    monkeypatch.setattr("rapidin.gradients.load.load_model", lambda *_, **__: place.loaded)

    return caller(capsys)


def refused(ran: Ran, words: str) -> None:
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran
    assert words in ran.err, ran.err


def write(path: Path, rows: list[Any]) -> Path:
    """Text stands for a line as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def manifest_of(files: dict[str, bytes]) -> dict[str, Any]:
    """The manifest, taken from a folder's files, without the check of gradients: other examples are first."""
    manifest: dict[str, Any] = json.loads(files.pop("manifest.json"))
    del manifest["gradient"]["check"]
    return manifest


def cache(place: Place, out: Path, *data: Path, more: tuple[str, ...] = ()) -> list[str | Path]:
    named = [part for path in data for part in ("--data", path)]
    return ["cache", place.model, *named, "--out", out, *PLAIN, *more]


def ask(out: Path, row: dict[str, str], *more: str) -> list[str | Path]:
    return ["query", out, "--prompt", row["prompt"], "--completion", row["completion"], *more]


PLAIN = ("--width", "32", "--shard-rows", "4", "--precondition", "off")  # what is said later counts
LEARNT = ("--bytes", "160", "--sample", "12")
ADAM, KFAC = ("--precondition", "sample"), ("--precondition", "kfac")


# ---------------------------------------------------------------------------------------------- --append


@pytest.mark.parametrize("further", [False, True])
def test_examples_added_to_full_shards_give_the_bytes_of_caching_all_at_once(
    place: Place, tmp_path: Path, run: Any, further: bool
) -> None:
    first, later = write(tmp_path / "a.jsonl", [*ROWS[:6], "", *ROWS[6:12]]), tmp_path / "b.jsonl"
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run(*cache(place, out, first)).code == 0
    before = contents(out)
    data = [first, write(later, ROWS[12:20])]
    if not further:
        data = [write(first, [*ROWS[:6], "", *ROWS[6:20]])]
    ran = run(*cache(place, out, *data, more=("--append",)))
    assert ran.code == 0
    assert "cached 8 examples" in ran.err
    assert "after the 12 cached before" in ran.err
    assert run(*cache(place, whole, *data)).code == 0
    added, at_once = contents(out), contents(whole)
    assert manifest_of(added) == manifest_of(at_once)
    assert added == at_once
    assert all(contents(out)[name] == data for name, data in before.items() if name.startswith("shard"))
    # Lines are counted through, the blank one too, and hits show what was added.
    assert Cache(out).index().tolist() == [*range(6), *range(7, 21)]
    ran = run(*ask(out, ROWS[17], "--json", "-"))
    best = json.loads(ran.out)["queries"][0]["top"][0]
    assert (best["index"], best["example"]) == (18, ROWS[17])
    for more in ((), ("--append",)):
        assert "all 20 examples were cached before" in run(*cache(place, out, *data, more=more)).err
    if further:
        moved = [Path(shutil.move(path, tmp_path / f"moved-{path.name}")) for path in data]
        query = ("query", out, "--prompt", "a", "--completion", "b")
        refused(run(*query), "is not at")
        assert run(*query, "--train-data", moved[0], "--train-data", moved[1]).code == 0
        refused(run(*query, "--train-data", moved[1], "--train-data", moved[0]), "is not what was cached")


@pytest.mark.parametrize("kind", [(), LEARNT, ADAM, KFAC, ("--dtype", "int4")])
def test_rows_that_were_there_are_kept_as_they_were(
    place: Place, tmp_path: Path, run: Any, kind: tuple[str, ...]
) -> None:
    """Also where the last shard is not full, and where a code or a preconditioner was learnt."""
    data, out = write(tmp_path / "a.jsonl", ROWS[:18]), tmp_path / "out"
    assert run(*cache(place, out, data, more=kind)).code == 0
    before, rows = contents(out), list(range(18))
    was = {name: getattr(Cache(out), name)(rows) for name in ("sketches", "lengths", "index", "records")}
    write(data, ROWS[:31])
    command = cache(place, out, data, more=(*kind, "--append"))
    assert run(*command).code == 0
    found = Cache(out)
    assert (len(found), found.manifest.complete, Cache.verify(out)) == (31, True, [])
    assert found.manifest.counts["ok"] == 31
    for name, value in was.items():
        assert torch.equal(getattr(found, name)(rows), value), name
    for name, value in before.items():
        if name not in ("manifest.json", "shard-000004.safetensors"):
            assert contents(out)[name] == value, name
    # A shard that is lost later is made anew as it was, with what was learnt from the first 18 rows.
    after = contents(out)
    for lost in ("shard-000002.safetensors", "shard-000006.safetensors"):
        (out / lost).unlink()
    assert run(*command).code == 0
    assert contents(out) == after
    # All at once the new rows are the same up to rounding, where nothing was learnt.
    if kind == ():
        assert run(*cache(place, tmp_path / "whole", data)).code == 0
        assert torch.allclose(Cache(tmp_path / "whole").sketches(), found.sketches(), atol=1e-3)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_what_cannot_be_added_is_refused(place: Place, tmp_path: Path, run: Any) -> None:
    data, out = write(tmp_path / "a.jsonl", ROWS[:9]), tmp_path / "out"
    command = cache(place, out, data, more=("--append",))
    assert run(*command).code == 0  # begins where there is nothing
    kept = contents(out)
    write(data, [*ROWS[1:10], *ROWS[:3]])
    refused(run(*command), "the first 9 examples are not those of the cache")
    write(data, ROWS[:14])
    refused(run(*cache(place, out, data)), "for another number of examples (9 in the cache, 14 requested)")
    write(data, ROWS[:5])
    refused(run(*command), "(9 in the cache, 5 requested)")
    assert contents(out) == kept
    (out / "shard-000001.safetensors").unlink()
    write(data, ROWS[:9])
    shutil.copytree(out, tmp_path / "copy")
    with at_pass(-1) as begun:
        assert run(*cache(place, tmp_path / "copy", data, more=("--append",))).code == 0
    with at_pass(len(begun) - 1, interrupt):  # the last pass is the missing shard's
        assert run(*command).code == 130
    write(data, ROWS[:14])
    refused(
        run(*command),
        "is unfinished: 5 of 9 examples; finish it first, with --limit 9 instead of --append",
    )
    assert run(*cache(place, out, data, more=("--limit", "9"))).code == 0
    assert contents(out) == kept
    assert run(*command).code == 0
    assert len(Cache(out)) == 14


def test_an_altered_shard_is_not_grown(place: Place, tmp_path: Path, run: Any) -> None:
    data, out = write(tmp_path / "a.jsonl", ROWS[:6]), tmp_path / "out"
    assert run(*cache(place, out, data)).code == 0
    path = out / "shard-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    write(data, ROWS[:9])
    refused(run(*cache(place, out, data, more=("--append",))), "shard-000001.safetensors' is altered")
    path.unlink()
    assert run(*cache(place, out, data, more=("--append",))).code == 0
    assert Cache.verify(out) == []


# -------------------------------------------------------------------------------------- malformed examples

BROKEN = [
    '{"prompt": "a", ',
    {"question": "a"},
    *ROWS[:3],
    "",
    {"text": "of another form"},
    '{"prompt": "a", "completion": "\\ud800"}',
    *ROWS[3:8],
    "[1, 2]",
]


def test_malformed_examples_are_skipped_where_they_may_be(place: Place, tmp_path: Path, run: Any) -> None:
    data, out = write(tmp_path / "a.jsonl", BROKEN), tmp_path / "out"
    refused(run(*cache(place, out, data)), "a.jsonl, line 1: broken JSON")
    assert not out.exists()
    command = cache(place, out, data, more=("--on-error", "skip"))
    ran = run(*command, "--quiet")
    assert ran.code == 0
    lines = ran.err.splitlines()
    for line, words in (
        (1, "broken JSON"),
        (2, "'question'"),
        (7, "'text'"),
        (8, "surrogate"),
        (14, "a list"),
    ):
        assert any(f"a.jsonl, line {line}: " in said and words in said for said in lines), (line, lines)
    assert len(lines) == 5
    found = Cache(out)
    assert found.index().tolist() == [n for n in range(14) if n != 5]
    bad = [n for n, status in enumerate(found.status().tolist()) if status == Status.MALFORMED]
    assert [found.index([n]).item() + 1 for n in bad] == [1, 2, 7, 8, 14]
    assert found.manifest.counts == {"ok": 8, "malformed": 5} | dict.fromkeys(
        ("empty", "no_target", "too_long", "nonfinite", "too_large", "truncated"), 0
    )
    assert "8 with a sketch, 5 malformed" in " ".join(run("info", out).out.split())
    ran = run(*ask(out, ROWS[5], "--json", "-", "--top-k", "20"))
    top = json.loads(ran.out)["queries"][0]["top"]
    assert (top[0]["index"], top[0]["example"]) == (10, ROWS[5])
    assert len(top) == 8
    assert "all 13 examples were cached before" in run(*command).err


def test_many_malformed_examples_are_counted_and_none_but_malformed_ones_refused(
    place: Place, tmp_path: Path, run: Any
) -> None:
    data = write(tmp_path / "a.jsonl", [ROWS[0], *["{"] * 25])
    ran = run(*cache(place, tmp_path / "out", data, more=("--on-error", "skip", "--quiet")))
    assert ran.code == 0
    assert len(ran.err.splitlines()) == 11
    assert "15 more malformed examples" in ran.err
    data = write(tmp_path / "b.jsonl", ['{"a', "[1"])
    refused(
        run(*cache(place, tmp_path / "none", data, more=("--on-error", "skip"))),
        "all 2 examples are malformed",
    )
    refused(run(*cache(place, tmp_path / "none", data, more=("--on-error", "drop"))), "'--on-error'")


def test_chats_that_the_template_refuses_are_malformed(
    place: Place, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ raise_exception('no system') if messages[0].role == 'system' else '' }}"
    tokenizer = place.loaded.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", template + tokenizer.chat_template)

    def chat(role: str) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": "a"}, {"role": "assistant", "content": "b"}]}

    data, out = write(tmp_path / "a.jsonl", [chat("user"), chat("system"), chat("user")]), tmp_path / "out"
    refused(run(*cache(place, out, data)), "a.jsonl, line 2: the chat template rejects")
    ran = run(*cache(place, out, data, more=("--on-error", "skip")))
    assert ran.code == 0
    assert "skipped: " in ran.err
    assert Cache(out).status().tolist() == [0, Status.MALFORMED, 0]


# ------------------------------------------------------------------------------------- memory that is short


def short_of_memory(monkeypatch: pytest.MonkeyPatch, fits: Any) -> list[int]:
    """Passes over batches that do not fit fail, by the allocator; the numbers of texts that were tried."""
    tried: list[int] = []

    def limited(whole: Any) -> Any:
        def call(self: GradientSketcher, batch: Any, *rest: Any, **named: Any) -> Any:
            tried.append(len(batch.ids))
            if not fits(batch):
                torch.empty(1 << 50, dtype=torch.uint8)
            return whole(self, batch, *rest, **named)

        return call

    for name in ("__call__", "squares", "add_moments"):
        monkeypatch.setattr(GradientSketcher, name, limited(getattr(GradientSketcher, name)))
    return tried


@pytest.mark.parametrize("preconditioner", ["off", "sample", "kfac"])
def test_a_batch_that_does_not_fit_is_halved(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preconditioner: str
) -> None:
    def made(out: str) -> Cache:
        return Attributor(place.loaded, width=32, preconditioner=preconditioner).cache(
            ROWS[:24], tmp_path / out
        )

    whole = made("whole")
    tried = short_of_memory(monkeypatch, lambda batch: len(batch.ids) <= 3)
    told: list[str] = []
    attributor = Attributor(place.loaded, width=32, preconditioner=preconditioner)
    small = attributor.cache(
        ROWS[:24], tmp_path / "small", on_progress=lambda p: told.append(p.message) if p.message else None
    )
    assert max(tried) > 3
    assert small.manifest.counts == whole.manifest.counts
    assert torch.allclose(small.sketches(), whole.sketches(), atol=2e-3)
    assert any("out of memory: continuing with batches of" in message for message in told)
    assert sum(n > 3 for n in tried) <= 4, "later batches are to be as small as those that fit"


@pytest.mark.parametrize("points", [(), ("--at", "1")])
def test_an_example_that_does_not_fit_alone_is_recorded(
    place: Place, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch, points: tuple[str, ...]
) -> None:
    longest = {"prompt": "All of it.", "completion": " One, two, three, four." * 12}
    data, out = write(tmp_path / "a.jsonl", [*ROWS[:5], longest, *ROWS[5:9]]), tmp_path / "out"
    short_of_memory(monkeypatch, lambda batch: batch.ids.shape[1] < 60)
    ran = run(*cache(place, out, data, more=points))
    assert ran.code == 0
    assert "9 with a sketch, 1 too large for memory" in ran.err
    assert Cache(out).status().tolist() == [0] * 5 + [Status.TOO_LARGE] + [0] * 4
    assert not Cache(out).sketches([5]).any()
    ran = run("query", out, "--prompt", "a", "--completion", " One", "--json", "-", "--top-k", "20")
    assert 5 not in [hit["index"] for hit in json.loads(ran.out)["queries"][0]["top"]]
    refused(
        run("query", out, "--prompt", longest["prompt"], "--completion", longest["completion"]),
        "does not fit into memory",
    )


def test_no_memory_elsewhere_is_one_line(
    place: Place, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that fails by the allocator, in the midst of what goes before the shards."""
    monkeypatch.setattr(codec, "learn_basis", lambda *_: torch.empty(1 << 50, dtype=torch.uint8))
    data = write(tmp_path / "a.jsonl", ROWS)
    refused(run(*cache(place, tmp_path / "out", data, more=LEARNT)), "out of memory: ")


def test_bytes_do_not_depend_on_what_was_cached_before(place: Place, tmp_path: Path) -> None:
    """On the CPU a shard's bytes follow from its own examples alone: runs that go on make the same ones."""
    for rows in (6, 12):
        Attributor(place.loaded, width=32, preconditioner="off").cache(
            ROWS[:rows], tmp_path / str(rows), shard_rows=6
        )
    name = "shard-000000.safetensors"
    assert (tmp_path / "6" / name).read_bytes() == (tmp_path / "12" / name).read_bytes()


# ------------------------------------------------------------------------------------------ disks that fail


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sees beforehand that the disk is small."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 1 << 40))


@pytest.mark.parametrize("kind", [(), LEARNT])
def test_a_full_disk(
    place: Place, tmp_path: Path, run: Any, disk: Path, monkeypatch: pytest.MonkeyPatch, kind: tuple[str, ...]
) -> None:
    data, out = write(tmp_path / "a.jsonl", ROWS * 3), disk / "out"
    refused(run(*cache(place, disk / "seen", data, more=("--width", "512"))), "MB free")
    shutil.rmtree(disk / "seen")
    if kind:  # the sample is what fills it
        (disk / "filler").write_bytes(b"\0" * (200 << 10))
    plenty(monkeypatch)
    refused(
        run(*cache(place, out, data, more=kind)), "No space left on device; what was written before is kept"
    )
    assert not list(out.glob("*.partial"))
    monkeypatch.undo()
    done = len(Cache(out)) if not kind else 0
    assert (done > 0) == (not kind)
    if done:
        assert Cache.verify(out) == []
    # With room again it goes on, and nothing that was written is made again.
    subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
    monkeypatch.setattr("rapidin.gradients.load.load_model", lambda *_, **__: place.loaded)
    ran = run(*cache(place, out, data, more=kind))
    assert ran.code == 0
    assert not done or f"after the {done} cached before" in ran.err
    assert run(*cache(place, tmp_path / "whole", data, more=kind)).code == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_disk_that_cannot_be_written(place: Place, tmp_path: Path, run: Any, disk: Path) -> None:
    data, out = write(tmp_path / "a.jsonl", ROWS[:6]), disk / "out"
    assert run(*cache(place, out, data)).code == 0
    kept = contents(out)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    write(data, ROWS[:9])
    refused(run(*cache(place, out, data, more=("--append",))), "Read-only file system")
    refused(run(*cache(place, disk / "new", data)), "Read-only file system")
    assert contents(out) == kept
    for command in (
        ("info", out),
        ("verify", out),
        ("query", out, "--prompt", "a", "--completion", "b", "--no-text"),
    ):
        assert run(*command).code == 0


def test_a_folder_that_vanishes(place: Place, tmp_path: Path, run: Any) -> None:
    data, out = write(tmp_path / "a.jsonl", ROWS[:12]), tmp_path / "out"
    with at_pass(-1) as begun:
        assert run(*cache(place, tmp_path / "whole", data)).code == 0
    last = len(begun) - 1  # the last of three shards takes the last pass
    # At one stroke: a shard may be on its way there.
    with at_pass(last, lambda: out.rename(tmp_path / "elsewhere")):
        refused(run(*cache(place, out, data)), "its folder is gone")


@pytest.mark.parametrize("kind", [(), LEARNT, KFAC])
def test_any_call_that_fails_is_one_line_and_loses_nothing(
    place: Place, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch, kind: tuple[str, ...]
) -> None:
    """Calls that bring files to disk fail one after another, each in a run of its own on the same cache."""
    data, out = write(tmp_path / "a.jsonl", ROWS[:20]), tmp_path / "out"
    command = cache(place, out, data, more=kind)
    done, failed = 0, 0
    calls = [("fsync", errno.EIO), ("replace", errno.ENOSPC), ("open", errno.EDQUOT)] * 4
    for number, (name, code) in enumerate(calls):
        left, call = 2 * number // 3 + 1, getattr(os, name)

        def failing(*arguments: Any, _call: Any = call, _code: int = code, **options: Any) -> Any:
            nonlocal left
            if isinstance(arguments[0], int) or str(arguments[0]).startswith(str(out)):
                left -= 1
            if left == 0:
                raise OSError(_code, os.strerror(_code))
            return _call(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            ran = run(*command)
        if ran.code == 0:
            break
        refused(ran, os.strerror(code))
        failed += 1
        assert not list(out.rglob("*.partial"))
        if (out / "manifest.json").exists() and Cache(out).manifest.shards:
            assert Cache.verify(out) == []
            assert len(Cache(out)) >= done
            done = len(Cache(out))
    assert failed > 5
    assert run(*command).code == 0
    assert run(*cache(place, tmp_path / "whole", data, more=kind)).code == 0
    assert contents(out) == contents(tmp_path / "whole")


# --------------------------------------------------------------------------------------------------- locks


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("rapidin.files.fcntl.flock", none)
    with pytest.raises(UserError, match=r"knows no locks.*No locks available.*; write to another disk"):
        lock_folder(tmp_path)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="cannot write into"):
        lock_folder(tmp_path / "cache")
    assert (tmp_path / "mine").read_text() == "kept"


def test_samples_of_added_examples_come_from_those_before(place: Place, tmp_path: Path) -> None:
    """A preconditioner that is lost after examples were added comes out the same."""
    options: dict[str, Any] = {
        "width": 32,
        "preconditioner": preconditioner_room.PreconditionerConfig("sample", sample=8),
    }
    Attributor(place.loaded, **options).cache(ROWS[:20], tmp_path / "out")
    before = (tmp_path / "out" / "preconditioner.safetensors").read_bytes()
    (tmp_path / "out" / "preconditioner.safetensors").unlink()
    Attributor(place.loaded, **options).cache(ROWS, tmp_path / "out", append=True)
    assert (tmp_path / "out" / "preconditioner.safetensors").read_bytes() == before
    assert len(Cache(tmp_path / "out")) == 40
