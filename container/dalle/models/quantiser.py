"""Quantisers of the dVAE: feature maps -> image tokens -> embeddings.

Knows feature maps and codes, not pixels. There is one feature map per codebook, which may be the
same for all. Dead codes are re-initialised, so the codebook does not collapse.

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

from dalle.models.configs import DVAEConfig
from dalle.models.layers import embed_codes
from dalle.models.reduction import ONE_RANK, Ranks


@dataclass(frozen=True)
class Quantised:
    """Output of a quantiser in training."""

    embeddings: Tensor
    """[B, M·E, H, W], differentiable."""
    loss: Tensor
    """Scalar: KL divergence or commitment."""


class Quantiser(nn.Module):
    """Codebooks [M, V, E] and the moving average of each code's usage.

    A code is dead when its usage is below `DEAD_SHARE` of an even one. Dead codes are restarted
    every `RESTART_EVERY` steps until `RESTART_UNTIL` of the training is done.
    """

    usage: Tensor  # [M, V] moving average of each code's share of the positions
    steps: Tensor  # [] int64, number of training steps

    USAGE_DECAY = 0.99
    DEAD_SHARE = 0.03  # of an even share, 1 / V
    RESTART_EVERY = 20  # steps
    RESTART_UNTIL = 0.6  # of the training

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        M, V = config.num_codebooks, config.codebook_size
        self.codebook = nn.Parameter(torch.randn(M, V, config.code_width))
        self.register_buffer("usage", torch.empty(M, V))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.usage.fill_(self.even_share)

    @property
    def even_share(self) -> float:
        """Usage of each code if all were used equally, 1 / V."""
        return 1.0 / self.codebook.shape[1]

    def forward(
        self, features: Sequence[Tensor], progress: float, ranks: Ranks = ONE_RANK
    ) -> Quantised:
        """Quantise features, M of [B, C, H, W], and in training mode update the codebook.

        progress: share of the training that is done, in [0, 1]. Codebook and usage are computed
        from the batches of all ranks and equal on each.
        """
        raise NotImplementedError

    def tokens(self, features: Sequence[Tensor]) -> Tensor:
        """features M of [B, C, H, W] -> image tokens [B, N, M] int64 in [0, V)."""
        raise NotImplementedError

    def perplexity(self) -> Tensor:
        """Return the effective number of codes in use, exp(entropy of usage): [M], in [1, V]."""
        # A restart sets a code's usage to the even share: the sum may exceed 1.
        shares = self.usage / self.usage.sum(dim=1, keepdim=True)
        entropy: Tensor = torch.special.entr(shares).sum(dim=1)
        return entropy.exp()

    def dead(self) -> Tensor:
        """Return which codes are dead: bool [M, V]."""
        return self.usage < self.DEAD_SHARE * self.even_share

    @torch.no_grad()
    def _update_usage(self, image_tokens: Tensor, ranks: Ranks) -> Tensor:
        """Update the usage with image tokens [B, N, M].

        Returns each code's number of positions on all ranks, int64 [M, V].
        """
        size = self.usage.shape[1]
        own = [tokens.flatten().bincount(minlength=size) for tokens in image_tokens.unbind(-1)]
        counts = ranks.total(torch.stack(own))
        shares = counts / counts.sum(dim=1, keepdim=True)
        self.usage.lerp_(shares, 1 - self.USAGE_DECAY)
        self.steps += 1
        return counts

    def _is_restart_due(self, progress: float) -> bool:
        return progress < self.RESTART_UNTIL and int(self.steps) % self.RESTART_EVERY == 0


class GumbelQuantiser(Quantiser):
    """Gumbel-softmax relaxation, as in the DALL-E paper (Ramesh et al. 2021, §2.1).

    Training mixes the codes by relaxed one-hot weights of falling temperature; encoding takes the
    likeliest code.
    """

    FINAL_TEMPERATURE = 1 / 16  # ibid., appendix A.2
    FINAL_PROGRESS = 0.75  # share of the training after which the temperature is final

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__(config)
        self.to_logits = _projections(config, config.codebook_size)
        self.kl_weight = config.kl_weight

    def _logits(self, features: Sequence[Tensor]) -> Tensor:
        """[B, N, M, V]"""
        return _project(self.to_logits, features)

    def gumbel_temperature(self, progress: float) -> float:
        """Return the temperature: 1 at the start, falling to the final one along a cosine."""
        done = min(1.0, progress / self.FINAL_PROGRESS)
        above = 0.5 * (1 + math.cos(math.pi * done))
        return self.FINAL_TEMPERATURE + (1 - self.FINAL_TEMPERATURE) * above

    def forward(
        self, features: Sequence[Tensor], progress: float, ranks: Ranks = ONE_RANK
    ) -> Quantised:
        logits = self._logits(features)
        # Gumbel noise from uniform numbers: torch's exponential_ is three times slower on a CPU.
        noise = -(-torch.rand_like(logits).clamp_min(1e-20).log()).clamp_min(1e-20).log()
        weights = ((logits + noise) / self.gumbel_temperature(progress)).softmax(dim=-1)
        mixed = torch.einsum("bnmv,mve->bnme", weights, self.codebook)
        embeddings = mixed.flatten(2).mT.reshape(len(mixed), -1, *features[0].shape[-2:])
        if self.training:
            self._update_usage(logits.argmax(dim=-1), ranks)
            if self._is_restart_due(progress):
                self._restart()
                ranks.copy_first([self.usage, self.codebook, *self.to_logits.parameters()])
        if self.kl_weight == 0.0:
            return Quantised(embeddings, logits.new_zeros(()))
        log_q = logits.log_softmax(dim=-1)
        kl = (log_q.exp() * log_q).sum(dim=-1).mean() + math.log(logits.shape[-1])
        return Quantised(embeddings, self.kl_weight * kl)

    def tokens(self, features: Sequence[Tensor]) -> Tensor:
        return self._logits(features).argmax(dim=-1)

    @torch.no_grad()
    def _restart(self) -> None:
        """Make each dead code a noisy copy of a live one, sampled by usage, to split its usage."""
        for m, dead in enumerate(self.dead()):
            targets = dead.nonzero().flatten()
            if len(targets) == 0:
                continue
            sources = torch.multinomial(self.usage[m], len(targets), replacement=True)
            _copy_nearly(self.codebook[m], sources, targets)
            for parameter in self.to_logits[m].parameters():
                _copy_nearly(parameter, sources, targets)
            self.usage[m, targets] = self.even_share


class VectorQuantiser(Quantiser):
    """Nearest code by Euclidean distance, straight-through gradient (van den Oord et al. 2017).

    Codes are moving averages of the vectors assigned to them (ibid., appendix A.1), not trained by
    gradient. They start as vectors of the first batch. A dead code restarts as a vector of the
    current batch, sampled by the squared distance to the live codes as in k-means++ (Arthur &
    Vassilvitskii 2007): sampled uniformly, most restarts would land on the background.
    """

    sums: Tensor  # [M, V, E] moving sums of the vectors assigned to each code
    counts: Tensor  # [M, V] moving numbers of these vectors

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__(config)
        self.codebook.requires_grad_(False)
        self.to_vectors = _projections(config, config.code_width)
        self.commitment_weight = config.commitment_weight
        self.register_buffer("sums", torch.zeros_like(self.codebook))
        self.register_buffer("counts", torch.zeros_like(self.usage))

    def _vectors(self, features: Sequence[Tensor]) -> Tensor:
        """[B, N, M, E], normalised: otherwise encoder and codebook could grow without bound."""
        E = self.codebook.shape[2]
        return F.layer_norm(_project(self.to_vectors, features), (E,))

    def _nearest(self, vectors: Tensor) -> Tensor:
        # |x - c|² without |x|², which is the same for every code.
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
        chosen = embed_codes(self.codebook, image_tokens)
        if self.training:
            self._update_codebook(vectors, image_tokens, ranks)
            if self._is_restart_due(progress):
                ranks.copy_first([self.usage])  # bit-equal, so that `dead` is equal on all ranks
                self._restart(self.dead(), vectors, ranks)
        commitment = F.mse_loss(flat, chosen)
        return Quantised(flat + (chosen - flat).detach(), self.commitment_weight * commitment)

    def tokens(self, features: Sequence[Tensor]) -> Tensor:
        return self._nearest(self._vectors(features))

    @torch.no_grad()
    def _update_codebook(self, vectors: Tensor, image_tokens: Tensor, ranks: Ranks) -> None:
        """Move each code towards the mean of the vectors [B, N, M, E] assigned to it."""
        counts = self._update_usage(image_tokens, ranks)
        sums = torch.zeros_like(self.sums)
        for m in range(self.codebook.shape[0]):
            flat = vectors[..., m, :].flatten(0, 1).to(self.sums.dtype)
            sums[m].index_add_(0, image_tokens[..., m].flatten(), flat)
        self.counts.lerp_(counts.to(self.counts.dtype), 1 - self.USAGE_DECAY)
        self.sums.lerp_(ranks.total(sums), 1 - self.USAGE_DECAY)
        has_vectors = self.counts > 1e-3
        self.codebook[has_vectors] = self.sums[has_vectors] / self.counts[has_vectors][:, None]

    @torch.no_grad()
    def _restart(self, dead: Tensor, vectors: Tensor, ranks: Ranks = ONE_RANK) -> None:
        """Set the codes marked in `dead` [M, V] to vectors [B, N, M, E] far from the live codes.

        The first rank samples from the vectors of all ranks, and the others copy its codebook.
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
            self.usage[m, targets] = self.even_share
        ranks.copy_first([self.codebook, self.sums, self.counts, self.usage])


def build_quantiser(config: DVAEConfig) -> Quantiser:
    """Return the quantiser that the config names."""
    return (GumbelQuantiser if config.quantiser == "gumbel" else VectorQuantiser)(config)


def _projections(config: DVAEConfig, channels: int) -> nn.ModuleList:
    """Return one pointwise layer per codebook."""
    layers = (nn.Conv2d(config.width, channels, 1) for _ in range(config.num_codebooks))
    return nn.ModuleList(layers)


def _project(layers: nn.ModuleList, features: Sequence[Tensor]) -> Tensor:
    """Apply one layer to each of M feature maps [B, C, H, W] -> [B, N, M, channels]."""
    maps = [layer(each) for layer, each in zip(layers, features, strict=True)]
    return torch.stack([each.flatten(2).mT for each in maps], dim=2)


def _copy_nearly(parameter: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Set rows `targets` to rows `sources` plus 2 % noise."""
    noise = 0.02 * parameter.std() * torch.randn_like(parameter[targets])
    parameter[targets] = parameter[sources] + noise
