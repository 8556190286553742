"""The discrete VAE of DALLE-pytorch (lucidrains), as its train_vae.py trains it.

Source: `DiscreteVAE` of dalle_pytorch/dalle_pytorch.py, versions 0.1.19 to 1.6.6. The names of the
weights are that file's. Its decoder ends in [-1, 1] from 0.2.5 on; images here are in [0, 1].
Letters: B batch, V codebook size, G grid size, N = G·G positions, S image size.
"""

from __future__ import annotations

from torch import Tensor, nn

from dalle.models.tokenizers.configs import DallePytorchConfig
from dalle.models.tokenizers.published import PublishedTokenizer


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.net(features) + features
        return output


class DallePytorchVAE(PublishedTokenizer):
    """DALLE-pytorch's discrete VAE."""

    config: DallePytorchConfig

    def __init__(self, config: DallePytorchConfig) -> None:
        super().__init__()
        self.config = config
        width, code_width = config.width, config.code_width
        self.codebook = nn.Embedding(config.codebook_size, code_width)
        self.encoder = nn.Sequential()
        channels = 3
        for _ in range(config.num_downsamples):
            halving = nn.Conv2d(channels, width, 4, stride=2, padding=1)
            self.encoder.append(nn.Sequential(halving, nn.ReLU()))
            channels = width
        self.encoder.extend([_Residual(width) for _ in range(config.num_blocks)])
        self.encoder.append(nn.Conv2d(width, config.codebook_size, 1))
        self.decoder = nn.Sequential()
        channels = code_width
        if config.num_blocks:
            self.decoder.append(nn.Conv2d(code_width, width, 1))
            self.decoder.extend([_Residual(width) for _ in range(config.num_blocks)])
            channels = width
        for _ in range(config.num_downsamples):
            doubling = nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1)
            self.decoder.append(nn.Sequential(doubling, nn.ReLU()))
            channels = width
        self.decoder.append(nn.Conv2d(width, 3, 1))

    def _encode(self, images: Tensor) -> Tensor:
        if self.config.is_normalised:
            images = (images - 0.5) / 0.5
        logits: Tensor = self.encoder(images)
        return logits.argmax(dim=1).flatten(1).unsqueeze(-1)

    def _decode(self, image_tokens: Tensor) -> Tensor:
        codes: Tensor = self.codebook(image_tokens[..., 0])  # [B, N, code width]
        images: Tensor = self.decoder(self.on_grid(codes))
        if self.config.is_normalised:
            images = (images + 1) * 0.5
        return images.clamp(0, 1)
