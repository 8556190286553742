"""The beginning of a caption to whole ones, by the transformer."""

from __future__ import annotations

import torch

from dalle.artefact import Artefact
from dalle.sampling import SamplingStopped, complete_captions
from inference.control import Control
from inference.prepare import CompleteWork
from inference.render import CompleteResult
from inference.replies import CompleteReply, Completion


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
