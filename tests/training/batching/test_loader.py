"""training.data.batching.loader: how many processes load images."""

import tempfile
from pathlib import Path

import pytest

from dalle.errors import JobError
from tests.training.pairs import SIZE, channel_of
from training.data.batching import loader
from training.data.batching.batches import Batches
from training.data.batching.loader import LoaderSettings, loader_settings
from training.data.sources.channel import open_channel
from training.distributed.topology import local_world_size

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("batch_bytes", "shared_memory_bytes", "num_cpus", "expected"),
    [
        (12 * MIB, 8 * GIB, 8, LoaderSettings(4, "file_descriptor")),
        (12 * MIB, 8 * GIB, 2, LoaderSettings(1, "file_descriptor")),
        (12 * MIB, 8 * GIB, 1, LoaderSettings(0, "file_descriptor")),
        (MIB, 64 * MIB, 8, LoaderSettings(4, "file_system")),
        (10 * MIB, 64 * MIB, 8, LoaderSettings(1, "file_system")),
        (50 * MIB, 64 * MIB, 8, LoaderSettings(0, "file_system")),
        (MIB, 0, 8, LoaderSettings(0, "file_system")),
    ],
)
def test_workers_follow_the_machine(batch_bytes, shared_memory_bytes, num_cpus, expected):
    settings = loader_settings(
        batch_bytes, shared_memory_bytes=shared_memory_bytes, num_cpus=num_cpus
    )
    assert settings == expected


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 4), (2, 2), (4, 1), (8, 0)])
def test_the_processes_of_a_host_share_its_processors_and_its_shared_memory(
    num_processes, num_workers
):
    """64 MiB, of which half is for batches of 2 MiB, three for each worker."""
    settings = loader_settings(
        2 * MIB, shared_memory_bytes=64 * MIB, num_cpus=64, num_processes=num_processes
    )
    assert settings.num_workers == num_workers
    few = loader_settings(1, shared_memory_bytes=GIB, num_cpus=8, num_processes=num_processes)
    assert few.num_workers == max(0, min(4, 8 // num_processes - 1))


@pytest.mark.parametrize(("told", "expected"), [(None, 1), ("4", 4), ("", 1), ("0", 1), ("x", 1)])
def test_a_loader_is_told_of_the_other_processes_of_its_host(told, expected, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if told is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
    assert local_world_size() == expected


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("shared_memory_is_small", [False, True])
def test_the_longest_temporary_folder_serves_and_a_longer_one_is_refused(
    tmp_path, monkeypatch, shared_memory_is_small
):
    """A worker whose socket has too long a path prints why, and the job would wait for ever."""
    monkeypatch.setattr(
        loader, "SMALL_SHARED_MEMORY_BYTES", 1 << 62 if shared_memory_is_small else 0
    )
    dataset = open_channel(channel_of(tmp_path, 8), image_size=SIZE)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        longest = Path(folder, "x" * (loader.MAX_TEMPORARY_FOLDER_BYTES - len(folder) - 1))
        longest.mkdir()
        monkeypatch.setenv("TMPDIR", str(longest))
        monkeypatch.setattr("tempfile.tempdir", str(longest))
        with Batches(dataset, batch_size=4, seed=0, num_workers=1) as batches:
            assert len(batches.batch(0).images) == 4
        monkeypatch.setattr("tempfile.tempdir", f"{longest}y")
        with (
            Batches(dataset, batch_size=4, seed=0, num_workers=1) as batches,
            pytest.raises(JobError, match=r"TMPDIR: the path .*y has 74 bytes.*num_workers=0"),
        ):
            batches.batch(0)
