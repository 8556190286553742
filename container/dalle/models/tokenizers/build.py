"""An image tokenizer from its config, whichever graph it names."""

from __future__ import annotations

from dalle.models.configs import DVAEConfig, ImageTokenizerConfig
from dalle.models.dvae import DiscreteVAE
from dalle.models.image_tokenizer import ImageTokenizer
from dalle.models.tokenizers.configs import DallePytorchConfig, OpenAIConfig, VQGANConfig
from dalle.models.tokenizers.dalle_pytorch import DallePytorchVAE
from dalle.models.tokenizers.openai import OpenAIDVAE
from dalle.models.tokenizers.vqgan import VQGAN


def build_tokenizer(config: ImageTokenizerConfig) -> ImageTokenizer:
    """Return an image tokenizer with new weights. Raises ValueError for sizes that do not fit."""
    match config:
        case DVAEConfig():
            return DiscreteVAE(config)
        case DallePytorchConfig():
            return DallePytorchVAE(config)
        case OpenAIConfig():
            return OpenAIDVAE(config)
        case VQGANConfig():
            return VQGAN(config)
    raise ValueError(f"{type(config).__name__} is not the config of an image tokenizer")
