"""Shards whose headers are hostile are skipped and counted; the pairs of the others are read."""

import pytest

from tests.dalle.test_artefact_archive import with_headers
from tests.training.pairs import SIZE, members_of, tar_of
from training.data.skips import SkipReason
from training.data.sources.channel import open_channel


@pytest.mark.parametrize("kind", ["negative size", "giant header", "pax", "global", "name"])
def test_a_shard_with_hostile_headers_is_skipped_and_counted(kind, tmp_path, caplog):
    tar_of(tmp_path / "good.tar", members_of(range(4)))
    (tmp_path / "hostile.tar").write_bytes(with_headers(kind) + bytes(1024))
    dataset = open_channel(tmp_path, image_size=SIZE, max_bad_share=0.9)
    assert len(dataset) == 4
    assert dataset.skips.counts[SkipReason.DAMAGED_SHARD] > 0
    assert "hostile.tar: damaged" in caplog.text
