"""training.engine.devices: the memory that a piece of work takes."""

import torch

from training.engine.devices import peak_bytes

CPU = torch.device("cpu")


def test_the_fullest_moment_counts_and_what_was_there_before_does_not():
    there = torch.ones(1 << 20)

    def work():
        twice = torch.cat([there, there])  # 8 MiB
        del twice
        return there + 1  # 4 MiB

    assert peak_bytes(work, CPU) == 8 << 20


def test_what_is_given_back_in_between_counts_once():
    assert peak_bytes(lambda: [torch.ones(1 << 20).sum() for _ in range(3)], CPU) < 5 << 20
