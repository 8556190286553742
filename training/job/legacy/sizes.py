"""Config of a DALLE-pytorch model from its hyperparameters and the shapes of its weights.

The weights decide wherever they can: many files have no hyperparameters, and those of the others
were not always the ones that the model was built with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dalle.models.legacy.config import LegacyAttentionKind, LegacyNormKind, LegacyTransformerConfig
from training.job.legacy.names import Layers, split_layers
from training.job.legacy.saved_model import SavedModel
from training.job.legacy.versions import FIRST, VersionRange
from training.job.pretrained.weights_file import shape_of

THEIR_KINDS = ("full", "axial_row", "axial_col", "conv_like", "sparse")
_DEFAULT_HEAD_WIDTH = 64  # of the class, in all versions
# Vocabularies of the tokenizers that the package offers.
KNOWN_VOCABULARIES = {49408: "clip", 7800: "kobiso's CUB200", 15000: "COCO", 21128: "Chinese BERT"}


@dataclass(frozen=True)
class Choices:
    """What only the owner of a file can tell."""

    attention_kinds: tuple[str, ...] | None = None
    """One per layer, repeated; None where the file tells."""
    version: str | None = None
    num_heads: int | None = None
    is_stable: bool | None = None
    hides_padding: bool | None = None


class NotToldError(ValueError):
    """The file does not tell something that decides what its model computes."""


@dataclass(frozen=True, eq=False)
class Resolved:
    """What a file's model is."""

    config: LegacyTransformerConfig
    layers: Layers
    head: str
    """Name of the last linear layer, without `.weight`."""
    head_norm: str
    shares_embeddings: bool
    their_kinds: tuple[str, ...]
    """The package's name of each layer's attention."""
    versions: VersionRange


@dataclass(frozen=True)
class Outline:
    """What shapes alone tell; `their_kinds` is None where a file's attention is not known."""

    layers: Layers
    num_layers: int
    width: int
    num_heads: int
    head_width: int
    num_words: int
    """Rows for text: the vocabulary, and padding by position where there is some."""
    text_vocab_size: int
    padding_by_position: bool
    text_length: int
    grid_size: int
    codebook_size: int
    norm: LegacyNormKind
    head: str
    head_norm: str
    shares_embeddings: bool
    their_kinds: tuple[str, ...] | None
    versions: VersionRange


def outline(saved: SavedModel, choices: Choices) -> Outline:
    """Return what a file's weights and hyperparameters tell. Raises ValueError or LookupError."""
    weights = saved.weights
    layers = split_layers(weights)
    versions = _versions(saved, layers, choices)
    head, head_norm = _head(weights)
    total, width = shape_of(weights, f"{head}.weight", 2)
    shares = "image_emb.linear.weight" in weights
    codebook_size = _codebook_size(saved, total, shares)
    num_words = total - codebook_size
    text_length = _text_length(saved)
    vocabulary, by_position = _vocabulary(saved, num_words, text_length, versions)
    if by_position:
        versions = versions.narrowed("0.9.0")
    elif saved.hyperparameters:
        versions = versions.narrowed(FIRST, "0.8.3")
    heads, head_width = _heads(saved, layers, choices)
    return Outline(
        layers=layers,
        num_layers=len(layers.branches),
        width=width,
        num_heads=heads,
        head_width=head_width,
        num_words=num_words,
        text_vocab_size=vocabulary,
        padding_by_position=by_position,
        text_length=text_length,
        grid_size=_grid_size(saved, text_length),
        codebook_size=codebook_size,
        norm=_norm(layers),
        head=head,
        head_norm=head_norm,
        shares_embeddings=shares,
        their_kinds=_their_kinds(saved, layers, choices),
        versions=versions,
    )


