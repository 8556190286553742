"""CLIP: scores how well captions fit images. A thin layer over clip-anytorch's model class.

    images in [0, 1], captions -> unit vectors -> clip_score, their cosine

The weights are either trained from scratch on the job's pairs with the artefact's tokenizer, or
those of a published model of OpenAI or open_clip with OpenAI's byte-pair encoding. A published
model resizes images as its own code does, by Pillow.

Letters: B batch, T text length, E embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dalle.errors import ArtefactError
from dalle.models.configs import ClipConfig as ClipConfig
from dalle.models.reduction import ONE_RANK, Ranks
from dalle.preprocess.openai_clip import clip_module, openai_tokenizer
from dalle.preprocess.square import Square
from dalle.preprocess.tokenizer import CaptionTokenizer

CLIP = clip_module("model").CLIP

_MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class ClipLoss:
    """Scalars of one training step."""

    total: Tensor
    accuracy: Tensor
    """Share of images whose caption scores best in the batch."""


class Clip(nn.Module):
    """Image and text encoder with a common embedding space."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.model = CLIP(
            embed_dim=config.embed_size,
            image_resolution=config.image_size,
            vision_layers=config.vision_layers,
            vision_width=config.vision_width,
            vision_patch_size=config.patch_size,
            context_length=config.text_length,
            vocab_size=config.text_vocab_size,
            transformer_width=config.text_width,
            transformer_heads=config.text_heads,
            transformer_layers=config.text_layers,
        )
        _adapt(self.model, config)
        mean, std = (torch.tensor(each) for each in (config.image_mean, config.image_std))
        self.register_buffer("mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(3, 1, 1), persistent=False)

    @property
    def square(self) -> Square:
        """What it reads of a picture that is to be classified."""
        return Square(self.config.image_size, self.config.square_method)

    def train(self, mode: bool = True) -> Clip:
        """Set training or evaluation mode; a ResNet keeps its statistics in both.

        Those of a batch of ours would be worse than those of millions of images, and would differ
        among devices.
        """
        super().train(mode)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def muon_parameters(self) -> list[nn.Parameter]:
        """Return the matrices of both transformers; AdamW trains the other weights."""
        return [
            parameter
            for name, parameter in self.model.named_parameters()
            if ".resblocks." in name and parameter.ndim == 2
        ]

    def loss(
        self,
        images: Tensor,
        text_tokens: Tensor,
        ranks: Ranks = ONE_RANK,
        *,
        image_numbers: Tensor | None = None,
    ) -> ClipLoss:
        """Return the symmetric cross-entropy over pairs (Radford et al. 2021, figure 3).

        images: [B, 3, H, W] in [0, 1]. text_tokens: [B, T] of the artefact's tokenizer, or for a
        published model of `ClipTokenizer`.
        image_numbers: [B], equal for pairs with the same image. Pairs with equal captions or the
        same image count as positives of each other. Each rank scores its images and captions
        against those of all ranks.
        """
        image_features = self.encode_image(images)
        if self.config.tokenizer == "openai":
            text_features = F.normalize(self.model.encode_text(text_tokens), dim=-1)
        else:
            text_features = self.encode_text(text_tokens)
        scale = self.model.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()
        by_image = scale * image_features @ ranks.gather(text_features).T
        by_caption = scale * text_features @ ranks.gather(image_features).T
        same = (text_tokens[:, None] == ranks.gather(text_tokens)[None]).all(dim=-1)
        if image_numbers is not None:
            same |= image_numbers[:, None] == ranks.gather(image_numbers)
        same = same.float()
        targets = same / same.sum(dim=1, keepdim=True)
        total = (F.cross_entropy(by_image, targets) + F.cross_entropy(by_caption, targets)) / 2
        best = by_image.argmax(dim=1)
        return ClipLoss(total, same.gather(1, best[:, None]).mean())

    def encode_image(self, images: Tensor) -> Tensor:
        """Square images [B, 3, H, W] of any size in [0, 1] -> unit vectors [B, E]."""
        size = self.config.image_size
        if images.shape[-1] != size:
            if self.config.tokenizer == "openai":
                images = _resized_as_pillow(images, size)
            else:
                images = F.interpolate(
                    images, size=(size, size), mode="bicubic", antialias=True, align_corners=False
                ).clamp(0, 1)
        features: Tensor = self.model.encode_image((images - self.mean) / self.std)
        return F.normalize(features, dim=-1)

    def encode_generated(self, images: Tensor) -> Tensor:
        """The same for images that are to be written to files.

        A published CLIP reads what its own code would read of the files: 8 bits a colour, resized
        by Pillow.
        """
        if self.config.tokenizer == "artefact":
            return self.encode_image(images)
        rounded = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
        pixels = rounded.permute(0, 2, 3, 1).cpu().numpy()
        read = np.stack([self.square.of(Image.fromarray(each)) for each in pixels])
        return self.encode_image(torch.from_numpy(read).permute(0, 3, 1, 2).to(images.device) / 255)

    def encode_text(self, text_tokens: Tensor) -> Tensor:
        """text_tokens [B, T] of the artefact's tokenizer, 0 = padding -> unit vectors [B, E]."""
        assert self.config.tokenizer == "artefact", "use encode_captions with OpenAI's weights"
        # The model takes a caption's vector at its highest id, which must be the end mark.
        end = self.config.text_vocab_size - 1
        lengths = (text_tokens != 0).sum(dim=1, keepdim=True)
        closed = F.pad(text_tokens, (0, 1)).scatter(1, lengths, end)
        features: Tensor = self.model.encode_text(closed)
        return F.normalize(features, dim=-1)

    def merit(self, clip_scores: Tensor, log_likelihood: Tensor) -> Tensor:
        """Return the merit [.] that a caption's candidates are ranked by, greatest first.

        clip_scores: [.], cosines. log_likelihood: [.], of the transformer, in nats. CLIP's logit
        estimates, in nats and up to a constant, how much likelier the image is with this caption
        than without it.
        """
        scale: Tensor = self.model.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()
        return scale * clip_scores + self.config.likelihood_weight * log_likelihood

    def encode_captions(
        self, captions: Sequence[str], tokenizer: CaptionTokenizer | None
    ) -> Tensor:
        """Captions -> unit vectors [B, E], by the tokenizer of the weights.

        tokenizer: the artefact's; raises ArtefactError when it is needed and None. Captions of
        more than OpenAI's 77 tokens are cut, as in OpenAI's training.
        """
        device = self.mean.device
        if self.config.tokenizer == "artefact":
            if tokenizer is None:
                raise ArtefactError("this CLIP reads the artefact's tokenizer, which is missing")
            return self.encode_text(tokenizer.encode(captions).to(device))
        tokens = _openai_tokens(captions, self.config.text_length).to(device)
        features: Tensor = self.model.encode_text(tokens)
        return F.normalize(features, dim=-1)


def _adapt(model: Any, config: ClipConfig) -> None:
    """Change OpenAI's class where open_clip's models differ: heads, inner widths, activation."""
    towers = [(model.transformer, config.text_heads, config.text_feed_forward_width)]
    if config.patch_size is not None:
        heads = config.vision_heads or config.vision_width // 64
        towers.append((model.visual.transformer, heads, config.vision_feed_forward_width))
    for transformer, heads, inner in towers:
        width = transformer.width
        for block in transformer.resblocks:
            block.attn.num_heads, block.attn.head_dim = heads, width // heads
            if inner is not None:
                block.mlp.c_fc = nn.Linear(width, inner)
                block.mlp.c_proj = nn.Linear(inner, width)
            if config.activation == "gelu":
                block.mlp.gelu = nn.GELU()


def _resized_as_pillow(images: Tensor, size: int) -> Tensor:
    """Square images [B, 3, H, H] in [0, 1] -> [B, 3, size, size], nearly as Pillow resizes files.

    For training, on the device of the images. Pillow rounds to 8 bits after the rows and again
    after the columns.
    """
    pixels = (images.float() * 255).round().clamp(0, 255)
    for shape in ((pixels.shape[-2], size), (size, size)):
        if pixels.shape[-2:] != shape:
            pixels = F.interpolate(pixels, size=shape, mode="bicubic", antialias=True)
            pixels = (pixels + 0.5).floor().clamp(0, 255)  # halves go up
    return pixels / 255


def _openai_tokens(captions: Sequence[str], text_length: int) -> Tensor:
    """Return OpenAI's ids, int64 [B, text_length]: start mark, words, end mark, zeros."""
    tokenizer = openai_tokenizer()
    start, end = tokenizer.encoder["<|startoftext|>"], tokenizer.encoder["<|endoftext|>"]
    tokens = torch.zeros(len(captions), text_length, dtype=torch.int64)
    for row, caption in enumerate(captions):
        ids = [start, *tokenizer.encode(caption)[: text_length - 2], end]
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens
