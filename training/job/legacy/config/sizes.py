"""Vocabulary, codes and heads of a DALLE, from shapes of its weights and hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from training.job.legacy.config.choices import Choices, NotToldError
from training.job.legacy.config.versions import VersionRange
from training.job.legacy.config.wrapping import wrapping_of
from training.job.legacy.saved.names import Layers
from training.job.legacy.saved.saved_model import SavedModel
from training.job.pretrained.weights_file import shape_of

_DEFAULT_HEAD_WIDTH = 64  # of the class, in all versions
# Vocabularies of the tokenizers that the package offers.
KNOWN_VOCABULARIES = {49408: "clip", 7800: "kobiso's CUB200", 15000: "COCO", 21128: "Chinese BERT"}


def last_layer(weights: Mapping[str, Tensor]) -> tuple[str, str]:
    """Return the names of the last linear layer and of the norm before it."""
    for number in (1, 2):  # 2: after a module without weights, 0.12.1 to 0.12.4
        name = f"to_logits.{number}"
        if f"{name}.weight" in weights and weights[f"{name}.weight"].ndim == 2:
            return name, f"to_logits.{number - 1}"
    raise ValueError("it has no linear layer to_logits")


_CODEBOOKS = (
    *("vae.codebook.weight", "vae.model.quantize.embedding.weight"),
    *("vae.model.quantize.embed.weight", "vae.enc.blocks.output.conv.w"),
)
"""Weights of VAEs with a row for each code."""


def codebook_size_of(saved: SavedModel, total: int, shares: bool) -> int:
    """Return the number of image codes. Raises NotToldError.

    total: rows of the last layer. shares: whether the embeddings are parts of it.
    """
    if not shares:
        return shape_of(saved.weights, "image_emb.weight", 2)[0]
    words, text = saved.number("num_text_tokens"), saved.number("text_seq_len")
    if words is not None and text is not None and words + text < total:
        return total - words - text
    for name in _CODEBOOKS:
        value = saved.weights.get(name)
        if value is not None and value.ndim and 0 < len(value) < total:
            return len(value)
    raise NotToldError("the file shares its embeddings and does not tell num_text_tokens")


def vocabulary_of(
    saved: SavedModel, num_words: int, text_length: int, versions: VersionRange
) -> tuple[int, bool]:
    """Return the text vocabulary without padding by position, and whether there is some."""
    told = saved.number("num_text_tokens")
    if told is not None:
        if told not in (num_words, num_words - text_length):
            raise ValueError(
                f"hparams.num_text_tokens is {told}, and its weights have {num_words} rows for text"
            )
        return told, told != num_words
    if versions.is_before("0.9.0"):
        return num_words, False
    if not versions.may_be_before("0.9.0") or num_words - text_length in KNOWN_VOCABULARIES:
        return num_words - text_length, True
    if num_words in KNOWN_VOCABULARIES:
        return num_words, False
    raise NotToldError(
        "the file does not tell whether padding has an id for each position: say the version of "
        "DALLE-pytorch by --dalle-pytorch-version"
    )


def heads_of(saved: SavedModel, layers: Layers, choices: Choices) -> tuple[int, int, bool]:
    """Return the number of heads, the channels of each, and whether anything tells them."""
    inner = shape_of(layers.branches[0][0].weights, "to_qkv.weight", 2)[0] // 3
    told, width = saved.number("heads"), saved.number("dim_head")
    if told is None and width is not None:
        told = inner // width
    if choices.num_heads is not None and told not in (None, choices.num_heads):
        raise ValueError(
            f"the file says {told} heads, and --heads is {choices.num_heads}; leave the option out"
        )
    heads = told or choices.num_heads
    # Rotary positions turn up to a sixfold of channels, nearly all of a head's.
    turned = wrapping_of(saved, layers).rotary_width
    widths = range(turned, turned + 6) if turned else (_DEFAULT_HEAD_WIDTH,)
    possible = [each for each in widths if inner % each == 0]
    if heads is not None:
        width = width or inner // heads
        if heads * width != inner:
            raise ValueError(
                f"its attention has {inner} channels, which are not {heads} heads of {width}"
            )
        if told is None and turned and width not in possible:
            raise ValueError(
                f"its rotary positions are of heads of {' or '.join(map(str, possible)) or 'other'}"
                f" channels, and --heads {heads} makes them {width} of its {inner}"
            )
        return heads, width, True
    if turned and len(possible) == 1:
        return inner // possible[0], possible[0], True
    if _DEFAULT_HEAD_WIDTH not in possible:
        raise NotToldError(
            f"the file does not tell how many heads its {inner} channels of attention are: say it "
            "by --heads"
        )
    return inner // _DEFAULT_HEAD_WIDTH, _DEFAULT_HEAD_WIDTH, False
