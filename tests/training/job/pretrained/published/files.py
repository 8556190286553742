"""The fixtures of `make` as the files that people hold: a channel's folder for each."""

import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open

from tests.training.job.pretrained.published.seeded_weights import seeded_weights

HERE = Path(__file__).parent
NAMES = ("vae", "vae_without_blocks", "openai", "vqgan", "gumbel", "vq_8", "vq_16")
VAE = {"image_size": 32, "num_layers": 2, "num_tokens": 24, "codebook_dim": 12, "hidden_dim": 16}


class ModelCheckpoint:
    """A class that Lightning's files have as a key."""


class ListConfig:
    """An object of Lightning's settings, which knows the one that it is in."""

    def __init__(self) -> None:
        self.parent = {"settings": [self]}


@dataclass(frozen=True)
class Expected:
    """images [2, 3, S, S] in [0, 1], their tokens, other tokens [2, N] and their pixels."""

    images: torch.Tensor
    tokens: torch.Tensor
    codes: torch.Tensor
    pixels: torch.Tensor
    shapes: Any


def expected(name: str) -> Expected:
    with safe_open(HERE / f"{name}.safetensors", "pt") as file:
        tensors = {each: file.get_tensor(each) for each in ("tokens", "codes", "pixels")}
        images = file.get_tensor("images") / 255
        return Expected(images=images, shapes=json.loads(file.metadata()["shapes"]), **tensors)


@cache
def _weights(name: str) -> dict[str, torch.Tensor]:
    shapes = expected(name).shapes
    return seeded_weights(shapes.get("weights", shapes))


def weights_of(name: str) -> dict[str, torch.Tensor]:
    """The weights by their published names; the tensors are shared, and not to be changed."""
    return dict(_weights(name))


def yaml_of(name: str) -> dict[str, Any]:
    """The content of taming's YAML."""
    params = {
        "embed_dim": {"vqgan": 8, "gumbel": 16}[name],
        "n_embed": 24,
        "ddconfig": expected(name).shapes["ddconfig"],
        "lossconfig": {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"},
    }
    target = {"vqgan": "VQModel", "gumbel": "GumbelVQ"}[name]
    return {"model": {"target": f"taming.models.vqgan.{target}", "params": params}}


def content_of(name: str) -> dict[Any, Any]:
    """What the weights file of a tokenizer holds, as its training writes it."""
    weights = weights_of(name)
    if name.startswith("vae"):
        num_blocks = 2 if name == "vae" else 0
        return {"hparams": VAE | {"num_resnet_blocks": num_blocks}, "weights": weights}
    if name.startswith("vq_"):
        return {"model": weights, "steps": 300_000}
    weights["loss.perceptual_loss.lin0.model.1.weight"] = torch.zeros(1, 64, 1, 1)
    settings = {"hyper_parameters": ListConfig(), "epoch": 3}
    return settings | {"callbacks": {ModelCheckpoint: {"best": 0.1}}, "state_dict": weights}


def save(content: object, path: Path, **options: bool) -> None:
    """Write a file of torch.save, also where classes of Lightning's files are in it."""
    with ExitStack() as stack:
        for package, owner in (
            ("pytorch_lightning.callbacks.model_checkpoint", ModelCheckpoint),
            ("omegaconf.listconfig", ListConfig),
        ):
            parts = package.split(".")
            names = [".".join(parts[: n + 1]) for n in range(len(parts))]
            modules = {name: ModuleType(name) for name in names}
            setattr(modules[package], owner.__name__, owner)
            stack.enter_context(patch.dict(sys.modules, modules))
            stack.enter_context(patch.object(owner, "__module__", package))
        torch.save(content, path, **options)


def put(name: str, folder: Path) -> Path:
    """Write a tokenizer's files into a folder that is there; return the folder."""
    if name == "openai":
        for half in ("encoder", "decoder"):
            shutil.copy(HERE / f"{half}.pkl", folder)
    elif name in ("vqgan", "gumbel"):
        save(content_of(name), folder / "last.ckpt")
        # JSON is YAML.
        (folder / "model.yaml").write_text(json.dumps(yaml_of(name)))
    else:
        save(content_of(name), folder / f"{name}.pt")
    return folder
