"""The image tokenizer of a DALLE-pytorch model: the weights in its own file, or files beside it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from dalle.artefact import not_finite
from dalle.errors import ForeignFileError
from dalle.models.image_tokenizer import ImageTokenizer
from dalle.models.legacy.config import LegacyTransformerConfig
from dalle.models.tokenizers.configs import DallePytorchConfig, VQGANConfig
from training.job.legacy.config.choices import NotToldError
from training.job.legacy.config.versions import VersionRange
from training.job.legacy.saved.saved_model import SavedModel
from training.job.legacy.weights import vae_weights
from training.job.pretrained import dalle_pytorch, openai_dvae
from training.job.pretrained.image_tokenizer import fill_tokenizer, load_image_tokenizer
from training.job.pretrained.weights_file import Weights, shape_of

VAEKind = Literal["DiscreteVAE", "OpenAIDiscreteVAE", "VQGanVAE"]

_NOT_COMPUTED_WITH = ("loss.", "colorize")  # LPIPS and discriminator


def vae_kind(saved: SavedModel) -> VAEKind | None:
    """Return the class of the VAE whose weights the file has; None where it has none."""
    for start, kind in (
        ("vae.codebook.", "DiscreteVAE"),
        ("vae.enc.", "OpenAIDiscreteVAE"),
        ("vae.model.", "VQGanVAE"),
    ):
        if any(name.startswith(start) and value.numel() for name, value in saved.weights.items()):
            return kind  # type: ignore[return-value]
    return None


def not_finite_in_vae(saved: SavedModel) -> str | None:
    """Return a weight of the VAE in a file that is NaN or infinite, None where all are finite."""
    unused = tuple(f"vae.model.{each}" for each in _NOT_COMPUTED_WITH)
    return not_finite(
        {
            name: each
            for name, each in saved.weights.items()
            if name.startswith("vae.") and not name.startswith(unused)
        }
    )


def is_normalised(saved: SavedModel, versions: VersionRange) -> bool:
    """Return whether the DiscreteVAE in a file normalises images, as it does from 0.2.5 on.

    Raises NotToldError where the versions leave it open.
    """
    is_open = versions.may_be_before("0.2.5") and not versions.is_before("0.2.5")
    if is_open and vae_kind(saved) == "DiscreteVAE":
        raise NotToldError(
            "the file does not tell whether its VAE is that of DALLE-pytorch 0.2.5 and later, "
            "which normalises images: say the version that trained it by --dalle-pytorch-version"
        )
    return not versions.is_before("0.2.5")


def load_vae(
    saved: SavedModel, config: LegacyTransformerConfig, versions: VersionRange, path: Path | None
) -> ImageTokenizer:
    """Return the image tokenizer of a model. path: in place of the one in its file.

    Raises ForeignFileError for a file that is none; ValueError or LookupError, in words that follow
    the name of the model's file, where there is none or it does not fit.
    """
    if path is not None:
        tokenizer = _load_files(path)
        stride = tokenizer.config.stride
        if tokenizer.config.image_size != config.grid_size * stride:
            tokenizer = _load_files(path, config.grid_size * stride)
    else:
        tokenizer = _of_weights(saved, config, versions)
    found = tokenizer.config
    if (found.codebook_size, found.grid_size) != (config.codebook_size, config.grid_size):
        raise ValueError(
            f"its image tokens are {config.grid_size} x {config.grid_size} codes of "
            f"{config.codebook_size}, and those of the VAE {found.grid_size} x {found.grid_size} "
            f"codes of {found.codebook_size}"
        )
    return tokenizer


def _load_files(path: Path, image_size: int | None = None) -> ImageTokenizer:
    if path.is_dir():
        return load_image_tokenizer(path, image_size)
    if not path.is_file():
        raise ForeignFileError(f"{path} is neither a file nor a folder")
    if path.suffix in (".yaml", ".yml"):
        raise ForeignFileError(
            f"{path} has no weights: name the file of weights beside it, or the folder of both"
        )
    with tempfile.TemporaryDirectory(prefix="vae-") as scratch:
        for each in (path, path.with_suffix(".yaml")):
            if each.exists():
                (Path(scratch) / each.name).symlink_to(each.absolute())
        return load_image_tokenizer(Path(scratch), image_size)


def _of_weights(
    saved: SavedModel, config: LegacyTransformerConfig, versions: VersionRange
) -> ImageTokenizer:
    kind, weights = vae_kind(saved), vae_weights(saved.weights)
    if kind is None:
        raise ValueError(
            "it has no weights of a VAE: give the VAE's files by --vae, a folder as for the "
            "channel tokenizer_model"
        )
    if name := not_finite_in_vae(saved):
        raise ValueError(
            f"the weight {name} has values that are not finite; give the VAE's files by --vae"
        )
    image_size = config.grid_size
    if kind == "DiscreteVAE":
        vae = _discrete_vae_config(weights, config.grid_size)
        return fill_tokenizer(replace(vae, is_normalised=is_normalised(saved, versions)), weights)
    if kind == "OpenAIDiscreteVAE":
        encoder, decoder = (Weights(Weights(weights).part(f"{half}.")) for half in ("enc", "dec"))
        return fill_tokenizer(*openai_dvae.convert(encoder, decoder, 8 * image_size))
    theirs = {
        name: value
        for name, value in Weights(weights).part("model.").items()
        if not name.startswith(_NOT_COMPUTED_WITH)
    }
    return fill_tokenizer(_vqgan_config(theirs, config.grid_size), theirs)


def _discrete_vae_config(weights: Mapping[str, Tensor], grid_size: int) -> DallePytorchConfig:
    """Return the config of a DiscreteVAE from its shapes: files before 2021-02 have no others."""
    halvings = {
        name
        for name, value in weights.items()
        if re.fullmatch(r"encoder\.\d+\.0\.weight", name) and value.shape[-1:] == (4,)
    }
    blocks = {name for name in weights if re.fullmatch(r"encoder\.\d+\.net\.0\.weight", name)}
    codebook_size, code_width = shape_of(weights, "codebook.weight", 2)
    values = {
        "image_size": grid_size << len(halvings),
        "num_layers": len(halvings),
        "num_tokens": codebook_size,
        "codebook_dim": code_width,
        "hidden_dim": shape_of(weights, "encoder.0.0.weight", 4)[0],
        "num_resnet_blocks": len(blocks),
        "channels": shape_of(weights, "encoder.0.0.weight", 4)[1],
    }
    config, _ = dalle_pytorch.convert(
        Weights(values={f"hparams.{name}": value for name, value in values.items()}), None
    )
    return config


def _vqgan_config(weights: Mapping[str, Tensor], grid_size: int) -> VQGANConfig:
    """Return the config of a VQGAN of taming-transformers from its shapes."""
    numbers = {
        int(match[1]) for name in weights if (match := re.match(r"encoder\.down\.(\d+)\.", name))
    }
    width = shape_of(weights, "encoder.conv_in.weight", 4)[0]
    widths = [
        shape_of(weights, f"encoder.down.{level}.block.0.conv1.weight", 4)[0]
        for level in range(len(numbers))
    ]
    attended = {
        int(match[1])
        for name in weights
        if (match := re.match(r"encoder\.down\.(\d+)\.attn\.", name))
    }
    is_gumbel = "quantize.embed.weight" in weights
    codebook = "quantize.embed.weight" if is_gumbel else "quantize.embedding.weight"
    codebook_size, code_width = shape_of(weights, codebook, 2)
    blocks = {
        match[1] for name in weights if (match := re.match(r"encoder\.down\.0\.block\.(\d+)", name))
    }
    return VQGANConfig(
        image_size=grid_size << (len(numbers) - 1),
        codebook_size=codebook_size,
        width=width,
        channel_multipliers=tuple(each // width for each in widths),
        num_blocks=len(blocks),
        attention_levels=tuple(sorted(attended)),
        latent_channels=shape_of(weights, "encoder.conv_out.weight", 4)[0],
        code_width=code_width,
        quantiser="gumbel" if is_gumbel else "nearest",
    )
