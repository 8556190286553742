"""CLIP: how well does a caption fit an image? A thin layer over clip-anytorch's own model class.

Ours takes images in [0, 1] of any size and text tokens with 0 as padding, and gives unit vectors;
`clip_score` is their cosine. Two kinds of weights fit in:

- trained from scratch on the job's pairs, with the artefact's tokenizer;
- an OpenAI checkpoint file (ViT or ResNet), which brings its own byte-pair encoding.

Letters: B batch, T text length, E embedding size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.errors import ArtefactError
from dalle.models.reduction import ONE_RANK, Ranks
from dalle.preprocess.openai_clip import clip_module
from dalle.preprocess.tokenizer import CaptionTokenizer

CLIP = clip_module("model").CLIP

# Of the images that OpenAI's models were trained on (openai/CLIP, clip.py).
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Everything that rebuilds a `Clip`; names in OpenAI's order and sense."""

    embed_size: int
    """E: width of the common space."""
    image_size: int
    """Side that images are resized to."""
    vision_layers: int | tuple[int, int, int, int]
    """Layers of the vision transformer; four numbers mean a modified ResNet."""
    vision_width: int
    """Channels of the image encoder."""
    patch_size: int | None
    """Side of a patch in pixels; none for a ResNet."""
    text_vocab_size: int
    """Ids that the text encoder knows, its end mark included."""
    text_length: int
    """Text tokens it reads, its start and end marks included."""
    text_width: int
    """Channels of the text encoder."""
    text_heads: int
    """Its attention heads."""
    text_layers: int
    """Its layers."""
    tokenizer: Literal["artefact", "openai"] = "artefact"
    """Whose text tokens it reads: the artefact's tokenizer, or CLIP's own byte pairs."""
    likelihood_weight: float = 0.0
    """What a nat of the transformer's log-likelihood counts beside CLIP's logit when candidates are
    ranked. 1 for drawings that their caption determines, where an unlikely picture is a wrong one;
    0 for photographs, where it may be the more interesting one."""

    def __post_init__(self) -> None:
        # The model class cuts a remainder of the image off without a word, and takes a head for
        # each 64 channels of the image encoder (32 of a ResNet's).
        if self.patch_size is not None and self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size must divide the image size {self.image_size}, got {self.patch_size}"
            )
        if self.patch_size is not None and self.vision_width % 64:
            raise ValueError(f"vision_width must be a multiple of 64, got {self.vision_width}")
        if self.text_width % self.text_heads:
            raise ValueError(
                f"text_width must be a multiple of text_heads = {self.text_heads}, "
                f"got {self.text_width}"
            )


@dataclass(frozen=True)
class ClipLoss:
    """Scalars of one training step."""

    total: Tensor
    accuracy: Tensor
    """Share of images whose own caption scores best in the batch."""


class Clip(nn.Module):
    """Image and text encoder with a common space."""

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
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)

    @classmethod
    def from_openai(cls, path: Path) -> Clip:
        """Load a checkpoint file as OpenAI published it (TorchScript archive or state dict)."""
        state = _read_openai_state(path)
        try:
            model = cls(_openai_config(state))
            model.model.load_state_dict({name: value.float() for name, value in state.items()})
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, ValueError) as error:
            raise ArtefactError(f"{path.name} is not an OpenAI CLIP: {error}") from error
        return model.eval()

    def muon_parameters(self) -> list[nn.Parameter]:
        """The matrices of both transformers; everything else is for AdamW."""
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
        pictures: Tensor | None = None,
    ) -> ClipLoss:
        """Symmetric cross-entropy over the batch's pairs (Radford et al. 2021, figure 3).

        images: [B, 3, H, W] in [0, 1]; text_tokens: [B, T] of the artefact's tokenizer. Captions
        that are equal within the batch count as one another's positives, and so do pairs whose
        images have the same number in pictures [B]. The batch is that of all ranks: each scores
        its own images and captions against everybody's.
        """
        image_features = self.encode_image(images)
        text_features = self.encode_text(text_tokens)
        scale = self.model.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()
        by_image = scale * image_features @ ranks.gather(text_features).T
        by_caption = scale * text_features @ ranks.gather(image_features).T
        same = (text_tokens[:, None] == ranks.gather(text_tokens)[None]).all(dim=-1)
        if pictures is not None:
            same |= pictures[:, None] == ranks.gather(pictures)
        same = same.float()
        targets = same / same.sum(dim=1, keepdim=True)
        total = (F.cross_entropy(by_image, targets) + F.cross_entropy(by_caption, targets)) / 2
        best = by_image.argmax(dim=1)
        return ClipLoss(total, same.gather(1, best[:, None]).mean())

    def encode_image(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1], square, any size -> unit vectors [B, E]."""
        size = self.config.image_size
        if images.shape[-1] != size:
            images = F.interpolate(
                images, size=(size, size), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        features: Tensor = self.model.encode_image((images - self.mean) / self.std)
        return F.normalize(features, dim=-1)

    def encode_text(self, text_tokens: Tensor) -> Tensor:
        """text_tokens [B, T] of the artefact's tokenizer, 0 = padding -> unit vectors [B, E]."""
        assert self.config.tokenizer == "artefact", "use encode_captions with OpenAI's weights"
        # The model reads a caption's vector at its highest id: an end mark above all others.
        end = self.config.text_vocab_size - 1
        lengths = (text_tokens != 0).sum(dim=1, keepdim=True)
        closed = F.pad(text_tokens, (0, 1)).scatter(1, lengths, end)
        features: Tensor = self.model.encode_text(closed)
        return F.normalize(features, dim=-1)

    def merit(self, clip_scores: Tensor, log_likelihood: Tensor) -> Tensor:
        """What candidates of a caption are ranked by, the greatest first: any shape, the same back.

        CLIP's logit estimates, in nats and up to a constant, how much likelier the picture is with
        this caption than without; log_likelihood [.], in nats, is what the transformer that drew
        it says. clip_scores: [.], cosines.
        """
        scale: Tensor = self.model.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()
        return scale * clip_scores + self.config.likelihood_weight * log_likelihood

    def encode_captions(
        self, captions: Sequence[str], tokenizer: CaptionTokenizer | None
    ) -> Tensor:
        """Captions -> unit vectors [B, E], whichever tokenizer these weights read.

        A caption too long for OpenAI's 77 tokens is cut, as it was in their training.
        """
        device = self.mean.device
        if self.config.tokenizer == "artefact":
            if tokenizer is None:
                raise ArtefactError("this CLIP reads the artefact's tokenizer, which is missing")
            return self.encode_text(tokenizer.encode(captions).to(device))
        tokens = _openai_tokens(captions, self.config.text_length).to(device)
        features: Tensor = self.model.encode_text(tokens)
        return F.normalize(features, dim=-1)


