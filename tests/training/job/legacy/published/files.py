"""The fixtures of `make` as the files that people hold, and what the old code makes of them."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.training.job.legacy.published.seeded_weights import seeded_weights
from training.job.legacy.config.versions import parse_version

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.safetensors"))
SIZES = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "reversible": False}
TEXT = {"num_text_tokens": 30, "text_seq_len": 16}
VAE = {
    "image_size": 32,
    "num_layers": 2,
    "num_tokens": 24,
    "codebook_dim": 6,
    "hidden_dim": 6,
    "num_resnet_blocks": 0,
}


@dataclass(frozen=True)
class Old:
    """A model of an old version: its weights, and what the old code computes with them.

    text [2, 16] and image [2, 64] tokens, the logits of text [2, 16, words] and image [2, 64, 24],
    and the greedy tokens [2, 64].
    """

    version: str
    mask: bool
    settings: dict[str, Any]
    weights: dict[str, torch.Tensor]
    text: torch.Tensor
    image: torch.Tensor
    text_logits: torch.Tensor
    image_logits: torch.Tensor
    greedy: torch.Tensor

    @property
    def hparams(self) -> dict[str, Any]:
        """As train_dalle.py writes them."""
        return TEXT | SIZES | {"loss_img_weight": 7} | self.settings

    def file(self) -> dict[str, Any]:
        """The content of the version's file."""
        if self.version == "0.1.19":
            return dict(self.weights)
        content = {"hparams": self.hparams, "vae_params": VAE, "weights": dict(self.weights)}
        if parse_version(self.version) >= (1, 1, 6):
            return content | {"version": self.version, "vae_class_name": "DiscreteVAE"}
        return content


@cache
def old(name: str) -> Old:
    with safe_open(HERE / f"{name}.safetensors", "pt") as file:
        tensors = {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
        content = json.loads(file.metadata()["content"])
    weights = seeded_weights(content["shapes"])
    weights |= {alias: weights[first] for alias, first in content["aliases"].items()}
    for each in [each for each in tensors if each.startswith("buffer.")]:
        weights[each.removeprefix("buffer.")] = tensors.pop(each)
    if parse_version(content["version"]) < (0, 9, 6):
        total = weights["to_logits.1.bias"].shape[0]
        weights["logits_mask"] = torch.zeros(1, 16 + 64, total, dtype=torch.bool)
    fields = {each: content[each] for each in ("version", "mask", "settings")}
    return Old(**fields, weights=weights, **tensors)
