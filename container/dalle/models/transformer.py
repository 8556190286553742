"""The transformer: p(text tokens, image tokens), one after another; the image given the caption.

Knows token ids, not captions or pixels. The order of its inputs is drawn in
`dalle.models.attention`. Letters: B batch, T text length, N positions of the image grid, M
codebooks (codes per position), V codebook size, W width, n inputs of one call, P primed positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle.models.attention import KeyValueCache, SelfAttention, visibility
from dalle.models.layers import ChannelDropout, FeedForward, LayerScale, build_norm
from dalle.models.reduction import ONE_RANK, Ranks
from dalle.types import (
    ATTENTION_KINDS,
    FEED_FORWARD_KINDS,
    AttentionKind,
    FeedForwardKind,
    NormKind,
)

PADDING = 0
_INITIAL_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Everything that rebuilds a `Dalle`. The last group acts in training only."""

    text_vocab_size: int
    """Number of text token ids, padding (0) included."""
    text_length: int
    """T: text tokens per caption, padded."""
    grid_size: int
    """Side of the image-token grid; N = grid_size²."""
    codebook_size: int
    """V of the dVAE."""
    num_codebooks: int = 1
    """M of the dVAE."""

    width: int = 512
    """W: channels of the residual stream."""
    num_layers: int = 12
    """Blocks, each of attention and feed-forward."""
    num_heads: int = 8
    """Attention heads; width is a multiple of them."""
    attention_kinds: tuple[AttentionKind, ...] = ("full",)
    """One per layer, repeated from the start when there are more layers."""
    conv_kernel_size: int = 5
    """Window of the conv_like kind."""
    qk_norm: bool = True
    """Normalise queries and keys before their product (Dehghani et al. 2023, §2)."""
    norm: NormKind = "layer"
    """Normalisation before each branch and before the heads."""
    feed_forward: FeedForwardKind = "relu2"
    """Activation of the feed-forward branch."""
    feed_forward_ratio: int = 4
    """Its inner width, in widths."""
    layer_scale: float | None = None
    """Start value of a learned gain per channel on each branch; no gain without it."""
    target_position: bool = True
    """Tell each input the grid position that it is to predict, beside its own."""

    text_loss_weight: float = 1 / 7
    """Weight of the text tokens' loss beside the image tokens'."""
    dropout: float = 0.0
    """Share of channels dropped from the embeddings and from each branch."""
    caption_dropout: float = 0.0
    """Share of captions blanked whole, so that guidance has something to compare with."""
    word_dropout: float = 0.0
    """Share of text tokens hidden one by one."""
    token_noise: float = 0.0
    """Share of input positions with random codes: the model learns to look past its own errors."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads = {self.num_heads}, got {self.width}"
            )
        if not self.attention_kinds or set(self.attention_kinds) - set(ATTENTION_KINDS):
            raise ValueError(
                f"attention_kinds must be of {ATTENTION_KINDS}, got {self.attention_kinds}"
            )
        if self.feed_forward not in FEED_FORWARD_KINDS:
            raise ValueError(
                f"feed_forward must be of {FEED_FORWARD_KINDS}, got {self.feed_forward!r}"
            )

    @property
    def num_positions(self) -> int:
        """N"""
        return self.grid_size * self.grid_size

    @property
    def length(self) -> int:
        """Inputs of a whole sequence: BOS, the text, all image positions but the last."""
        return self.text_length + self.num_positions

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    def kind_of_layer(self, layer: int) -> AttentionKind:
        """The attention kind of a layer, counted from 0."""
        return self.attention_kinds[layer % len(self.attention_kinds)]


@dataclass(frozen=True)
class DalleLoss:
    """Scalars of one training step, in nats per token."""

    total: Tensor
    text: Tensor
    image: Tensor


class Branch(nn.Module):
    """What a block adds to the residual stream: norm, function, gain, dropout."""

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
        """x [B, n, W] -> the same; with a cache, x follows what it holds."""
        attended: Tensor = x + self.attention(x, cache, layer)
        added: Tensor = self.feed_forward(attended)
        return attended + added


class CodeHead(nn.Module):
    """Logits of one code of a position from the hidden state and the codes before it.

    A position's M codes are drawn one after another. Only this small network runs between them,
    not the transformer (the depth network of RQ-Transformer, Lee et al. 2022, at its smallest).
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
        # Whether training keeps only what goes into a block, and computes the rest once more in
        # the backward pass (Chen et al. 2016). Of a run, not of the model: no part of its config.
        self.checkpoints_activations = False
        self._initialise()

    def _initialise(self) -> None:
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=_INITIAL_STD)
        # Each block adds to the stream twice: its share shrinks with their number (GPT-2, §2.3).
        residual_std = _INITIAL_STD / (2 * self.config.num_layers) ** 0.5
        for module in self.modules():
            if isinstance(module, SelfAttention):
                nn.init.normal_(module.to_out.weight, std=residual_std)
            elif isinstance(module, FeedForward):
                nn.init.normal_(module.contract.weight, std=residual_std)

    def muon_parameters(self) -> list[nn.Parameter]:
        """The blocks' matrices; embeddings, heads, gains and biases are for AdamW."""
        return [parameter for parameter in self.blocks.parameters() if parameter.ndim == 2]

    def loss(
        self,
        text_tokens: Tensor,
        image_tokens: Tensor,
        ranks: Ranks = ONE_RANK,
        *,
        step_text_tokens: Tensor | None = None,
    ) -> DalleLoss:
        """text_tokens [B, T], image_tokens [B, N, M] -> cross-entropies, regularised in training.

        Text counts up to and including its first padding, which is how a caption ends.
        step_text_tokens: [P * B, T], those of all P parts of a step, when these are one of them;
        the mean of the parts' losses is then the loss of the step.
        """
        seen_text, seen_image = self._disturb(text_tokens, image_tokens[:, :-1])
        text_hidden, image_hidden = self._hidden(seen_text, seen_image)
        text_logits = self.to_text_logits(self.text_norm(text_hidden))
        targets = text_tokens.masked_fill(_has_ended(text_tokens), -100)
        text_sum = F.cross_entropy(text_logits.flatten(0, 1), targets.flatten(), reduction="sum")
        # Captions differ in length: the mean over all ranks' and parts' tokens is not that of
        # their means.
        whole = text_tokens if step_text_tokens is None else step_text_tokens
        num_shares = ranks.size * len(whole) // len(text_tokens)
        text = text_sum * num_shares / ranks.total((~_has_ended(whole)).sum())
        image = -self._log_probabilities(image_hidden, image_tokens).mean()
        return DalleLoss(image + self.config.text_loss_weight * text, text, image)

    def log_likelihood(self, text_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """log p(image tokens | caption), [B], in nats, summed over positions and codes."""
        _, image_hidden = self._hidden(text_tokens, image_tokens[:, :-1])
        return self._log_probabilities(image_hidden, image_tokens).sum(dim=(1, 2))

    def text_logits(self, text_tokens: Tensor) -> Tensor:
        """text_tokens [B, n <= T] -> logits [B, n, text_vocab_size] of each, given those before."""
        hidden = self._run(self._embed_text(text_tokens)[:, :-1], None)
        logits: Tensor = self.to_text_logits(self.text_norm(hidden))
        return logits

    def new_cache(self, batch_size: int) -> KeyValueCache:
        """An empty cache for `batch_size` sequences, on the model's device."""
        config = self.config
        shape = (batch_size, config.num_heads, config.length, config.head_width)
        return KeyValueCache(config.num_layers, shape, self.text_position)

    def prefill(
        self, text_tokens: Tensor, prime_tokens: Tensor | None, cache: KeyValueCache
    ) -> Tensor:
        """Fill an empty cache with captions [B, T] and the first positions' codes [B, P, M].

        Returns the state [B, W] that predicts position P.
        """
        inputs = self._embed_text(text_tokens)
        if prime_tokens is not None:
            inputs = torch.cat([inputs, self._embed_image(prime_tokens, 0)], dim=1)
        return self._run(inputs, cache)[:, -1]

    def decode_one(self, codes: Tensor, position: int, cache: KeyValueCache) -> Tensor:
        """Take in the codes [B, M] of one position; the state [B, W] that predicts the next."""
        return self._run(self._embed_image(codes[:, None], position), cache)[:, -1]

    def code_logits(self, hidden: Tensor, m: int, codes: Tensor) -> Tensor:
        """Logits [., V] of code m of the position that hidden [., W] predicts.

        codes [., >= m]: the position's codes before m; what stands behind them is not read.
        """
        logits: Tensor = self.code_heads[m](hidden, codes)
        return logits

    def _disturb(self, text_tokens: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs as training shows them: words hidden, captions blanked, codes at random."""
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
        """States that predict the text [B, T, W], and the image positions [B, N, W]."""
        parts = [self._embed_text(text_tokens), self._embed_image(image_tokens, 0)]
        hidden = self._run(self.dropout(torch.cat(parts, dim=1)), None)
        return hidden[:, : self.config.text_length], hidden[:, self.config.text_length :]

    def _log_probabilities(self, hidden: Tensor, image_tokens: Tensor) -> Tensor:
        """log p of each code [B, N, M] from the states [B, N, W]."""
        by_code = [
            -F.cross_entropy(
                self.code_logits(hidden, m, image_tokens).flatten(0, 1),
                image_tokens[..., m].flatten(),
                reduction="none",
            ).view(image_tokens.shape[:2])
            for m in range(self.config.num_codebooks)
        ]
        return torch.stack(by_code, dim=-1)

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
        embedded: Sequence[Tensor] = [
            embedding(image_tokens[..., m]) for m, embedding in enumerate(self.code_embeddings)
        ]
        end = first + image_tokens.shape[1]
        position = (self.row_position + self.column_position).flatten(0, 1)[first:end]
        if self.config.target_position:
            # The last position of all predicts nothing; its input is never asked for.
            position = position + self._targets()[first + 1 : end + 1]
        return torch.stack(list(embedded)).sum(dim=0) + position

    def _targets(self) -> Tensor:
        """[N, W]"""
        return (self.target_row_position + self.target_column_position).flatten(0, 1)

    def _run(self, inputs: Tensor, cache: KeyValueCache | None) -> Tensor:
        """Inputs [B, n, W] through all blocks; a cache moves on by n."""
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
    """Which places come after a caption's first padding: [B, T] -> bool [B, T]."""
    return (text_tokens == PADDING).cumsum(dim=1) > 1
