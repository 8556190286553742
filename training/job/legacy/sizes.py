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
from dalle.types import ATTENTION_KINDS
from training.job.legacy.names import Layers, split_layers
from training.job.legacy.saved_model import SavedModel
from training.job.legacy.versions import FIRST, VersionRange, axial_positions, versions_of
from training.job.pretrained.weights_file import shape_of

THEIR_KINDS = (*ATTENTION_KINDS, "sparse")
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
class Wrapping:
    """What is around attention and feed-forward, the same in all layers."""

    norm: LegacyNormKind
    sandwich_norm: bool
    token_shift: bool
    rotary_width: int
    """Channels of a head that positions turn; 0 for none."""
    reversible: bool


@dataclass(frozen=True)
class Outline:
    """What shapes alone tell; `their_kinds` is None where a file's attention is not known."""

    layers: Layers
    num_layers: int
    width: int
    num_heads: int
    head_width: int
    heads_are_told: bool
    """False where they are those that the package takes by default."""
    num_words: int
    """Rows for text: the vocabulary, and padding by position where there is some."""
    text_vocab_size: int
    padding_by_position: bool
    text_length: int
    grid_size: int
    codebook_size: int
    wrapping: Wrapping
    head: str
    head_norm: str
    shares_embeddings: bool
    their_kinds: tuple[str, ...] | None
    versions: VersionRange


