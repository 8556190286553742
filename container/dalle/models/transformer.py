"""Autoregressive transformer over the text tokens of a caption and the image tokens after them.

Knows token ids, not captions or pixels. `dalle.models.layers` shows the order of the inputs.

Letters: B batch, T text length, N positions of the image grid, M codebooks (codes per position),
V codebook size, W width, n inputs of one call, P primed positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle.models.configs import TransformerConfig as TransformerConfig
from dalle.models.layers import (
    ChannelDropout,
    FeedForward,
    KeyValueCache,
    LayerScale,
    SelfAttention,
    build_norm,
    visibility,
)
from dalle.models.reduction import ONE_RANK, Ranks
from dalle.types import AttentionKind

PADDING = 0
_INITIAL_STD = 0.02


@dataclass(frozen=True)
class DalleLoss:
    """Scalars of one training step, in nats per token."""

    total: Tensor
    text: Tensor
    image: Tensor


class Branch(nn.Module):
    """One term that a block adds to the residual stream: norm, function, gain, dropout."""

    def __init__(self, config: TransformerConfig, function: nn.Module) -> None:
        super().__init__()
        self.norm = build_norm(config.norm, config.width)
        self.function = function
        self.scale = (
            nn.Identity()
            if config.layer_scale is None
            else LayerScale(config.width, config.layer_scale)
        )
        self.dropout = ChannelDropout(config.dropout)

    def forward(self, x: Tensor, *context: object) -> Tensor:
        added: Tensor = self.dropout(self.scale(self.function(self.norm(x), *context)))
        return added


class Block(nn.Module):
    """Attention, then feed-forward, each around a residual connection."""

    def __init__(self, config: TransformerConfig, visible: Tensor | None) -> None:
        super().__init__()
        attention = SelfAttention(
            config.width, config.num_heads, visible=visible, qk_norm=config.qk_norm
        )
        feed_forward = FeedForward(config.width, config.feed_forward_ratio, config.feed_forward)
        self.attention = Branch(config, attention)
        self.feed_forward = Branch(config, feed_forward)

    def forward(self, x: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        """x [B, n, W] -> the same shape; with a cache, x are the inputs after those in it."""
        attended: Tensor = x + self.attention(x, cache, layer)
        added: Tensor = self.feed_forward(attended)
        return attended + added


class CodeHead(nn.Module):
    """Head for one code of a position, given the hidden state and the position's earlier codes.

    The M codes of a position are sampled one after another. Only this small network runs between
    them, not the transformer (the depth transformer of Lee et al. 2022 at its smallest).
    """

    def __init__(self, config: TransformerConfig, num_earlier: int) -> None:
        super().__init__()
        W, V = config.width, config.codebook_size
        self.earlier = nn.ModuleList(nn.Embedding(V, W) for _ in range(num_earlier))
        self.mix = FeedForward(W, 1, config.feed_forward) if num_earlier else None
        self.norm = build_norm(config.norm, W)
        self.to_logits = nn.Linear(W, V)

    def forward(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """hidden [., W], codes [., >= num_earlier] -> logits [., V]"""
        if self.mix is not None:
            known = torch.stack([e(codes[..., i]) for i, e in enumerate(self.earlier)]).sum(dim=0)
            hidden = hidden + known
            hidden = hidden + self.mix(self.norm(hidden))
        logits: Tensor = self.to_logits(self.norm(hidden))
        return logits


class Dalle(nn.Module):
    """The autoregressive model over a caption and its image."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        W, M, V, G = config.width, config.num_codebooks, config.codebook_size, config.grid_size
        # Two ids more than the tokenizer's: BOS, and a hidden word (see word_dropout).
        self.bos, self.hidden_word = config.text_vocab_size, config.text_vocab_size + 1
        self.text_embedding = nn.Embedding(config.text_vocab_size + 2, W)
        self.text_position = nn.Parameter(torch.empty(config.text_length + 1, W))
        self.code_embeddings = nn.ModuleList(nn.Embedding(V, W) for _ in range(M))
        self.row_position = nn.Parameter(torch.empty(G, 1, W))
        self.column_position = nn.Parameter(torch.empty(1, G, W))
        if config.target_position:
            self.target_row_position = nn.Parameter(torch.empty(G, 1, W))
            self.target_column_position = nn.Parameter(torch.empty(1, G, W))
        masks: dict[AttentionKind, Tensor | None] = {
            kind: visibility(kind, config.text_length, G, config.conv_kernel_size)
            for kind in set(config.attention_kinds)
            if kind != "full"
        }
        self.blocks = nn.ModuleList(
            Block(config, masks.get(config.kind_of_layer(layer)))
            for layer in range(config.num_layers)
        )
        self.text_norm = build_norm(config.norm, W)
        self.to_text_logits = nn.Linear(W, config.text_vocab_size)
        self.code_heads = nn.ModuleList(CodeHead(config, m) for m in range(M))
        self.dropout = ChannelDropout(config.dropout)
        # Training then keeps only each block's input and recomputes the rest in the backward pass
        # (Chen et al. 2016). A setting of the run, not of the model, so it is not in the config.
        self.checkpoints_activations = False
        self._initialise()

    def _initialise(self) -> None:
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=_INITIAL_STD)
        # Each block adds to the stream twice; scaled as in GPT-2 (§2.3).
        residual_std = _INITIAL_STD / (2 * self.config.num_layers) ** 0.5
        for module in self.modules():
            if isinstance(module, SelfAttention):
                nn.init.normal_(module.to_out.weight, std=residual_std)
            elif isinstance(module, FeedForward):
                nn.init.normal_(module.contract.weight, std=residual_std)

    def muon_parameters(self) -> list[nn.Parameter]:
        """Return the blocks' matrices; AdamW trains embeddings, heads, gains and biases."""
        return [parameter for parameter in self.blocks.parameters() if parameter.ndim == 2]

    def loss(
        self,
        text_tokens: Tensor,
        image_tokens: Tensor,
        ranks: Ranks = ONE_RANK,
        *,
        step_text_tokens: Tensor | None = None,
    ) -> DalleLoss:
        """Return the cross-entropies of text_tokens [B, T] and image_tokens [B, N, M].

        Regularised in training mode. Text counts up to and including the first padding, which ends
        a caption. step_text_tokens: where a training step computes its batch in parts, the text
        tokens of all parts together; the mean of the parts' losses is then the step's loss.
        """
        seen_text, seen_image = self._corrupt(text_tokens, image_tokens[:, :-1])
        text_hidden, image_hidden = self._hidden(seen_text, seen_image)
        text_logits = self._text_logits(text_hidden)
        targets = text_tokens.masked_fill(_has_ended(text_tokens), -100)
        text_sum = F.cross_entropy(text_logits.flatten(0, 1), targets.flatten(), reduction="sum")
        # Captions differ in length, so each part's sum is divided by the tokens of all parts and
        # ranks: a mean of means would weigh the tokens of short captions more.
        whole = text_tokens if step_text_tokens is None else step_text_tokens
        num_shares = ranks.size * len(whole) // len(text_tokens)
        text = text_sum * num_shares / ranks.total((~_has_ended(whole)).sum())
        image = -self._log_probabilities(image_hidden, image_tokens).mean()
        return DalleLoss(image + self.config.text_loss_weight * text, text, image)

    def log_likelihood(self, text_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """Return log p(image tokens | caption) in nats, [B], summed over positions and codes."""
        _, image_hidden = self._hidden(text_tokens, image_tokens[:, :-1])
        return self._log_probabilities(image_hidden, image_tokens).sum(dim=(1, 2))

    def image_logits(self, text_tokens: Tensor, image_tokens: Tensor) -> Iterator[Tensor]:
        """Yield the logits [B, N, V] of code 0, 1, … of every position, given all before it."""
        _, image_hidden = self._hidden(text_tokens, image_tokens[:, :-1])
        for m in range(self.config.num_codebooks):
            yield self.code_logits(image_hidden, m, image_tokens)

    def text_logits(self, text_tokens: Tensor) -> Tensor:
        """text_tokens [B, n <= T] -> logits [B, n, text_vocab_size] of each given those before."""
        hidden = self._run(self._embed_text(text_tokens)[:, :-1], None)
        return self._text_logits(hidden)

    def new_cache(self, batch_size: int) -> KeyValueCache:
        """Return an empty cache for `batch_size` sequences on the model's device."""
        config = self.config
        shape = (batch_size, config.num_heads, config.length, config.head_width)
        return KeyValueCache(config.num_layers, shape, self.text_position)

    def prefill(
        self, text_tokens: Tensor, prime_tokens: Tensor | None, cache: KeyValueCache
    ) -> Tensor:
        """Fill an empty cache with captions [B, T] and codes [B, P, M] of the first P positions.

        Returns the hidden state [B, W] that predicts position P.
        """
        return self._run(self.prefix_inputs(text_tokens, prime_tokens), cache)[:, -1]

    def prefix_inputs(self, text_tokens: Tensor, prime_tokens: Tensor | None) -> Tensor:
        """Return the inputs [B, T + 1 + P, W] of captions [B, T] and primed codes [B, P, M]."""
        inputs = self._embed_text(text_tokens)
        if prime_tokens is not None:
            inputs = torch.cat([inputs, self._embed_image(prime_tokens, 0)], dim=1)
        return inputs

    def code_logits(self, hidden: Tensor, m: int, codes: Tensor) -> Tensor:
        """Return the logits [., V] of code m of the position that hidden [., W] predicts.

        codes [., >= m]: the position's codes, of which only the first m are read.
        """
        logits: Tensor = self.code_heads[m](hidden, codes)
        return logits

    def _corrupt(self, text_tokens: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of training: words hidden, captions blanked, codes replaced."""
        config, device = self.config, text_tokens.device
        if not self.training:
            return text_tokens, image_tokens
        if config.word_dropout:
            hidden = torch.rand(text_tokens.shape, device=device) < config.word_dropout
            hidden &= text_tokens != PADDING
            text_tokens = text_tokens.masked_fill(hidden, self.hidden_word)
        if config.caption_dropout:
            blank = torch.rand(len(text_tokens), 1, device=device) < config.caption_dropout
            text_tokens = text_tokens.masked_fill(blank, PADDING)
        if config.token_noise:
            replaced = torch.rand(image_tokens.shape[:2], device=device) < config.token_noise
            noise = torch.randint_like(image_tokens, config.codebook_size)
            image_tokens = torch.where(replaced[..., None], noise, image_tokens)
        return text_tokens, image_tokens

    def _hidden(self, text_tokens: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states that predict the text [B, T, W] and the image positions [B, N, W]."""
        parts = [self._embed_text(text_tokens), self._embed_image(image_tokens, 0)]
        hidden = self._run(self.dropout(torch.cat(parts, dim=1)), None)
        return hidden[:, : self.config.text_length], hidden[:, self.config.text_length :]

    def _log_probabilities(self, hidden: Tensor, image_tokens: Tensor) -> Tensor:
        """Return log p of each code [B, N, M] from the states [B, N, W]."""
        by_code = [
            -F.cross_entropy(
                self.code_logits(hidden, m, image_tokens).flatten(0, 1),
                image_tokens[..., m].flatten(),
                reduction="none",
            ).view(image_tokens.shape[:2])
            for m in range(self.config.num_codebooks)
        ]
        return torch.stack(by_code, dim=-1)

    def _text_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the text tokens from the states [B, n, W] that predict them."""
        logits: Tensor = self.to_text_logits(self.text_norm(hidden))
        return logits

    def _embed_text(self, text_tokens: Tensor) -> Tensor:
        """BOS and text tokens [B, n] -> inputs [B, n + 1, W]."""
        with_bos = F.pad(text_tokens, (1, 0), value=self.bos)
        n = with_bos.shape[1]
        inputs: Tensor = self.text_embedding(with_bos) + self.text_position[:n]
        if self.config.target_position and n > self.config.text_length:
            # The last text token predicts the first image position.
            inputs = torch.cat([inputs[:, :-1], inputs[:, -1:] + self._targets()[:1]], dim=1)
        return inputs

    def _embed_image(self, image_tokens: Tensor, first: int) -> Tensor:
        """Codes [B, n, M] of the positions from `first` on -> inputs [B, n, W]."""
        embedded = [
            embedding(image_tokens[..., m]) for m, embedding in enumerate(self.code_embeddings)
        ]
        end = first + image_tokens.shape[1]
        position = (self.row_position + self.column_position).flatten(0, 1)[first:end]
        if self.config.target_position:
            # The last position of the grid predicts nothing and is never an input.
            position = position + self._targets()[first + 1 : end + 1]
        return torch.stack(embedded).sum(dim=0) + position

    def _targets(self) -> Tensor:
        """Return the embeddings of the positions to predict, [N, W]."""
        return (self.target_row_position + self.target_column_position).flatten(0, 1)

    def _run(self, inputs: Tensor, cache: KeyValueCache | None) -> Tensor:
        """Run inputs [B, n, W] through all blocks and add them to the cache."""
        hidden = inputs
        recomputes = self.checkpoints_activations and self.training and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            if recomputes:
                hidden = checkpoint(block, hidden, cache, layer, use_reentrant=False)
            else:
                hidden = block(hidden, cache, layer)
        if cache is not None:
            cache.filled += inputs.shape[1]
        return hidden


def _has_ended(text_tokens: Tensor) -> Tensor:
    """Return which tokens come after the first padding: [B, T] -> bool [B, T]."""
    return (text_tokens == PADDING).cumsum(dim=1) > 1
