"""VQGAN, the image tokenizer of taming-transformers, and LlamaGen's VQ-8 and VQ-16.

Sources: taming/models/vqgan.py (`VQModel`, `GumbelVQ`), taming/modules/diffusionmodules/model.py
and taming/modules/vqvae/quantize.py of CompVis/taming-transformers; `VQModel` of
tokenizer/tokenizer_image/vq_model.py of FoundationVision/LlamaGen, which is the same network with a
codebook of unit vectors. The names of the weights are taming's. Both compute with images in
[-1, 1]; images here are in [0, 1].
Letters: B batch, C channels, D code width, V codebook size, G grid size, N = G·G positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.models.tokenizers.configs import VQGANConfig
from dalle.models.tokenizers.published import PublishedTokenizer


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)


def _swish(features: Tensor) -> Tensor:
    """As the original computes it: silu's last digits are others, and add up to 1e-5 of a pixel."""
    return features * features.sigmoid()


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(inputs), _norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, features: Tensor) -> Tensor:
        inner: Tensor = self.conv1(_swish(self.norm1(features)))
        inner = self.conv2(_swish(self.norm2(inner)))
        shortcut = getattr(self, "nin_shortcut", None)
        return inner + (features if shortcut is None else shortcut(features))


class _Attention(nn.Module):
    """Attention of each position to all others, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, features: Tensor) -> Tensor:
        normed = self.norm(features)
        q, k, v = (layer(normed).flatten(2) for layer in (self.q, self.k, self.v))  # [B, C, N]
        # In the order of the original, for its last digits.
        weights = torch.bmm(q.transpose(1, 2), k) * q.shape[1] ** -0.5  # [B, N, N]
        seen = torch.bmm(v, weights.softmax(dim=2).transpose(1, 2))
        output: Tensor = features + self.proj_out(seen.view(features.shape))
        return output


class _Halve(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.conv(F.pad(features, (0, 1, 0, 1)))
        return output


class _Double(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.conv(F.interpolate(features, scale_factor=2.0, mode="nearest"))
        return output


class _Level(nn.Module):
    """Blocks at one resolution, each followed by attention where the level has it."""

    def __init__(self, inputs: int, outputs: int, num_blocks: int, *, has_attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            _Residual(outputs if number else inputs, outputs) for number in range(num_blocks)
        )
        self.attn = nn.ModuleList(_Attention(outputs) for _ in self.block if has_attention)
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            features = block(features)
            if len(self.attn):
                features = self.attn[number](features)
        output: Tensor = self.upsample(self.downsample(features))
        return output


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = _Residual(channels, channels), _Residual(channels, channels)
        self.attn_1 = _Attention(channels)

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.block_2(self.attn_1(self.block_1(features)))
        return output


class _Encoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1)
        self.down = nn.ModuleList()
        channels = config.width
        for number, multiplier in enumerate(config.channel_multipliers):
            level = _Level(
                channels,
                config.width * multiplier,
                config.num_blocks,
                has_attention=number in config.attention_levels,
            )
            channels = config.width * multiplier
            if number < len(config.channel_multipliers) - 1:
                level.downsample = _Halve(channels)
            self.down.append(level)
        self.mid = _Middle(channels)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.conv_in(images)
        for level in self.down:
            features = level(features)
        output: Tensor = self.conv_out(_swish(self.norm_out(self.mid(features))))
        return output


class _Decoder(nn.Module):
    """The levels are numbered as the encoder's: the last one comes first."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        channels = config.width * config.channel_multipliers[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = _Middle(channels)
        levels = []
        for number, multiplier in reversed([*enumerate(config.channel_multipliers)]):
            level = _Level(
                channels,
                config.width * multiplier,
                config.num_blocks + 1,
                has_attention=number in config.attention_levels,
            )
            channels = config.width * multiplier
            if number:
                level.upsample = _Double(channels)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        features: Tensor = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            features = level(features)
        output: Tensor = self.conv_out(_swish(self.norm_out(features)))
        return output


class _Nearest(nn.Module):
    """The nearest code of each latent vector; by angle where the codes are unit vectors."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.code_width)
        self.is_by_angle = config.quantiser == "cosine"

    def codebook(self) -> Tensor:
        """[V, D]"""
        weight = self.embedding.weight
        return F.normalize(weight, dim=-1) if self.is_by_angle else weight

    def tokens(self, latents: Tensor) -> Tensor:
        """[B, D, G, G] -> [B, N]"""
        vectors = latents.flatten(2).transpose(1, 2).reshape(-1, latents.shape[1])
        if self.is_by_angle:
            vectors = F.normalize(vectors, dim=-1)
        codes = self.codebook()
        # In the order of the original, so that near ties are decided alike.
        squares = vectors.square().sum(dim=1, keepdim=True) + codes.square().sum(dim=1)
        distances = squares - 2 * vectors @ codes.T
        return distances.argmin(dim=1).view(len(latents), -1)


class _Gumbel(nn.Module):
    """The code with the largest logit. The original adds noise to the logits, in use too."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.latent_channels, config.codebook_size, 1)
        self.embed = nn.Embedding(config.codebook_size, config.code_width)

    def codebook(self) -> Tensor:
        """[V, D]"""
        return self.embed.weight

    def tokens(self, latents: Tensor) -> Tensor:
        """[B, D, G, G] -> [B, N]"""
        logits: Tensor = self.proj(latents)
        return logits.argmax(dim=1).flatten(1)


class VQGAN(PublishedTokenizer):
    """Convolutional encoder and decoder with attention, and one code for each position."""

    config: VQGANConfig

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)
        self.quantize = _Gumbel(config) if config.quantiser == "gumbel" else _Nearest(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_channels, 1)

    def _encode(self, images: Tensor) -> Tensor:
        tokens = self.quantize.tokens(self.quant_conv(self.encoder(2 * images - 1)))
        return tokens.unsqueeze(-1)

    def _decode(self, image_tokens: Tensor) -> Tensor:
        codes = F.embedding(image_tokens[..., 0], self.quantize.codebook())  # [B, N, D]
        # Contiguous as the original's: in another memory format the last digits are others.
        images: Tensor = self.decoder(self.post_quant_conv(self.on_grid(codes).contiguous()))
        return (images.clamp(-1, 1) + 1) * 0.5
