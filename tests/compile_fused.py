"""Compile what a fused step is made of for a GPU that need not be there, with the step's arguments.

    python -m tests.compile_fused CAPABILITY DTYPE FEED_FORWARD NORM

Without TRITON_INTERPRET. Nothing is launched; the last line is the names of what was compiled.
"""

import sys

import torch
from triton.backends.compiler import GPUTarget

from dalle.decode_batch import SlotState
from dalle.fused_launch import Kernel, check_launch
from dalle.fused_step import FusedStep
from dalle.transformer import Dalle, TransformerConfig


def main() -> None:
    target, dtype = GPUTarget("cuda", int(sys.argv[1]), 32), getattr(torch, sys.argv[2])
    compiled = set()

    def compile_only(kernel, programs):
        def launch(*arguments, num_warps=4, **constants):
            kernel_for_target = kernel.compile(arguments, constants, num_warps, target)
            check_launch(kernel_for_target, len(arguments))
            compiled.add(kernel_for_target.metadata.name)

        return launch

    Kernel.__getitem__ = compile_only
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
    step = FusedStep(model, 3)
    with torch.inference_mode():
        step._draw_and_take_in(SlotState.new(config, 3, model.text_position))
    print(*sorted(compiled))


if __name__ == "__main__":
    main()