def resolve(saved: SavedModel, choices: Choices) -> Resolved:
    """Return the config of a file's model.

    Raises NotToldError where a choice is needed, ValueError or LookupError for a model that is
    not supported or not consistent.
    """
    found = outline(saved, choices)
    if found.their_kinds is None:
        raise NotToldError(
            "the file does not tell the attention of its layers: say it by --attn-types, one of "
            f"{', '.join(THEIR_KINDS)} per layer, separated by commas; a list that is shorter "
            f"than the {found.num_layers} layers repeats"
        )
    kinds, versions = found.their_kinds, found.versions
    _refuse_looking_ahead(saved, kinds, found)
    attention, feed_forward = found.layers.branches[0]
    rotary = saved.weights.get("transformer.pos_emb")
    hidden = not found.padding_by_position
    if choices.hides_padding is not None and not found.padding_by_position:
        hidden = choices.hides_padding
    stable = choices.is_stable
    if stable is None:
        stable = saved.hyperparameters.get("stable") is True
    # PreNorm, and LayerScale from 0.8.0 on, wrap every feed-forward; token shift wraps it further.
    plain = 2 if "scale" in feed_forward.weights else 1
    config = LegacyTransformerConfig(
        text_vocab_size=found.text_vocab_size,
        text_length=found.text_length,
        grid_size=found.grid_size,
        codebook_size=found.codebook_size,
        width=found.width,
        num_layers=found.num_layers,
        num_heads=found.num_heads,
        head_width=found.head_width,
        attention_kinds=tuple(_our_kind(kind, versions) for kind in kinds),
        feed_forward_ratio=shape_of(feed_forward.weights, "contract.weight", 2)[1] // found.width,
        norm=found.norm,
        sandwich_norm="norm_out.weight" in attention.weights,
        token_shift=feed_forward.num_wrappers > plain,
        rotary_width=0 if rotary is None else rotary.shape[-1],
        reversible=found.layers.is_reversible,
        divide_by_max=stable,
        padding_by_position=found.padding_by_position,
        hides_padding=hidden,
        text_loss_weight=_text_loss_weight(saved),
    )
    return Resolved(
        config,
        found.layers,
        found.head,
        found.head_norm,
        found.shares_embeddings,
        kinds,
        versions,
    )


def _text_loss_weight(saved: SavedModel) -> float:
    """Return the weight of the text's loss beside the image's; theirs was the image's, 7."""
    weight = saved.hyperparameters.get("loss_img_weight")
    if isinstance(weight, int | float) and 0.01 <= weight <= 100:
        return 1 / weight
    return 1 / 7


def _versions(saved: SavedModel, layers: Layers, choices: Choices) -> VersionRange:
    """Narrow the versions by what only some of them write."""
    if choices.version is None and saved.version is not None:
        return VersionRange(saved.version, saved.version)
    versions = VersionRange()
    attention, feed_forward = layers.branches[0]
    if saved.kind == "kobiso":
        versions = versions.narrowed("0.7.2", "0.7.2")
    is_told = choices.version is not None or choices.attention_kinds is not None
    if not is_told and "attn_types" in saved.hyperparameters:
        versions = versions.narrowed("0.3.5")  # train_dalle.py has the flag from then on
    if "epoch" in saved.names:
        versions = versions.narrowed("0.12.0")
    if "scale" in attention.weights:
        versions = versions.narrowed("0.8.0")
    else:
        versions = versions.narrowed(last="0.7.3")
    norm = _norm(layers)
    if norm == "length":
        versions = versions.narrowed("0.5.0", "0.5.1")
    elif norm == "rms":
        versions = versions.narrowed("0.6.0", "0.6.0")
    if "logits_mask" in saved.weights:
        versions = versions.narrowed(last="0.9.6")
    if "to_logits.2.weight" in saved.weights:
        versions = versions.narrowed("0.12.1", "0.12.5")
    if "transformer.pos_emb" in saved.weights or feed_forward.num_wrappers > 2:
        versions = versions.narrowed("1.0.0")
    if "norm_out.weight" in attention.weights:
        versions = versions.narrowed("1.1.0")
    if saved.vae_class is not None:
        versions = versions.narrowed("1.1.6")
    if attention.num_wrappers > feed_forward.num_wrappers:
        versions = versions.narrowed("1.4.0")
    if "image_emb.linear.weight" in saved.weights:
        versions = versions.narrowed("1.2.0")
    if choices.version is not None:
        return versions.within(choices.version, choices.version)
    return versions


