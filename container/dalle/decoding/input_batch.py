"""What an engine hands a decoding step: what it knows of its slots, and the rows of a step.

Letters: S slots, B rows of a step, C candidates in the making, N positions, V codebook size, M
codes, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dalle.decoding.request import Candidate
from dalle.decoding.sampling import SamplingOptions, choose
from dalle.models.transformer import TransformerConfig


@dataclass(frozen=True, eq=False)
class SlotState:
    """What an engine knows of its slots; a candidate's own is that of its slot with the caption."""

    hidden: Tensor
    """[S, W]: what predicts the next position."""
    image_tokens: Tensor
    """[S, N, M] int64."""
    log_likelihood: Tensor
    """[S]: log p of what is drawn, in nats."""
    uniforms: Tensor
    """[S, N, M] in [0, 1): what draws it."""

    @classmethod
    def new(cls, config: TransformerConfig, num_slots: int, like: Tensor) -> SlotState:
        """like: a tensor of the model's device and dtype."""
        shape = (num_slots, config.num_positions, config.num_codebooks)
        return cls(
            hidden=like.new_zeros(num_slots, config.width),
            image_tokens=like.new_zeros(shape, dtype=torch.int64),
            log_likelihood=like.new_zeros(num_slots, dtype=torch.float32),
            uniforms=like.new_zeros(shape, dtype=torch.float32),
        )


class Batch:
    """The rows of a step, for as long as the same candidates are in the making: each candidate's,
    then those without caption of the ones with guidance.

    Tensors are made when they are first asked for, and nothing is sent to the device after that, so
    that a GPU is never waited for.
    """

    candidates: list[Candidate]
    """Of the first rows, [C]."""
    numpy_rows: np.ndarray
    """Each row's slot, [B]."""
    numpy_positions: np.ndarray
    """Each row's position, [B]."""
    guided: np.ndarray
    """The candidates with guidance, in the order of their rows without caption."""

    def __init__(
        self, candidates: Sequence[Candidate], num_positions: int, device: torch.device
    ) -> None:
        self.candidates = list(candidates)
        guided = [row for row, each in enumerate(candidates) if each.guidance_slot is not None]
        slots = [each.slot for each in candidates]
        guidance_slots = [candidates[row].guidance_slot for row in guided]
        positions = np.array([each.position for each in candidates], dtype=np.int64)
        self.numpy_rows = np.array([*slots, *guidance_slots], dtype=np.int64)
        self.numpy_positions = np.concatenate([positions, positions[guided]])
        self.guided = np.array(guided, dtype=np.int64)
        self._num_positions, self._device = num_positions, device
        self._places: Tensor | None = None

    def advance(self) -> None:
        """Every candidate is one position further."""
        for each in self.candidates:
            each.position += 1
        self.numpy_positions += 1
        if self._places is not None:
            self._places += 1

    @cached_property
    def rows(self) -> Tensor:
        """`numpy_rows` on the device."""
        return torch.from_numpy(self.numpy_rows).to(self._device)

    @cached_property
    def slots(self) -> Tensor:
        """Each candidate's slot, [C]."""
        return self.rows[: len(self.candidates)]

    @property
    def places(self) -> Tensor:
        """Each candidate's slot and position as one number, [C]."""
        if self._places is None:
            C = len(self.candidates)
            numbers = self.numpy_rows[:C] * self._num_positions + self.numpy_positions[:C]
            self._places = torch.from_numpy(numbers).to(self._device)
        return self._places

    def draw(
        self, code_logits: Callable[[Tensor, int, Tensor], Tensor], hidden: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw the candidates' codes [C, M] of what the rows' hidden [B, W] predict, and their
        log p [C], by uniforms [C, M].

        code_logits: as `SlotStep.code_logits`.
        """
        C, M = uniforms.shape
        codes = torch.zeros(C, M, dtype=torch.int64, device=self._device)
        log_likelihood = torch.zeros(C, device=self._device)
        for m in range(M):
            logits = code_logits(hidden, m, self.spread(codes)).float()
            codes[:, m] = self._choose(self._guide(logits), uniforms[:, m])
            log_p = logits[:C].log_softmax(dim=-1)
            log_likelihood += log_p.gather(1, codes[:, m, None]).squeeze(1)
        return codes, log_likelihood

    def spread(self, codes: Tensor) -> Tensor:
        """[C, M] -> [B, M]: a branch without caption takes in what its candidate drew."""
        return torch.cat([codes, codes[self._guided]]) if len(self.guided) else codes

    @cached_property
    def _guided(self) -> Tensor:
        """`guided` on the device."""
        return torch.from_numpy(self.guided).to(self._device)

    @cached_property
    def _scales(self) -> Tensor:
        """Of the guided ones, [., 1]."""
        scales = [self.candidates[row].generation.options.guidance_scale for row in self.guided]
        return torch.tensor(scales, device=self._device)[:, None]

    @cached_property
    def _draws(self) -> list[tuple[SamplingOptions, Tensor]]:
        """The candidates that draw alike, by how they do."""
        by_options: dict[SamplingOptions, list[int]] = {}
        for row, each in enumerate(self.candidates):
            options = each.generation.options
            by_options.setdefault(
                SamplingOptions(options.temperature, options.top_k, options.top_p), []
            ).append(row)
        return [
            (options, torch.tensor(rows, device=self._device))
            for options, rows in by_options.items()
        ]

    def _guide(self, logits: Tensor) -> Tensor:
        """[B, V] -> [C, V]"""
        if not len(self.guided):
            return logits
        C = len(self.candidates)
        conditional, blank = logits[:C], logits[C:]
        with_guidance = blank + self._scales * (conditional[self._guided] - blank)
        return conditional.index_copy(0, self._guided, with_guidance)

    def _choose(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """One code per candidate, [C]: together for all that draw alike."""
        if len(self._draws) == 1:
            return choose(logits, uniforms, self._draws[0][0])
        chosen = torch.empty(len(logits), dtype=torch.int64, device=self._device)
        for options, rows in self._draws:
            chosen[rows] = choose(logits[rows], uniforms[rows], options)
        return chosen
