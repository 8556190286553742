"""The beginning of a caption to whole ones, by the transformer."""

from __future__ import annotations

import torch

from dalle.artefact import Artefact
from dalle.decoding.sampling import SamplingStopped, complete_captions
from inference.api.rendering import CompleteResult
from inference.api.replies import CompleteReply, Completion
from inference.engine.control import Control
from inference.engine.input_processor import CompleteWork


@torch.inference_mode()
def complete(
    artefact: Artefact, work: CompleteWork, control: Control, device: torch.device
) -> CompleteResult:
    """Continue a caption, likeliest continuation first. Raises what `control` does."""
    transformer, tokenizer = artefact.transformer, artefact.tokenizer
    assert transformer is not None
    assert tokenizer is not None
    control.check()
    try:
        text_tokens, log_likelihood = complete_captions(
            transformer,
            work.prefix_tokens.to(device),
            num_completions=work.num_completions,
            seed=work.seed,
            options=work.options,
            on_step=lambda _: control.keep_going(),
        )
    except SamplingStopped:
        raise control.error() from None
    captions = [
        Completion(caption=caption, log_likelihood=each)
        for caption, each in zip(
            tokenizer.decode(text_tokens), log_likelihood.tolist(), strict=True
        )
    ]
    captions.sort(key=lambda each: -each.log_likelihood)
    return CompleteResult(CompleteReply(captions=captions, seed=work.seed))
