"""Config of a DALLE-pytorch model from its hyperparameters and the shapes of its weights.

The weights decide wherever they can: many files have no hyperparameters, and those of the others
were not always the ones that the model was built with.
"""

from __future__ import annotations

from dataclasses import dataclass

from dalle.models.legacy.config import LegacyTransformerConfig
from training.job.legacy.config.attention import our_kind, refuse_looking_ahead, their_kinds_of
from training.job.legacy.config.choices import THEIR_KINDS, Choices, NotToldError
from training.job.legacy.config.positions import grid_size_of, text_length_of
from training.job.legacy.config.sizes import codebook_size_of, heads_of, last_layer, vocabulary_of
from training.job.legacy.config.versions import FIRST, VersionRange, versions_of
from training.job.legacy.config.wrapping import Wrapping, wrapping_of
from training.job.legacy.saved.names import Layers, split_layers
from training.job.legacy.saved.saved_model import SavedModel
from training.job.pretrained.weights_file import shape_of


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
    head, head_norm = last_layer(weights)
    total, width = shape_of(weights, f"{head}.weight", 2)
    shares = "image_emb.linear.weight" in weights
    codebook_size = codebook_size_of(saved, total, shares)
    num_words = total - codebook_size
    text_length = text_length_of(saved)
    vocabulary, by_position = vocabulary_of(saved, num_words, text_length, versions)
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
    heads, head_width, is_told = heads_of(saved, layers, choices)
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
        grid_size=grid_size_of(saved, text_length),
        codebook_size=codebook_size,
        wrapping=wrapping_of(saved, layers),
        head=head,
        head_norm=head_norm,
        shares_embeddings=shares,
        their_kinds=their_kinds_of(saved, layers, choices),
        versions=versions,
    )


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
    refuse_looking_ahead(kinds, versions)
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
        attention_kinds=tuple(our_kind(kind, versions) for kind in kinds),
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