def _norm(layers: Layers) -> LegacyNormKind:
    weights = layers.branches[0][0].weights
    if "norm.gain" not in weights:
        return "layer"
    return "length" if weights["norm.gain"].numel() == 1 else "rms"


def _head(weights: Mapping[str, Tensor]) -> tuple[str, str]:
    """Return the names of the last linear layer and of the norm before it."""
    for number in (1, 2):  # 2: after a module without weights, 0.12.1 to 0.12.4
        name = f"to_logits.{number}"
        if f"{name}.weight" in weights and weights[f"{name}.weight"].ndim == 2:
            return name, f"to_logits.{number - 1}"
    raise ValueError("it has no linear layer to_logits")


def _codebook_size(saved: SavedModel, total: int, shares: bool) -> int:
    if not shares:
        return shape_of(saved.weights, "image_emb.weight", 2)[0]
    words, text = saved.number("num_text_tokens"), saved.number("text_seq_len")
    if words is None or text is None or words + text >= total:
        raise NotToldError("the file shares its embeddings and does not tell num_text_tokens")
    return total - words - text


def _text_length(saved: SavedModel) -> int:
    if "text_pos_emb.weight" in saved.weights:
        return shape_of(saved.weights, "text_pos_emb.weight", 2)[0] - 1
    told = saved.number("text_seq_len")
    if told is None:
        raise NotToldError("the file does not tell text_seq_len, and rotary positions hide it")
    return told


