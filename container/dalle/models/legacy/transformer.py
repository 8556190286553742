"""The transformer of DALLE-pytorch (lucidrains), versions 0.1.19 to 1.6.6, as one graph.

Source: dalle_pytorch.py, transformer.py and attention.py of these versions. What they do
differently is in `LegacyTransformerConfig`; what their weights alone decide is always there: a gain
on each branch, positions that are added, a table of angles. A model whose version had none of them
has ones, zeros or no table.

Letters: B batch, n inputs of one call, T text length, N positions, V codebook size, W width.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle.models.layers import ChannelDropout, FeedForward, KeyValueCache, LayerScale
from dalle.models.legacy.attention import (
    Inputs,
    LegacyAttention,
    LegacyCache,
    legacy_visibility,
)
from dalle.models.legacy.config import LegacyNormKind, LegacyTransformerConfig
from dalle.models.transformer import PADDING, Dalle

_BOS = 0  # padding's id, which the old code begins a sequence with


class LegacyTransformer(Dalle):
    """A `Dalle` of another graph: whoever samples or trains one asks nothing else of it."""

    config: LegacyTransformerConfig  # type: ignore[assignment] # what a `Dalle` is asked for, it has

    def __init__(self, config: LegacyTransformerConfig) -> None:
        nn.Module.__init__(self)  # of the weights of a `Dalle` it has none
        self.config = config
        W, T, L = config.width, config.text_length, config.length
        num_words = config.text_vocab_size + (T if config.padding_by_position else 0)
        self.hidden_word = PADDING
        self.text_embedding = nn.Embedding(num_words, W)
        self.text_position = nn.Parameter(torch.zeros(T + 1, W))
        self.code_embedding = nn.Embedding(config.codebook_size, W)
        self.image_position = nn.Parameter(torch.zeros(config.num_positions, W))
        self.blocks = nn.ModuleList(_Block(config, layer) for layer in range(config.num_layers))
        self.norm = build_norm(config.norm, W)
        self.to_text_logits = nn.Linear(W, num_words)
        self.to_image_logits = nn.Linear(W, config.codebook_size)
        self.dropout = ChannelDropout(config.dropout)
        self.checkpoints_activations = False
        self.angles: Tensor | None
        self.layout: Tensor | None
        has_layout = "sparse" in config.attention_kinds
        blocks = config.num_sparse_blocks
        self.register_buffer(
            "angles", torch.zeros(L, config.rotary_width) if config.rotary_width else None
        )
        self.register_buffer(
            "layout", torch.ones(blocks, blocks, dtype=torch.bool) if has_layout else None
        )
        self._visible: dict[str, Tensor] = {}

    def normalised(self, hidden: Tensor) -> Tensor:
        """Return what the heads read of the hidden states [., W]."""
        if self.config.divide_by_max:
            hidden = hidden / hidden.amax(dim=-1, keepdim=True).detach()
        normalised: Tensor = self.norm(hidden)
        return normalised

    def code_logits(self, hidden: Tensor, m: int, codes: Tensor) -> Tensor:
        """As `Dalle.code_logits`; there is one code per position, so codes is not read."""
        logits: Tensor = self.to_image_logits(self.normalised(hidden))
        return logits

    def new_cache(self, batch_size: int) -> LegacyCache:
        """Return an empty cache for `batch_size` sequences on the model's device."""
        return LegacyCache(self.config, batch_size, self.text_position)

    def prefill(
        self, text_tokens: Tensor, prime_tokens: Tensor | None, cache: KeyValueCache
    ) -> Tensor:
        """As `Dalle.prefill`; the cache is one of `new_cache`."""
        cache = cast(LegacyCache, cache)
        embedded = self._embed_text(text_tokens)
        if prime_tokens is not None:
            embedded = torch.cat([embedded, self._embed_image(prime_tokens, 0)], dim=1)
        B, n, _ = embedded.shape
        is_hidden = self._hidden_keys(text_tokens)
        if cache.is_hidden is not None and is_hidden is not None:
            cache.is_hidden[:] = is_hidden
        numbers = torch.arange(n, device=embedded.device)[None]
        hidden = self._through(
            embedded, self._inputs(numbers, cache, torch.arange(B, device=embedded.device))
        )
        cache.filled = n
        return hidden[:, -1]

    def step(
        self, codes: Tensor, positions: np.ndarray, cache: LegacyCache, rows: np.ndarray
    ) -> Tensor:
        """Run the codes [B, 1] of the positions [B] of the cache's rows [B]: states [B, W]."""
        device, first_image = codes.device, self.config.text_length + 1
        places = torch.from_numpy(positions.copy()).to(device)
        embedded = self.code_embedding(codes) + self.image_position[places][:, None]
        inputs = self._inputs(
            (places + first_image)[:, None],
            cache,
            torch.from_numpy(rows.copy()).to(device),
            int(positions.max()) + first_image + 1,
        )
        if (np.diff(rows) == 1).all():
            inputs.block = slice(int(rows[0]), int(rows[-1]) + 1)
        return self._through(embedded, inputs)[:, -1]

    def _inputs(
        self,
        numbers: Tensor,
        cache: LegacyCache | None,
        rows: Tensor | None = None,
        num_keys: int | None = None,
    ) -> Inputs:
        is_hidden = None if cache is None or cache.is_hidden is None else cache.is_hidden[rows]
        return Inputs(
            self.config,
            numbers,
            num_keys or numbers.shape[1],
            self._visibilities(),
            self.angles,
            cache,
            rows,
            is_hidden=is_hidden,
        )

    def _visibilities(self) -> dict[str, Tensor]:
        """Return the mask of each kind; made at first use, when the layout's values are there."""
        device = self.text_position.device
        kinds = set(self.config.attention_kinds)
        if self._visible.keys() != kinds or next(iter(self._visible.values())).device != device:
            layout = None if self.layout is None else self.layout.cpu()
            self._visible = {
                kind: legacy_visibility(kind, self.config, layout).to(device) for kind in kinds
            }
        return self._visible

    def _hidden_keys(self, text_tokens: Tensor) -> Tensor | None:
        """Text tokens [B, n] -> which keys are hidden, [B, L]; None where the model hides none."""
        if not self.config.hides_padding:
            return None
        behind = self.config.length - 1 - text_tokens.shape[1]
        return F.pad(text_tokens == PADDING, (1, behind))

    def _whole(self, embedded: Tensor, text_tokens: Tensor) -> Tensor:
        """Run whole sequences of inputs [B, n, W]."""
        inputs = self._inputs(torch.arange(embedded.shape[1], device=embedded.device)[None], None)
        inputs.is_hidden = self._hidden_keys(text_tokens)
        return self._through(embedded, inputs)

    def _hidden(self, text_tokens: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self._embed_text(text_tokens), self._embed_image(image_tokens, 0)]
        hidden = self._whole(self.dropout(torch.cat(parts, dim=1)), text_tokens)
        return hidden[:, : self.config.text_length], hidden[:, self.config.text_length :]

    def text_logits(self, text_tokens: Tensor) -> Tensor:
        """As `Dalle.text_logits`. Token 0 stands for the padding of its position."""
        hidden = self._whole(self._embed_text(text_tokens)[:, :-1], text_tokens)
        return self._text_logits(hidden)

    def _text_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.to_text_logits(self.normalised(hidden))
        if not self.config.padding_by_position:
            return logits
        words, padding = logits.tensor_split([self.config.text_vocab_size], dim=-1)
        own = padding.diagonal(dim1=-2, dim2=-1)
        return torch.cat([own[..., None], words[..., 1:]], dim=-1)

    def _embed_text(self, text_tokens: Tensor) -> Tensor:
        if self.config.padding_by_position:
            n = text_tokens.shape[1]
            own = torch.arange(n, device=text_tokens.device) + self.config.text_vocab_size
            text_tokens = torch.where(text_tokens == PADDING, own, text_tokens)
        with_bos = F.pad(text_tokens, (1, 0), value=_BOS)
        embedded: Tensor = self.text_embedding(with_bos)
        return embedded + self.text_position[: with_bos.shape[1]]

    def _embed_image(self, image_tokens: Tensor, first: int) -> Tensor:
        embedded: Tensor = self.code_embedding(image_tokens[..., 0])
        return embedded + self.image_position[first : first + image_tokens.shape[1]]

    def _through(self, embedded: Tensor, inputs: Inputs) -> Tensor:
        """Run inputs [B, n, W] through all blocks."""
        left = right = embedded
        recomputes = self.checkpoints_activations and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            if recomputes:
                left, right = checkpoint(block, left, right, inputs, use_reentrant=False)
            else:
                left, right = block(left, right, inputs)
        return (left + right) / 2 if self.config.reversible else right


