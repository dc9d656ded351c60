"""The date that a chat template writes: fixed when a cache is begun, recorded, and used again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_llama, tiny_tokenizer

from rapidin import Attributor, UserError
from rapidin.cache import Manifest

CHATS = [
    {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": f"Ho {n}."}]}
    for n in range(6)
]
MODEL = tiny_llama()


def tokenizer() -> Any:
    made = tiny_tokenizer(chat=True)
    made.chat_template = "{{ strftime_now('%Y-%m-%d') + '\n' }}" + str(made.chat_template)
    return made


TOKENIZER = tokenizer()


def attributor(**settings: Any) -> Attributor:
    return Attributor(MODEL, TOKENIZER, width=64, preconditioner="off", **settings)


def text(made: Any) -> str:
    return str(TOKENIZER.decode(made.ids))


def test_a_query_replays_the_date_of_the_cache(tmp_path: Path) -> None:
    cache = attributor(date="2024-02-29").cache(CHATS, tmp_path / "cache")
    assert cache.manifest.text["date"] == "2024-02-29"
    today = attributor()  # as another process on another day makes it
    assert today.settings.date not in (None, "2024-02-29")
    source = today._alone(cache).source()
    assert text(source.example(CHATS[0])).startswith("2024-02-29\n")
    same, other = (
        a.query(cache, CHATS[:1], normalize="layer")[0].top[0] for a in (attributor(date="2024-02-29"), today)
    )
    assert (same.index, same.score) == (other.index, other.score) == (0, pytest.approx(1.0, abs=1e-3))
    (result,) = today.query(cache, [{"messages": CHATS[0]["messages"][:1]}], max_new_tokens=4)
    assert result.prompt.startswith("2024-02-29\n")
    assert Attributor.like(cache.manifest, MODEL, TOKENIZER).settings.date == "2024-02-29"


def test_caching_is_resumed_with_its_date(tmp_path: Path) -> None:
    """The date of today is recorded; a run on another day goes on with it."""
    first = attributor()
    assert first.settings.date is not None
    cache = first.cache(CHATS, tmp_path / "cache", shard_rows=2)
    manifest = Manifest.read(cache.path)
    manifest.text["date"] = "2020-01-01"
    manifest.shards = []
    manifest.write(cache.path)
    attributor().cache(CHATS, tmp_path / "cache", shard_rows=2)
    again = attributor(date="2020-01-01").cache(CHATS, tmp_path / "again", shard_rows=2)
    resumed = Manifest.read(cache.path)
    assert resumed.text["date"] == "2020-01-01"
    assert [shard.sha256 for shard in resumed.shards] == [shard.sha256 for shard in again.manifest.shards]
    with pytest.raises(UserError, match=r"another treatment of the texts \(date: 2020-01-01 in the cache"):
        attributor(date="2021-01-01").cache(CHATS, tmp_path / "cache", shard_rows=2)


def test_templates_without_a_date_record_none(tmp_path: Path) -> None:
    plain = Attributor(MODEL, tiny_tokenizer(chat=True), width=64, preconditioner="off", date="2024-02-29")
    cache = plain.cache(CHATS, tmp_path / "cache")
    assert plain.settings.date is None
    assert "date" not in cache.manifest.text
    with pytest.raises(UserError, match="'2024-02-30' is not a date"):
        attributor(date="2024-02-30")


def test_a_cache_without_a_date_is_read_with_the_clock(tmp_path: Path) -> None:
    """Earlier versions recorded none."""
    cache = attributor().cache(CHATS, tmp_path / "cache")
    manifest = Manifest.read(cache.path)
    del manifest.text["date"]
    manifest.write(cache.path)
    assert attributor().query(cache.path, CHATS[:1])[0].top[0].index == 0
