"""Images and classes to probabilities, by CLIP.

Letters: B images, C classes, E embedding.
"""

from __future__ import annotations

import torch

from dalle.artefact import Artefact
from inference.api.rendering import ClassifyResult
from inference.api.replies import Prediction
from inference.engine.control import Control
from inference.engine.input_processor import ClassifyWork

_TOGETHER = 16  # images through CLIP at once


@torch.inference_mode()
def classify(
    artefact: Artefact, work: ClassifyWork, control: Control, device: torch.device
) -> ClassifyResult:
    """Say for each image which of the classes CLIP finds likeliest. Raises what `control` does."""
    clip = artefact.clip
    assert clip is not None
    control.check()
    class_embeddings = clip.encode_captions(work.classes, artefact.tokenizer)  # [C, E]
    predictions: list[Prediction] = []
    for start in range(0, len(work.images), _TOGETHER):
        control.check()
        images = torch.cat(list(work.images[start : start + _TOGETHER])).to(device)
        cosines = clip.encode_image(images) @ class_embeddings.T  # [B, C]
        probabilities = (cosines * clip.model.logit_scale.exp()).softmax(dim=-1)
        best = probabilities.topk(min(work.top, len(work.classes)), dim=-1)
        for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            predictions.append((indices, [work.classes[each] for each in indices], values))
    return ClassifyResult(predictions)
