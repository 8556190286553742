"""Compile the kernels of a GPU step for a GPU that is not there, with the step's arguments.

    python -m tests.dalle.decoding.compile_kernels CAPABILITY DTYPE FEED_FORWARD NORM

Needs TRITON_INTERPRET unset. A fake CUDA driver records the launches; the last line is the names of
the kernels.
"""

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from cuda.bindings import driver

from dalle.decoding.gpu import launch
from dalle.decoding.gpu.step import GpuStep
from dalle.decoding.step import SlotState
from dalle.models.transformer import Dalle, TransformerConfig


class AbsentDriver:
    """Driver that accepts machine code and records launches."""

    # ruff: noqa: N802 - the names are CUDA's

    CUfunction_attribute = driver.CUfunction_attribute

    def __init__(self):
        self.launched = set()

    def cuModuleLoadData(self, code):
        assert code[:4] == b"\x7fELF"
        return driver.CUresult.CUDA_SUCCESS, code

    def cuModuleGetFunction(self, module, name):
        assert name in module
        return driver.CUresult.CUDA_SUCCESS, name.decode()

    def cuFuncSetAttribute(self, function, attribute, value):
        return (driver.CUresult.CUDA_SUCCESS,)

    def cuLaunchKernel(self, function, *others):
        *sizes, stream, (values, types), extra = others
        assert all(size >= 0 for size in sizes)
        assert len(sizes) == 7
        assert (stream, extra) == (7, 0)
        assert len(values) == len(types)
        self.launched.add(function)
        return (driver.CUresult.CUDA_SUCCESS,)


def main() -> None:
    capability, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    launches: Any = launch
    launches.driver = absent = AbsentDriver()
    cuda: Any = torch.cuda
    cuda.device = nullcontext
    cuda.get_device_capability = lambda device: divmod(capability, 10)
    cuda.current_stream = lambda: SimpleNamespace(cuda_stream=7)
    config = TransformerConfig(
        text_vocab_size=11,
        text_length=5,
        grid_size=4,
        codebook_size=100,
        num_codebooks=2,
        width=96,
        num_layers=2,
        num_heads=2,
        attention_kinds=("axial_row", "full"),
        feed_forward=sys.argv[3],
        norm=sys.argv[4],
    )
    model = Dalle(config).to(dtype).eval().requires_grad_(False)
    step = GpuStep(model, 3)
    with torch.inference_mode():
        step._sample_and_run(SlotState.new(config, 3, model.text_position))
    print(*sorted(absent.launched))


if __name__ == "__main__":
    main()
