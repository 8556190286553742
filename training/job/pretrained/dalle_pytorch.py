"""The file that DALLE-pytorch's train_vae.py writes: {hparams, weights}."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dalle.models.tokenizers.configs import DallePytorchConfig
from training.job.pretrained.weights_file import Weights

_FIELDS = {
    "image_size": "image_size",
    "codebook_size": "num_tokens",
    "num_downsamples": "num_layers",
    "width": "hidden_dim",
    "num_blocks": "num_resnet_blocks",
    "code_width": "codebook_dim",
}
"""Field of the config -> hyperparameter in the file."""


def is_vae(weights: Weights) -> bool:
    """Return whether the file has the codebook of DALLE-pytorch's VAE."""
    return "weights.codebook.weight" in weights.tensors


def convert(
    weights: Weights, image_size: int | None
) -> tuple[DallePytorchConfig, dict[str, Tensor]]:
    """Return config and weights. Raises ValueError in words that follow the file's name."""
    fields: dict[str, Any] = {
        field: weights.whole_number(f"hparams.{name}", at_least=int(field != "num_blocks"))
        for field, name in _FIELDS.items()
    }
    channels = weights.values.get("hparams.channels", 3)
    if channels != 3:
        raise ValueError(f"hparams.channels must be 3, red, green and blue, got {channels}")
    config = DallePytorchConfig(**fields)
    if image_size not in (None, config.image_size):
        raise ValueError(
            f"DALLE-pytorch's VAE takes images of the size that it was trained on, "
            f"{config.image_size}, got image_size={image_size}"
        )
    return config, weights.part("weights.")
