"""Processors and memory: a container's limits apply, and file caches count as free."""

import os

import pytest

from dalle.platform.limits import free_host_memory, memory_limit, usable_cpus

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    """Writes files under a root that stands for /; a host with 16 GiB available."""

    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return tmp_path

    write("proc/meminfo", f"MemTotal: 99 kB\nMemAvailable:   {16 * GIB // 1024} kB\n")
    return write


def test_without_limits_the_hosts_memory_counts(machine):
    machine("proc/self/cgroup", "0::/\n")
    root = machine("sys/fs/cgroup/memory.max", "max\n")
    assert free_host_memory(root) == 16 * GIB


def test_a_limit_above_this_process_counts_less_what_is_used_besides_file_caches(machine):
    machine("proc/self/cgroup", "0::/system/job\n")
    machine("sys/fs/cgroup/system/job/memory.max", "max")
    machine("sys/fs/cgroup/system/memory.max", f"{4 * GIB}")
    machine("sys/fs/cgroup/system/memory.current", f"{3 * GIB}")
    root = machine("sys/fs/cgroup/system/memory.stat", f"anon 5\ninactive_file {GIB}\n")
    assert free_host_memory(root) == 2 * GIB


def test_cgroups_of_version_1_count_too_and_their_number_for_no_limit_does_not(machine):
    machine("proc/self/cgroup", "5:memory:/docker/abc\n")
    machine("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2 * GIB}")
    machine("sys/fs/cgroup/memory/memory.usage_in_bytes", f"{GIB}")
    machine("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "9223372036854771712")
    root = machine("sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes", "0")
    assert free_host_memory(root) == GIB


def test_more_use_than_the_limit_is_no_free_memory(machine):
    machine("sys/fs/cgroup/memory.max", f"{GIB}")
    root = machine("sys/fs/cgroup/memory.current", f"{2 * GIB}")
    assert free_host_memory(root) == 0


def test_the_limit_is_the_least_of_all_cgroups(machine):
    machine("proc/self/cgroup", "0::/system/job\n")
    machine("sys/fs/cgroup/system/job/memory.max", f"{3 * GIB}")
    root = machine("sys/fs/cgroup/system/memory.max", "max")
    assert memory_limit(root) == 3 * GIB
    machine("sys/fs/cgroup/system/memory.max", f"{2 * GIB}")
    assert memory_limit(root) == 2 * GIB


def test_without_a_limit_there_is_none(machine):
    root = machine("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    assert memory_limit(root) is None


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({}, None),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "90000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            },
            1,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_processors_that_a_container_may_not_use_are_not_counted(tmp_path, files, most):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert usable_cpus(tmp_path) == (most or len(os.sched_getaffinity(0)))
