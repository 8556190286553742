"""Quantisers: feature maps -> image tokens -> embeddings, with a codebook that stays alive.

Knows feature maps and codes, not pixels. There is one feature map per codebook; an encoder that
does not part what they see gives the same one to all.

Letters: B batch, M codebooks, V codebook size, E embedding width of one code, C channels,
H = W side of the token grid, N = H·W positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.models.reduction import ONE_RANK, Ranks


@dataclass(frozen=True)
class Quantised:
    """What a quantiser makes of a feature map in training."""

    embeddings: Tensor
    """[B, M·E, H, W], differentiable."""
    loss: Tensor
    """Scalar: the quantiser's own terms."""


class Quantiser(nn.Module):
    """A codebook [M, V, E] and a running share of the positions that choose each code.

    A code that hardly anything chooses is dead. Until `REVIVE_UNTIL` of the training the dead
    ones are given a new start every few steps, so that the whole codebook earns its keep.
    """

    usage: Tensor  # [M, V] moving average of each code's share of the positions
    steps: Tensor  # [] int64, training steps seen

    USAGE_DECAY = 0.99
    DEAD_SHARE = 0.03  # of a fair share, 1 / V
    REVIVE_EVERY = 20  # steps
    REVIVE_UNTIL = 0.6  # of the training; the rest settles

    def __init__(self, num_codebooks: int, codebook_size: int, code_width: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(num_codebooks, codebook_size, code_width))
        self.register_buffer("usage", torch.empty(num_codebooks, codebook_size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.usage.fill_(self.fair_share)

    @property
    def fair_share(self) -> float:
        """What each code would be used if all were used alike."""
        return 1.0 / self.codebook.shape[1]

    def forward(
        self, features: Sequence[Tensor], progress: float, ranks: Ranks = ONE_RANK
    ) -> Quantised:
        """features: M of [B, C, H, W]; progress: share of the training done, in [0, 1].

        The codebook and its statistics are those of all ranks, equal on each.
        """
        raise NotImplementedError

    def tokens(self, features: Sequence[Tensor]) -> Tensor:
        """features M of [B, C, H, W] -> image tokens [B, N, M] int64 in [0, V)."""
        raise NotImplementedError

    def embed(self, image_tokens: Tensor, grid_size: int) -> Tensor:
        """image tokens [B, N, M] -> embeddings [B, M·E, H, W]."""
        chosen = [F.embedding(image_tokens[..., m], book) for m, book in enumerate(self.codebook)]
        joined = torch.cat(chosen, dim=-1).mT
        return joined.reshape(*joined.shape[:2], grid_size, grid_size)

    def perplexity(self) -> Tensor:
        """How many codes are in use, by the entropy of their shares: [M], each in [1, V]."""
        # A revived code's share is a loan: the shares then add up to more than 1.
        shares = self.usage / self.usage.sum(dim=1, keepdim=True)
        entropy: Tensor = torch.special.entr(shares).sum(dim=1)
        return entropy.exp()

    def dead(self) -> Tensor:
        """Which codes hardly anything chooses: bool [M, V]."""
        return self.usage < self.DEAD_SHARE * self.fair_share

    @torch.no_grad()
    def _record(self, image_tokens: Tensor, ranks: Ranks) -> Tensor:
        """Update the running shares with image tokens [B, N, M].

        Returns how often all ranks chose each code, int64 [M, V].
        """
        size = self.usage.shape[1]
        own = [tokens.flatten().bincount(minlength=size) for tokens in image_tokens.unbind(-1)]
        counts = ranks.total(torch.stack(own))
        shares = counts / counts.sum(dim=1, keepdim=True)
        self.usage.lerp_(shares, 1 - self.USAGE_DECAY)
        self.steps += 1
        return counts

    def _is_time_to_revive(self, progress: float) -> bool:
        return progress < self.REVIVE_UNTIL and int(self.steps) % self.REVIVE_EVERY == 0


class GumbelQuantiser(Quantiser):
    """Gumbel-softmax relaxation, as in the DALL-E paper (Ramesh et al. 2021, §2.1).

    Training mixes the codes with relaxed one-hot weights, whose temperature falls; encoding takes
    the likeliest code.
    """

    FINAL_TEMPERATURE = 1 / 16  # ibid., appendix A.2
    TEMPERATURE_REACHED = 0.75  # of the training

    def __init__(
        self,
        width: int,
        num_codebooks: int,
        codebook_size: int,
        code_width: int,
        *,
        kl_weight: float,
    ) -> None:
        super().__init__(num_codebooks, codebook_size, code_width)
        self.to_logits = _projections(width, num_codebooks, codebook_size)
        self.kl_weight = kl_weight

    def _logits(self, features: Sequence[Tensor]) -> Tensor:
        """[B, N, M, V]"""
        return _project(self.to_logits, features)

    def gumbel_temperature(self, progress: float) -> float:
        """From 1 down along a cosine."""
        done = min(1.0, progress / self.TEMPERATURE_REACHED)
        above = 0.5 * (1 + math.cos(math.pi * done))
        return self.FINAL_TEMPERATURE + (1 - self.FINAL_TEMPERATURE) * above

    def forward(
        self, features: Sequence[Tensor], progress: float, ranks: Ranks = ONE_RANK
    ) -> Quantised:
        logits = self._logits(features)
        # Of uniform numbers: torch's exponential_ is three times as slow on a CPU.
        noise = -(-torch.rand_like(logits).clamp_min(1e-20).log()).clamp_min(1e-20).log()
        weights = ((logits + noise) / self.gumbel_temperature(progress)).softmax(dim=-1)
        mixed = torch.einsum("bnmv,mve->bnme", weights, self.codebook)
        embeddings = mixed.flatten(2).mT.reshape(len(mixed), -1, *features[0].shape[-2:])
        if self.training:
            self._record(logits.argmax(dim=-1), ranks)
            if self._is_time_to_revive(progress):
                self._revive()
                ranks.copy_first([self.usage, self.codebook, *self.to_logits.parameters()])
        if self.kl_weight == 0.0:
            return Quantised(embeddings, logits.new_zeros(()))
        log_q = logits.log_softmax(dim=-1)
        kl = (log_q.exp() * log_q).sum(dim=-1).mean() + math.log(logits.shape[-1])
        return Quantised(embeddings, self.kl_weight * kl)

    def tokens(self, features: Sequence[Tensor]) -> Tensor:
        return self._logits(features).argmax(dim=-1)

    @torch.no_grad()
    def _revive(self) -> None:
        """Make each dead code a near-copy of one in use, drawn by usage: the two share its work."""
        for m, dead in enumerate(self.dead()):
            targets = dead.nonzero().flatten()
            if len(targets) == 0:
                continue
            sources = torch.multinomial(self.usage[m], len(targets), replacement=True)
            _copy_nearly(self.codebook[m], sources, targets)
            for parameter in self.to_logits[m].parameters():
                _copy_nearly(parameter, sources, targets)
            self.usage[m, targets] = self.fair_share


class VectorQuantiser(Quantiser):
    """Nearest code by Euclidean distance, straight-through gradient (van den Oord et al. 2017).

    The codebook follows the mean of the vectors that choose each code by a moving average (ibid.,
    appendix A.1) instead of by gradient. It starts from vectors of the first batch, and a dead
    code restarts from one of the present batch, drawn by its squared distance to the codes in use
    as in k-means++ (Arthur & Vassilvitskii 2007): drawn evenly, most would land on the background.
    """

    sums: Tensor  # [M, V, E] moving sums of the vectors that chose each code
    counts: Tensor  # [M, V] moving number of them

    def __init__(
        self,
        width: int,
        num_codebooks: int,
        codebook_size: int,
        code_width: int,
        *,
        commitment_weight: float,
    ) -> None:
        super().__init__(num_codebooks, codebook_size, code_width)
        self.codebook.requires_grad_(False)
        self.to_vectors = _projections(width, num_codebooks, code_width)
        self.commitment_weight = commitment_weight
        self.register_buffer("sums", torch.zeros_like(self.codebook))
        self.register_buffer("counts", torch.zeros(num_codebooks, codebook_size))

    def _vectors(self, features: Sequence[Tensor]) -> Tensor:
        """[B, N, M, E], normalised: otherwise encoder and codebook could outgrow one another."""
        E = self.codebook.shape[2]
        return F.layer_norm(_project(self.to_vectors, features), (E,))

    def _nearest(self, vectors: Tensor) -> Tensor:
        # |x - c|² without the |x|² that no comparison depends on.
        products = torch.einsum("bnme,mve->bnmv", vectors, self.codebook)
        return (self.codebook.square().sum(dim=-1) - 2 * products).argmin(dim=-1)

    def forward(
        self, features: Sequence[Tensor], progress: float, ranks: Ranks = ONE_RANK
    ) -> Quantised:
        vectors = self._vectors(features)
        if self.training and self.steps == 0:
            self._restart(torch.ones_like(self.usage, dtype=torch.bool), vectors, ranks)
        image_tokens = self._nearest(vectors)
        grid = features[0].shape[-2:]
        flat = vectors.flatten(2).mT.reshape(len(vectors), -1, *grid)
        chosen = self.embed(image_tokens, grid[0])
        if self.training:
            self._follow(vectors, image_tokens, self._record(image_tokens, ranks), ranks)
            if self._is_time_to_revive(progress):
                ranks.copy_first([self.usage])  # so that all find the same codes dead, to the bit
                self._restart(self.dead(), vectors, ranks)
        commitment = F.mse_loss(flat, chosen)
        return Quantised(flat + (chosen - flat).detach(), self.commitment_weight * commitment)

    def tokens(self, features: Sequence[Tensor]) -> Tensor:
        return self._nearest(self._vectors(features))

    @torch.no_grad()
    def _follow(self, vectors: Tensor, image_tokens: Tensor, counts: Tensor, ranks: Ranks) -> None:
        """Move the codes towards the mean of what chose them; counts [M, V]: how often all did."""
        sums = torch.zeros_like(self.sums)
        for m in range(self.codebook.shape[0]):
            flat = vectors[..., m, :].flatten(0, 1).to(self.sums.dtype)
            sums[m].index_add_(0, image_tokens[..., m].flatten(), flat)
        self.counts.lerp_(counts.to(self.counts.dtype), 1 - self.USAGE_DECAY)
        self.sums.lerp_(ranks.total(sums), 1 - self.USAGE_DECAY)
        is_known = self.counts > 1e-3
        self.codebook[is_known] = self.sums[is_known] / self.counts[is_known][:, None]

    @torch.no_grad()
    def _restart(self, dead: Tensor, vectors: Tensor, ranks: Ranks = ONE_RANK) -> None:
        """Put the codes marked in `dead` [M, V] onto vectors [B, N, M, E] that lack a near one.

        The vectors are those of all ranks; the first rank draws, for everybody.
        """
        if not dead.any():
            return
        vectors = ranks.gather(vectors)
        for m in range(dead.shape[0]):
            targets = dead[m].nonzero().flatten()
            if len(targets) == 0:
                continue
            flat = vectors[..., m, :].flatten(0, 1).to(self.codebook.dtype)
            alive = self.codebook[m, ~dead[m]]
            error = flat.new_ones(len(flat))
            if len(alive):
                error = torch.cdist(flat, alive).amin(dim=1).square() + 1e-9
            chosen = flat[torch.multinomial(error, len(targets), replacement=True)]
            self.codebook[m, targets] = chosen
            self.sums[m, targets] = chosen
            self.counts[m, targets] = 1.0
            self.usage[m, targets] = self.fair_share
        ranks.copy_first([self.codebook, self.sums, self.counts, self.usage])


def _projections(width: int, num_codebooks: int, channels: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Conv2d(width, channels, kernel_size=1) for _ in range(num_codebooks))


def _project(layers: nn.ModuleList, features: Sequence[Tensor]) -> Tensor:
    """M feature maps [B, C, H, W] through a layer each -> [B, N, M, channels]."""
    maps = [layer(each) for layer, each in zip(layers, features, strict=True)]
    return torch.stack([each.flatten(2).mT for each in maps], dim=2)


def _copy_nearly(parameter: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Rows `targets` become rows `sources` with a little noise."""
    noise = 0.02 * parameter.std() * torch.randn_like(parameter[targets])
    parameter[targets] = parameter[sources] + noise
