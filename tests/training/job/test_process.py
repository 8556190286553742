"""training.job.process: what a process that trains is set up with."""

import platform
import subprocess
import sys

import pytest

FAULTS_OF_TEN_STEPS = """
import resource, sys
from training.job.process import keep_memory
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
