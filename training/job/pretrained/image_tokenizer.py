"""Published image tokenizers: the files of the channel `tokenizer_model` -> `ImageTokenizer`.

encoder.pkl and decoder.pkl        OpenAI's dVAE
a weights file and its .yaml       VQGAN and GumbelVQ of taming-transformers
a weights file alone               VQ-8 and VQ-16 of LlamaGen, or DALLE-pytorch's VAE
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dalle.artefact import not_finite
from dalle.errors import ForeignFileError
from dalle.manifest import is_hidden
from dalle.models.configs import ImageTokenizerConfig
from dalle.models.image_tokenizer import ImageTokenizer
from dalle.models.tokenizers.build import build_tokenizer
from training.job.pretrained import dalle_pytorch, llamagen, openai_dvae, taming
from training.job.pretrained.fill import fill_model
from training.job.pretrained.weights_file import WEIGHTS_SUFFIXES, missing_words, read_weights

_PICKLED = ("decoder.pkl", "encoder.pkl")
_WEIGHTS = (*WEIGHTS_SUFFIXES, ".ckpt", ".pkl")
_YAML = (".yaml", ".yml")
_WANTED = (
    "encoder.pkl and decoder.pkl of OpenAI's dVAE, a .ckpt of taming-transformers with its .yaml, "
    "or one .pt of LlamaGen or of DALLE-pytorch's train_vae.py"
)

Converted = tuple[ImageTokenizerConfig, dict[str, Tensor]]
"""A config, and the weights of its model by the names that the model has."""


def load_image_tokenizer(directory: Path, image_size: int | None) -> ImageTokenizer:
    """Return the image tokenizer of a channel, on the CPU, in evaluation mode, without gradients.

    image_size: side of the job's images in pixels; None for the size that it was trained on.
    Raises ForeignFileError naming the file at fault; files that hold neither weights nor YAML are
    left alone.
    """
    try:
        names = sorted(path.name for path in directory.iterdir() if not is_hidden(path.name))
    except OSError as error:
        raise ForeignFileError(f"{directory} cannot be read: {error.strerror}") from error
    weights = [name for name in names if name.endswith(_WEIGHTS)]
    yamls = [name for name in names if name.endswith(_YAML)]
    is_pickled = tuple(weights) == _PICKLED
    if len(yamls) > 1 or (is_pickled and yamls) or not (is_pickled or len(weights) == 1):
        others = f"only {', '.join(names[:5])}" if names else "no file"
        found = ", ".join((weights + yamls)[:5]) or others
        raise ForeignFileError(
            f"the channel tokenizer_model, {directory}, must hold the files of one image "
            f"tokenizer: {_WANTED}; it has {found}"
        )
    paths = [directory / name for name in weights]
    try:
        config, state = _convert(paths, [directory / name for name in yamls], image_size)
        if name := not_finite(state):
            raise ForeignFileError(
                f"{' and '.join(weights)}: the weight {name} has values that are not finite"
            )
        return fill_tokenizer(config, state)
    except LookupError as error:
        raise ForeignFileError(f"{' and '.join(weights)}: {missing_words(error)}") from error
    except ValueError as error:
        raise ForeignFileError(f"{' and '.join(weights + yamls)}: {error}") from error


def _convert(paths: list[Path], yamls: list[Path], image_size: int | None) -> Converted:
    """Return the config and weights of the files. Raises ValueError in words that follow them."""
    content = [read_weights(path) for path in paths]
    if len(content) == 2:
        decoder, encoder = content
        return openai_dvae.convert(encoder, decoder, image_size)
    (weights,) = content
    if yamls:
        return taming.convert(weights, taming.read_yaml(yamls[0]), image_size)
    if llamagen.is_llamagen(weights):
        return llamagen.convert(weights, image_size)
    if dalle_pytorch.is_vae(weights):
        return dalle_pytorch.convert(weights, image_size)
    if taming.is_taming(weights):
        raise ValueError(
            "a VQGAN of taming-transformers needs its .yaml, which tells its sizes; put it into "
            "the channel tokenizer_model beside it"
        )
    raise ValueError(f"it is none of the image tokenizers that are known: {_WANTED}")


def fill_tokenizer(config: ImageTokenizerConfig, state: Mapping[str, Tensor]) -> ImageTokenizer:
    """Return the model with these weights. Raises what `fill_model` does."""
    return fill_model(lambda: build_tokenizer(config), state)
