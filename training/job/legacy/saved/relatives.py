"""Models of the same family by others, which are told apart and not imported.

ruDALL-E (ai-forever)       Malevich and what was trained on from it, such as Emojich
minDALL-E (kakaobrain)      the transformer, alone or in a folder with its other files
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from training.job.pretrained.weights_file import Weights, shape_of


@dataclass(frozen=True)
class Relative:
    """What `inspect` says of such a file."""

    kind: str
    sizes: Mapping[str, int]
    attention: tuple[str, ...]
    vae: str
    tokenizer: str
    missing: tuple[str, ...]
    why: str
    """Why it is not imported."""
    notes: tuple[str, ...] = field(default=())


def relative_in(weights: Weights) -> Relative | None:
    """Return the model of a file's content, None where it is none of these.

    Raises LookupError or ValueError for one without a weight that tells its sizes.
    """
    for prefix in ("", "module.", "state_dict.", "state_dict.stage2.", "stage2."):
        state = weights.part(prefix)
        if "image_row_embeddings.weight" in state and "text_pos_embeddings.weight" in state:
            return _rudalle(state)
        if "tok_emb_img.weight" in state and "pos_emb_txt.weight" in state:
            return _mindalle(state)
    return None


def _rudalle(state: Mapping[str, Tensor]) -> Relative:
    codes, width = shape_of(state, "image_embeddings.weight", 2)
    grid_size = shape_of(state, "image_row_embeddings.weight", 2)[0]
    text_length = shape_of(state, "text_pos_embeddings.weight", 2)[0] - 1  # of the start mark
    num_words = shape_of(state, "text_embeddings.weight", 2)[0]
    num_layers = _count(state, "transformer.layers.")
    names = {(2048, 24): "Malevich (1.3 B), or one trained on from it, such as Emojich"}
    # ru-dalle, dalle/transformer.py: _get_layer_mask.
    attention = ["axial_col" if layer % 4 == 1 else "axial_row" for layer in range(num_layers)]
    if attention and (num_layers - 2) % 4:
        attention[-1] = "conv_like"
    sandwich = any("before_first_addition_layernorm" in name for name in state)
    return Relative(
        kind=f"ruDALL-E {names.get((width, num_layers), 'of another size')}",
        sizes={
            "width": width,
            "layers": num_layers,
            "text_vocabulary": num_words - text_length,
            "text_length": text_length,
            "grid_size": grid_size,
            "image_codes": codes,
        },
        attention=tuple(attention),
        vae="not in the file",
        tokenizer="bpe.model, byte pairs of YouTokenToMe",
        missing=(
            "its tokenizer, bpe.model of YouTokenToMe, which is not read here",
            f"its image tokenizer, SBER's GumbelVQ with {codes:,} codes: "
            "vqgan.gumbelf8-sber.model.ckpt and its .yaml",
        ),
        why=(
            "its GELU is computed by tanh, two norms follow each other before its logits, and its "
            f"rows are the last {grid_size + 1} positions"
        ),
        notes=(
            f"a padding id for each of {text_length} positions",
            *(("sandwich norm",) if sandwich else ()),
            "the file does not tell its attention heads: Malevich has 16",
        ),
    )


def _mindalle(state: Mapping[str, Tensor]) -> Relative:
    codes, width = shape_of(state, "tok_emb_img.weight", 2)
    num_positions = shape_of(state, "pos_emb_img.weight", 2)[0]
    num_layers = _count(state, "blocks.")
    is_published = (width, num_layers) == (1536, 42)
    return Relative(
        kind=f"minDALL-E {'(1.3 B)' if is_published else 'of another size'}",
        sizes={
            "width": width,
            "layers": num_layers,
            "text_vocabulary": shape_of(state, "tok_emb_txt.weight", 2)[0],
            "text_length": shape_of(state, "pos_emb_txt.weight", 2)[0],
            "grid_size": round(num_positions**0.5),
            "image_codes": codes,
        },
        attention=("full",) * num_layers,
        vae="not in the file",
        tokenizer="bpe-16k-vocab.json and bpe-16k-merges.txt",
        missing=(
            "its tokenizer, bpe-16k-vocab.json and bpe-16k-merges.txt",
            f"its image tokenizer, a VQGAN with {codes:,} codes: stage1_last.ckpt",
        ),
        why=(
            "it has no mark before the caption, a position for each image token instead of one for "
            "its row and one for its column, and a head of its own for images"
        ),
        notes=("the file does not tell its attention heads: the 1.3 B model has 24",),
    )


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    numbers = {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    return len(numbers)
