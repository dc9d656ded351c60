"""docs/measured/scaling.md shows what its script prints, and the script's model says what must be so."""

from __future__ import annotations

from itertools import pairwise

import doc_tables
import pytest
import scaling

from rapidin.cache.build import MAX_SHARDS


def test_the_page_shows_what_the_script_prints() -> None:
    made = scaling.tables(scaling.Measured.read(), scaling.Assumed())
    assert doc_tables.read(scaling.PAGE, scaling.NAME) == f"\n{made}\n"
    assert all(len(line.split("|")) in (1, 4, 8, 13) for line in made.splitlines())


@pytest.mark.parametrize("examples", [1, 1000, 52_000, 10**6, 10**8, 10**10])
def test_more_gpus_are_never_slower_and_shards_stay_few(examples: int) -> None:
    measured, assumed = scaling.Measured.read(), scaling.Assumed()
    rows = [scaling.outlook(examples, gpus, measured, assumed) for gpus in (1, 8, 64, 1024)]
    for before, after in pairwise(rows):
        assert after.seconds <= before.seconds
        assert after.scan_disk <= before.scan_disk
    for row in rows:
        assert row.seconds >= examples / assumed.rate / row.gpus
        assert 1 <= row.shards <= MAX_SHARDS + 1
        assert row.cache == examples * assumed.example


def test_a_shard_of_the_model_is_a_shard_of_a_cache() -> None:
    from small_caches import manifest

    from rapidin.cache.build import shard_rows
    from rapidin.cache.codec import CodecConfig

    measured, assumed = scaling.Measured.read(), scaling.Assumed()
    for examples in (52_000, 10**6, 10**8, 10**10):
        real = manifest(rows=examples, codec=CodecConfig("sign", assumed.example))
        real.shard_rows = shard_rows(real)
        assert scaling.outlook(examples, 8, measured, assumed).shards == real.shards_in_all