@cache
def _openai_tokenizer() -> Any:
    from clip.simple_tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _openai_tokens(captions: Sequence[str], text_length: int) -> Tensor:
    """[B, text_length] int64 of OpenAI's ids: start mark, words, end mark, zeros."""
    tokenizer = _openai_tokenizer()
    start, end = tokenizer.encoder["<|startoftext|>"], tokenizer.encoder["<|endoftext|>"]
    tokens = torch.zeros(len(captions), text_length, dtype=torch.int64)
    for row, caption in enumerate(captions):
        ids = [start, *tokenizer.encode(caption)[: text_length - 2], end]
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens


def _read_openai_state(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            # torch.export, which is to follow TorchScript, cannot read what OpenAI published.
            warnings.simplefilter("ignore", DeprecationWarning)
            archive = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
        state: dict[str, Tensor] = archive.state_dict()
    except (RuntimeError, ValueError):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = dict(state)
        except Exception as error:
            raise ArtefactError(
                f"{path.name} is not an OpenAI CLIP checkpoint (TorchScript archive or state dict)"
            ) from error
    # Three numbers that the archive keeps beside its weights.
    for name in ("input_resolution", "context_length", "vocab_size"):
        state.pop(name, None)
    missing = {"text_projection", "logit_scale", "token_embedding.weight"} - state.keys()
    if missing:
        raise ArtefactError(f"{path.name} is not an OpenAI CLIP: it lacks {sorted(missing)}")
    return state


def _openai_config(state: dict[str, Tensor]) -> ClipConfig:
    """Sizes from the shapes of the weights; every published model is covered."""

    def count(prefix: str) -> int:
        depth = prefix.count(".") + 1
        return len({name.split(".")[depth] for name in state if name.startswith(prefix + ".")})

    vision_layers: int | tuple[int, int, int, int]
    if "visual.proj" in state:
        vision_width, _, patch_size, _ = state["visual.conv1.weight"].shape
        vision_layers = count("visual.transformer.resblocks")
        positions = state["visual.positional_embedding"].shape[0] - 1
        image_size = math.isqrt(positions) * patch_size
    else:
        first, second, third, fourth = (count(f"visual.layer{i}") for i in (1, 2, 3, 4))
        vision_layers, patch_size = (first, second, third, fourth), None
        vision_width = state["visual.layer1.0.conv1.weight"].shape[0]
        positions = state["visual.attnpool.positional_embedding"].shape[0] - 1
        image_size = math.isqrt(positions) * 32
    text_width = state["ln_final.weight"].shape[0]
    return ClipConfig(
        embed_size=state["text_projection"].shape[1],
        image_size=image_size,
        vision_layers=vision_layers,
        vision_width=vision_width,
        patch_size=patch_size,
        text_vocab_size=state["token_embedding.weight"].shape[0],
        text_length=state["positional_embedding"].shape[0],
        text_width=text_width,
        text_heads=text_width // 64,
        text_layers=count("transformer.resblocks"),
        tokenizer="openai",
    )