def outline(saved: SavedModel, choices: Choices) -> Outline:
    """Return what a file's weights and hyperparameters tell. Raises ValueError or LookupError."""
    weights = saved.weights
    layers = split_layers(weights)
    versions = versions_of(saved, layers, choices.version)
    head, head_norm = _head(weights)
    total, width = shape_of(weights, f"{head}.weight", 2)
    shares = "image_emb.linear.weight" in weights
    codebook_size = _codebook_size(saved, total, shares)
    num_words = total - codebook_size
    text_length = _text_length(saved)
    vocabulary, by_position = _vocabulary(saved, num_words, text_length, versions)
    # What the owner says must fit; a file's own version stands.
    narrowed = versions.narrowed if choices.version is None or saved.version else versions.within
    if by_position:
        versions = narrowed("0.9.0")
    elif saved.hyperparameters:
        versions = narrowed(FIRST, "0.8.3")
    if by_position and choices.hides_padding:
        raise ValueError(
            "its weights have a padding id for each position, which attention sees, and "
            "--hidden-padding says that it was hidden; leave the option out"
        )
    heads, head_width, is_told = _heads(saved, layers, choices)
    return Outline(
        layers=layers,
        num_layers=len(layers.branches),
        width=width,
        num_heads=heads,
        head_width=head_width,
        heads_are_told=is_told,
        num_words=num_words,
        text_vocab_size=vocabulary,
        padding_by_position=by_position,
        text_length=text_length,
        grid_size=_grid_size(saved, text_length),
        codebook_size=codebook_size,
        wrapping=wrapping_of(saved, layers),
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
    _refuse_looking_ahead(kinds, versions)
    _, feed_forward = found.layers.branches[0]
    hidden = not found.padding_by_position
    if choices.hides_padding is not None and not found.padding_by_position:
        hidden = choices.hides_padding
    told = saved.hyperparameters.get("stable")
    if isinstance(told, bool) and choices.is_stable not in (None, told):
        raise ValueError(
            f"the file says stable={told}, and --{'no-' * told}stable says otherwise; leave the "
            "option out"
        )
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
        norm=found.wrapping.norm,
        sandwich_norm=found.wrapping.sandwich_norm,
        token_shift=found.wrapping.token_shift,
        rotary_width=found.wrapping.rotary_width,
        reversible=found.wrapping.reversible,
        divide_by_max=told is True or choices.is_stable is True,
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


def wrapping_of(saved: SavedModel, layers: Layers) -> Wrapping:
    """Return what is around the branches, by names and shapes alone."""
    attention, feed_forward = layers.branches[0]
    rotary = _rotary(saved.weights)
    norm: LegacyNormKind = "layer"
    if "norm.gain" in attention.weights:
        norm = "length" if attention.weights["norm.gain"].numel() == 1 else "rms"
    # PreNorm, and LayerScale from 0.8.0 on, wrap every feed-forward; token shift wraps it further.
    plain = 2 if "scale" in feed_forward.weights else 1
    return Wrapping(
        norm=norm,
        sandwich_norm="norm_out.weight" in attention.weights,
        token_shift=feed_forward.num_wrappers > plain,
        rotary_width=0 if rotary is None else rotary.shape[-1],
        reversible=layers.is_reversible,
    )


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
    elif (positions := axial_positions(weights)) is not None:
        num_positions = positions[0].shape[1] * positions[1].shape[2]
    else:
        if (rotary := _rotary(weights)) is None:
            raise KeyError("transformer.pos_emb")
        rows = rotary.shape[-2] - text_length
        # Up to 1.1.1 the last input, which is never there, has no angles.
        num_positions = rows if math.isqrt(max(rows, 0)) ** 2 == rows else rows - 1
    side = math.isqrt(max(num_positions, 0))
    if side < 1 or side * side != num_positions:
        raise ValueError(f"its image has {num_positions} positions, which are no square")
    return side


def _rotary(weights: Mapping[str, Tensor]) -> Tensor | None:
    """Return the angles of rotary positions, [..., L, channels]; None where it has none."""
    angles = weights.get("transformer.pos_emb")
    if angles is not None and angles.ndim < 2:
        raise ValueError(
            f"the weight transformer.pos_emb has the shape {[*angles.shape]}, and must have at "
            "least two dimensions"
        )
    return angles


def image_positions(weights: Mapping[str, Tensor], num_positions: int, width: int) -> Tensor | None:
    """Return the embeddings of the image's positions, [N, W]; None where it has none.

    num_positions, width: of a config, whose bounds they keep: the sum has their product of values.
    """
    axial = axial_positions(weights)
    if axial is None:
        return None
    rows, columns = axial
    if rows.shape[-1] != width:
        raise ValueError(f"image_pos_emb has a width of {rows.shape[-1]}, and the model of {width}")
    columns = columns[:, :, :num_positions]
    num_rows = -(-num_positions // max(1, columns.shape[2]))
    return (rows[:, :num_rows] + columns).flatten(0, 2)[:num_positions]


def _heads(saved: SavedModel, layers: Layers, choices: Choices) -> tuple[int, int, bool]:
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


def _their_kinds(saved: SavedModel, layers: Layers, choices: Choices) -> tuple[str, ...] | None:
    """Return the package's attention kind of each layer; None where it is not known."""
    num_layers = len(layers.branches)
    told: Sequence[object] | None = None
    value = saved.hyperparameters.get("attn_types")
    if isinstance(value, str):
        told = tuple(each.strip() for each in value.split(","))
    elif isinstance(value, tuple):
        told = value
    chosen = choices.attention_kinds
    if told and chosen and _repeated(told, num_layers) != _repeated(chosen, num_layers):
        raise ValueError(
            f"the file says attn_types {','.join(map(str, told))[:200]}, and --attn-types is "
            f"{','.join(chosen)[:200]}; leave the option out"
        )
    told = told or chosen
    if told is None and saved.hyperparameters:
        told = ("full",)  # what the class does where it is not told
    is_sparse = ["layout" in attention.weights for attention, _ in layers.branches]
    if told is None:
        return ("sparse",) * num_layers if all(is_sparse) else None
    kinds = _repeated(told, num_layers)
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


def _repeated(kinds: Sequence[object], num_layers: int) -> tuple[str, ...]:
    """Return the kind of each layer; none for an empty list."""
    return tuple(str(kinds[layer % len(kinds)]) for layer in range(num_layers)) if kinds else ()


def _refuse_looking_ahead(kinds: Sequence[str], versions: VersionRange) -> None:
    """Raise ValueError where a layer sees tokens that are not sampled yet."""
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
    if versions.is_before("1.5.0"):
        return "conv_centred"
    if not versions.may_be_before("1.5.0"):
        return "conv_up_left"
    raise NotToldError(
        "the file does not tell whether its conv_like attention is that of DALLE-pytorch 1.5.0 and "
        "later, which sees other tokens than before: say the version that trained it by "
        "--dalle-pytorch-version"
    )