def _vocabulary(
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


def _grid_size(saved: SavedModel, text_length: int) -> int:
    """Return the side of the image's grid; before 0.1.26 positions had that of its pixels."""
    weights = saved.weights
    if "logits_mask" in weights:
        num_positions = shape_of(weights, "logits_mask", 3)[1] - text_length
    elif (positions := _axial(weights)) is not None:
        num_positions = positions[0].shape[1] * positions[1].shape[2]
    else:
        rows = weights["transformer.pos_emb"].shape[-2] - text_length
        # Up to 1.1.1 the last input, which is never there, has no angles.
        num_positions = rows if math.isqrt(max(rows, 0)) ** 2 == rows else rows - 1
    side = math.isqrt(max(num_positions, 0))
    if side < 1 or side * side != num_positions:
        raise ValueError(f"its image has {num_positions} positions, which are no square")
    return side


def _axial(weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    for joint in "_.":
        names = [f"image_pos_emb.weights{joint}{axis}" for axis in (0, 1)]
        if all(name in weights for name in names):
            rows, columns = (weights[name] for name in names)
            fits = rows.ndim == columns.ndim == 4 and rows.shape[-1] == columns.shape[-1]
            if not fits or rows.shape[::2] != (1, 1) or columns.shape[:2] != (1, 1):
                raise ValueError(
                    f"{names[0]} and {names[1]} must have the shapes [1, rows, 1, width] and "
                    f"[1, 1, columns, width], got {[*rows.shape]} and {[*columns.shape]}"
                )
            return rows, columns
    return None


def image_positions(weights: Mapping[str, Tensor], num_positions: int, width: int) -> Tensor | None:
    """Return the embeddings of the image's positions, [N, W]; None where it has none.

    num_positions, width: of a config, whose bounds they keep: the sum has their product of values.
    """
    axial = _axial(weights)
    if axial is None:
        return None
    rows, columns = axial
    if rows.shape[-1] != width:
        raise ValueError(f"image_pos_emb has a width of {rows.shape[-1]}, and the model of {width}")
    columns = columns[:, :, :num_positions]
    num_rows = -(-num_positions // max(1, columns.shape[2]))
    return (rows[:, :num_rows] + columns).flatten(0, 2)[:num_positions]


def _heads(saved: SavedModel, layers: Layers, choices: Choices) -> tuple[int, int]:
    """Return the number of heads and the channels of each."""
    inner = shape_of(layers.branches[0][0].weights, "to_qkv.weight", 2)[0] // 3
    heads, width = choices.num_heads or saved.number("heads"), saved.number("dim_head")
    rotary = saved.weights.get("transformer.pos_emb")
    if width is None and heads is not None:
        width = inner // heads
    if width is None and rotary is not None and rotary.shape[-1] == 30:
        width = 32
    if width is None and inner % _DEFAULT_HEAD_WIDTH:
        raise NotToldError(
            f"the file does not tell how many heads its {inner} channels of attention are: say it "
            "by --heads"
        )
    width = width or _DEFAULT_HEAD_WIDTH
    if inner % width or (heads is not None and heads * width != inner):
        raise ValueError(
            f"its attention has {inner} channels, which are not {heads or 'some'} heads of {width}"
        )
    return inner // width, width


def _their_kinds(saved: SavedModel, layers: Layers, choices: Choices) -> tuple[str, ...] | None:
    """Return the package's attention kind of each layer; None where it is not known."""
    num_layers = len(layers.branches)
    told: Sequence[object] | None = choices.attention_kinds
    if told is None:
        value = saved.hyperparameters.get("attn_types")
        if isinstance(value, str):
            told = tuple(each.strip() for each in value.split(","))
        elif isinstance(value, tuple):
            told = value
        elif saved.hyperparameters:
            told = ("full",)  # what the class does where it is not told
    is_sparse = ["layout" in attention.weights for attention, _ in layers.branches]
    if told is None:
        return ("sparse",) * num_layers if all(is_sparse) else None
    kinds = tuple(str(told[layer % len(told)]) for layer in range(num_layers)) if told else ()
    for layer, kind in enumerate(kinds):
        if kind == "mlp":
            raise ValueError("attn_types has mlp, a gMLP, which is not supported")
        if kind not in THEIR_KINDS:
            raise ValueError(f"attn_types must be of {', '.join(THEIR_KINDS)}, got {kind[:40]!r}")
        if (kind == "sparse") != is_sparse[layer]:
            has = "has" if is_sparse[layer] else "lacks"
            raise ValueError(
                f"attn_types says {kind} for layer {layer}, which {has} the layout "
                "attn_fn.master_layout of sparse attention"
            )
    return kinds


def _refuse_looking_ahead(saved: SavedModel, kinds: Sequence[str], found: Outline) -> None:
    """Raise ValueError where a layer sees tokens that are not sampled yet."""
    positions = _axial(saved.weights)
    versions = found.versions
    if positions and positions[0].shape[1] * positions[1].shape[2] != found.grid_size**2:
        versions = versions.narrowed(last="0.1.25")
    is_axial = any(kind.startswith("axial") for kind in kinds)
    for kinds_of, fixed, is_there in (
        ("axial", "0.2.8", is_axial),
        ("conv_like", "0.3.5", "conv_like" in kinds),
    ):
        if not is_there or not versions.may_be_before(fixed):
            continue
        if versions.is_before(fixed):
            raise ValueError(
                f"{kinds_of} attention before DALLE-pytorch {fixed} sees tokens that come after "
                "its own, which are not there when an image is sampled: such a model cannot be "
                "served"
            )
        raise NotToldError(
            f"the file does not tell whether its {kinds_of} attention is that before DALLE-pytorch "
            f"{fixed}, which sees tokens after its own: say the version that trained it by "
            "--dalle-pytorch-version"
        )


def _our_kind(kind: str, versions: VersionRange) -> LegacyAttentionKind:
    match kind:
        case "full" | "axial_row" | "axial_col" | "sparse":
            return kind
    # A file of 1.5.0 or later has its version in it.
    return "conv_centred" if versions.may_be_before("1.5.0") else "conv_up_left"
