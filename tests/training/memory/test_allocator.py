"""training.memory.allocator: glibc keeps freed memory, and torch's peak is measured."""

import platform
import subprocess
import sys

import pytest
import torch

from training.memory.allocator import peak_bytes

CPU = torch.device("cpu")

FAULTS_OF_TEN_STEPS = """
import resource, sys
from training.memory.allocator import keep_memory
if sys.argv[1] == "keeps":
    keep_memory()
import torch

torch.set_num_threads(1)
layers = [torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256)]
model = torch.nn.Sequential(*layers, *layers)
inputs = torch.randn(1024, 256)

def step():
    model.zero_grad()
    model(inputs).square().sum().backward()

for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_the_next_step_finds_its_memory_where_the_last_one_left_it():
    faults = {
        name: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS_OF_TEN_STEPS, name],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for name in ("keeps", "returns")
    }
    if faults["returns"] < 1000:
        pytest.skip(f"pages are large here: {faults}")
    assert faults["keeps"] < faults["returns"] / 2, faults


def test_the_fullest_moment_counts_and_what_was_there_before_does_not():
    there = torch.ones(1 << 20)

    def work():
        twice = torch.cat([there, there])  # 8 MiB
        del twice
        return there + 1  # 4 MiB

    assert peak_bytes(work, CPU) == 8 << 20


def test_what_is_given_back_in_between_counts_once():
    assert peak_bytes(lambda: [torch.ones(1 << 20).sum() for _ in range(3)], CPU) < 5 << 20
