"""Requests that run alone, from start to end: images classified by CLIP, captions completed.

Letters: B images, C classes, E embedding.
"""

from __future__ import annotations

import torch

from dalle.artefact import Artefact
from dalle.decoding.sampling import SamplingStopped, complete_captions
from inference.api.rendering import ClassifyResult
from inference.api.replies import CompleteReply, Completion, Prediction
from inference.engine.request import PreparedClassification, PreparedCompletion

_IMAGES_AT_ONCE = 16  # through CLIP


@torch.inference_mode()
def classify(
    artefact: Artefact, request: PreparedClassification, device: torch.device
) -> ClassifyResult:
    """Return for each image the classes that CLIP finds likeliest.

    Raises `Cancelled` or `DeadlineExceeded`.
    """
    clip = artefact.require("clip")
    request.check()
    class_embeddings = clip.encode_captions(request.classes, artefact.tokenizer)  # [C, E]
    predictions: list[Prediction] = []
    for start in range(0, len(request.images), _IMAGES_AT_ONCE):
        request.check()
        images = torch.cat(list(request.images[start : start + _IMAGES_AT_ONCE])).to(device)
        cosines = clip.encode_image(images) @ class_embeddings.T  # [B, C]
        probabilities = (cosines * clip.model.logit_scale.exp()).softmax(dim=-1)
        best = probabilities.topk(min(request.top, len(request.classes)), dim=-1)
        for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            predictions.append((indices, [request.classes[each] for each in indices], values))
    return ClassifyResult(predictions)


@torch.inference_mode()
def complete(
    artefact: Artefact, request: PreparedCompletion, device: torch.device
) -> CompleteReply:
    """Return captions that continue the given beginning, likeliest continuation first.

    Raises `Cancelled` or `DeadlineExceeded`.
    """
    request.check()
    try:
        text_tokens, log_likelihood = complete_captions(
            artefact.require("transformer"),
            request.prefix_tokens.to(device),
            num_completions=request.num_completions,
            seed=request.seed,
            options=request.options,
            on_step=lambda _: request.may_continue(),
        )
    except SamplingStopped:
        raise request.stop_error() from None
    captions = [
        Completion(caption=caption, log_likelihood=each)
        for caption, each in zip(
            artefact.require("tokenizer").decode(text_tokens), log_likelihood.tolist(), strict=True
        )
    ]
    captions.sort(key=lambda each: -each.log_likelihood)
    return CompleteReply(captions=captions, seed=request.seed)
