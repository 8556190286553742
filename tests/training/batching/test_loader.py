"""training.data.batching.loader: how many processes load images."""

import pytest

from training.data.batching.loader import LoaderSettings, loader_settings

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