class _Block(nn.Module):
    """Attention, then feed-forward, on one residual stream or on two."""

    def __init__(self, config: LegacyTransformerConfig, layer: int) -> None:
        super().__init__()
        self._is_reversible = config.reversible
        self.attention = _Branch(config, LegacyAttention(config, layer), 2 * layer)
        feed_forward = FeedForward(config.width, config.feed_forward_ratio, "geglu")
        self.feed_forward = _Branch(config, feed_forward, 2 * layer + 1)

    def forward(self, left: Tensor, right: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """left, right [B, n, W] -> the same, which are one tensor where there is one stream."""
        left = left + self.attention(right, inputs, inputs)
        right = (right if self._is_reversible else left) + self.feed_forward(left, inputs)
        return (left if self._is_reversible else right), right


class _Branch(nn.Module):
    """One term that a block adds to a stream: norm, shift, function, norm, gain, dropout."""

    def __init__(self, config: LegacyTransformerConfig, function: nn.Module, number: int) -> None:
        super().__init__()
        self._number = number if config.token_shift else None
        self.norm = build_norm(config.norm, config.width)
        self.function = function
        self.norm_out = nn.LayerNorm(config.width) if config.sandwich_norm else nn.Identity()
        self.scale = LayerScale(config.width, 1.0)
        self.dropout = ChannelDropout(config.dropout)

    def forward(self, x: Tensor, inputs: Inputs, *context: Any) -> Tensor:
        x = self.norm(x)
        if self._number is not None:
            x = inputs.shifted(x, self._number)
        added: Tensor = self.dropout(self.scale(self.norm_out(self.function(x, *context))))
        return added


def build_norm(kind: LegacyNormKind, width: int) -> nn.Module:
    """Return a normalisation over the last dimension with learned gains."""
    match kind:
        case "layer":
            return nn.LayerNorm(width)
        case "rms":
            return _LengthNorm(width, scale=width**-0.5, least=1e-8)
        case "length":
            return _LengthNorm(1, scale=1.0, least=1e-5)


class _LengthNorm(nn.Module):
    """Division by the length of the vector, or by that and the root of its width."""

    def __init__(self, num_gains: int, *, scale: float, least: float) -> None:
        super().__init__()
        self._scale, self._least = scale, least
        self.gain = nn.Parameter(torch.ones(num_gains))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * self._scale
        normalised: Tensor = x / length.clamp(min=self._least) * self.gain
        return normalised
