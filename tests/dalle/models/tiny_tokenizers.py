"""Image tokenizers of every published kind, tiny and with random weights."""

import torch

from dalle.models.image_tokenizer import ImageTokenizer
from dalle.models.tokenizers.build import build_tokenizer
from dalle.models.tokenizers.configs import DallePytorchConfig, OpenAIConfig, VQGANConfig

_VQGAN = {
    "image_size": 16,
    "codebook_size": 12,
    "width": 32,
    "channel_multipliers": (1, 2, 1),
    "num_blocks": 1,
    "attention_levels": (2,),
    "latent_channels": 8,
}
CONFIGS = {
    "dalle_pytorch": DallePytorchConfig(
        image_size=16, codebook_size=12, num_downsamples=2, width=8, num_blocks=1, code_width=6
    ),
    "openai": OpenAIConfig(
        image_size=32, codebook_size=12, width=4, decoder_input_width=8, num_blocks=2
    ),
    "nearest": VQGANConfig(**_VQGAN, code_width=6, quantiser="nearest"),
    "cosine": VQGANConfig(**_VQGAN, code_width=6, quantiser="cosine"),
    "gumbel": VQGANConfig(**_VQGAN, code_width=8, quantiser="gumbel"),
}


def tiny_tokenizer(name: str) -> ImageTokenizer:
    torch.manual_seed(0)
    return build_tokenizer(CONFIGS[name]).eval().requires_grad_(False)
