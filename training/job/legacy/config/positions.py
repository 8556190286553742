"""Positions of text and image in a DALLE: how many, and what is added or rotated by them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from training.job.legacy.config.choices import NotToldError
from training.job.legacy.saved.saved_model import SavedModel
from training.job.pretrained.weights_file import shape_of

_FAR = 8192  # where the package puts the image for the text's angles; before 1.0.3 they were 0


def text_length_of(saved: SavedModel) -> int:
    """Return the text tokens of a caption. Raises NotToldError."""
    if "text_pos_emb.weight" in saved.weights:
        return shape_of(saved.weights, "text_pos_emb.weight", 2)[0] - 1
    told = saved.number("text_seq_len")
    if told is None and (angles := rotary_angles(saved.weights)) is not None and angles.numel():
        # The first angle of a text token is its number, of the start mark 0.
        first = angles.reshape(-1, angles.shape[-1])[:, 0].float()
        told = _length_of_count(first)
    if told is None:
        raise NotToldError("the file does not tell text_seq_len, and rotary positions hide it")
    return told


def _length_of_count(first: Tensor) -> int | None:
    """Return how far the numbers 0, 1, 2, … go; None unless all others are those of an image."""
    counted = torch.arange(len(first))
    num_text = int((first == counted).long().cumprod(0).sum())
    others = first[num_text:]
    is_image = len(others) and bool((others == _FAR).all() or not others.any())
    return num_text - 1 if num_text > 1 and is_image else None


def grid_size_of(saved: SavedModel, text_length: int) -> int:
    """Return the side of the image's grid; before 0.1.26 positions had that of its pixels."""
    weights = saved.weights
    if "logits_mask" in weights:
        num_positions = shape_of(weights, "logits_mask", 3)[1] - text_length
    elif (positions := axial_positions(weights)) is not None:
        num_positions = positions[0].shape[1] * positions[1].shape[2]
    else:
        if (rotary := rotary_angles(weights)) is None:
            raise KeyError("transformer.pos_emb")
        rows = rotary.shape[-2] - text_length
        # Up to 1.1.1 the last input, which is never there, has no angles.
        num_positions = rows if math.isqrt(max(rows, 0)) ** 2 == rows else rows - 1
    side = math.isqrt(max(num_positions, 0))
    if side < 1 or side * side != num_positions:
        raise ValueError(f"its image has {num_positions} positions, which are no square")
    return side


def axial_positions(weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return the embeddings of the image's rows [1, R, 1, W] and columns [1, 1, C, W].

    None where it has none. Raises ValueError for another shape.
    """
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
    axial = axial_positions(weights)
    if axial is None:
        return None
    rows, columns = axial
    if rows.shape[-1] != width:
        raise ValueError(f"image_pos_emb has a width of {rows.shape[-1]}, and the model of {width}")
    columns = columns[:, :, :num_positions]
    num_rows = -(-num_positions // max(1, columns.shape[2]))
    return (rows[:, :num_rows] + columns).flatten(0, 2)[:num_positions]


def rotary_angles(weights: Mapping[str, Tensor]) -> Tensor | None:
    """Return the angles of rotary positions, [..., L, channels]; None where it has none."""
    angles = weights.get("transformer.pos_emb")
    if angles is not None and angles.ndim < 2:
        raise ValueError(
            f"the weight transformer.pos_emb has the shape {[*angles.shape]}, and must have at "
            "least two dimensions"
        )
    return angles
