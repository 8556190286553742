"""The weights of a DALLE-pytorch model by the names of `LegacyTransformer`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from training.job.legacy.config.positions import image_positions
from training.job.legacy.config.resolve import Resolved
from training.job.legacy.saved.names import Branch
from training.job.legacy.saved.saved_model import SavedModel

_USED = re.compile(
    r"(transformer\.(layers|pos_emb)|text_emb|image_emb|text_pos_emb|image_pos_emb|to_logits"
    r"|logits_mask|vae)\b.*"
)


def convert(saved: SavedModel, resolved: Resolved) -> dict[str, Tensor]:
    """Return the weights. Raises ValueError or LookupError naming one that does not fit."""
    weights, config = saved.weights, resolved.config
    for name in weights:
        if not _USED.fullmatch(name):
            raise ValueError(f"the weight {name} is unknown")
    head, bias = weights[f"{resolved.head}.weight"], weights[f"{resolved.head}.bias"]
    if bias.shape != head.shape[:1]:
        raise ValueError(
            f"the weight {resolved.head}.bias has the shape {[*bias.shape]}, and must have "
            f"{[len(head)]}"
        )
    num_words = len(head) - config.codebook_size
    if resolved.shares_embeddings:
        text, image = head[:num_words], head[num_words:]
    else:
        text, image = weights["text_emb.weight"], weights["image_emb.weight"]
    state = {
        "text_embedding.weight": text,
        "code_embedding.weight": image,
        "text_position": _or_zeros(
            weights.get("text_pos_emb.weight"), config.text_length + 1, config.width
        ),
        "image_position": _or_zeros(
            image_positions(weights, config.num_positions, config.width),
            config.num_positions,
            config.width,
        ),
        "to_text_logits.weight": head[:num_words],
        "to_text_logits.bias": bias[:num_words],
        "to_image_logits.weight": head[num_words:],
        "to_image_logits.bias": bias[num_words:],
    }
    for name, value in weights.items():
        if name.startswith(f"{resolved.head_norm}."):
            end = name.rpartition(".")[2]
            state[f"norm.{'gain' if end == 'g' else end}"] = value
    if config.rotary_width:
        angles = weights["transformer.pos_emb"]
        state["angles"] = angles.reshape(-1, angles.shape[-1])[: config.length]
    for layer, (attention, feed_forward) in enumerate(resolved.layers.branches):
        state |= _branch(f"blocks.{layer}.attention", attention, config.width)
        state |= _branch(f"blocks.{layer}.feed_forward", feed_forward, config.width)
    if "sparse" in config.attention_kinds:
        state["layout"] = _layout(resolved)
    return state


def _branch(where: str, branch: Branch, width: int) -> dict[str, Tensor]:
    state = {}
    for name, value in branch.weights.items():
        if name == "scale":
            state[f"{where}.scale.gain"] = value.reshape(-1)
        elif name.startswith("norm"):
            state[f"{where}.{name}"] = value
        elif name != "layout":
            state[f"{where}.function.{name}"] = value
    return {f"{where}.scale.gain": torch.ones(width)} | state


def _layout(resolved: Resolved) -> Tensor:
    """Return which blocks every sparse layer sees: the first one's, as DeepSpeed keeps a single
    layout for all layers of a length."""
    number = resolved.their_kinds.index("sparse")
    layout = resolved.layers.branches[number][0].weights["layout"]
    blocks = resolved.config.num_sparse_blocks
    if layout.ndim != 3 or layout.shape[1:] != (blocks, blocks):
        raise ValueError(
            f"attn_fn.master_layout of layer {number} has the shape {[*layout.shape]}, and its "
            f"sequence needs {blocks} blocks on each side"
        )
    if not bool((layout == layout[0]).all()):
        raise ValueError(f"attn_fn.master_layout of layer {number} differs from head to head")
    return layout[0] != 0


def _or_zeros(table: Tensor | None, rows: int, width: int) -> Tensor:
    return torch.zeros(rows, width) if table is None else table


def vae_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the VAE by its own names."""
    return {
        name.removeprefix("vae."): value
        for name, value in weights.items()
        if name.startswith("vae.")
    }
