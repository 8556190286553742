"""The rows of a decoding step, for as long as the same candidates are in the making.

Letters: B rows of a step, C candidates in the making, N positions, V codebook size, M codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dalle.generations import Candidate
from dalle.sampling import SamplingOptions, choose


class Batch:
    """The rows of a step: each candidate's, then those without caption of the ones with guidance.

    Nothing is sent to the device after it is made, so that a GPU is never waited for.
    """

    candidates: list[Candidate]
    """Of the first rows, [C]."""
    numpy_rows: np.ndarray
    """Each row's slot, [B]."""
    rows: Tensor
    """The same on the device."""
    numpy_positions: np.ndarray
    """Each row's position, [B]."""
    slots: Tensor
    """Each candidate's slot, [C]."""
    guided: np.ndarray
    """The candidates with guidance, in the order of their rows without caption."""
    places: Tensor
    """Each candidate's slot and position as one number, [C]."""

    def __init__(
        self, candidates: Sequence[Candidate], num_positions: int, device: torch.device
    ) -> None:
        self.candidates = list(candidates)
        guided = [row for row, each in enumerate(candidates) if each.guidance_slot is not None]
        slots = np.array([each.slot for each in candidates], dtype=np.int64)
        positions = np.array([each.position for each in candidates], dtype=np.int64)
        guidance_slots = [candidates[row].guidance_slot for row in guided]
        self.numpy_rows = np.array([*slots, *guidance_slots], dtype=np.int64)
        self.numpy_positions = np.concatenate([positions, positions[guided]])
        self.rows = torch.from_numpy(self.numpy_rows).to(device)
        self.slots = torch.from_numpy(slots).to(device)
        self.places = torch.from_numpy(slots * num_positions + positions).to(device)
        self.guided = np.array(guided, dtype=np.int64)
        self._guided = torch.tensor(guided, dtype=torch.int64, device=device) if guided else None
        self._device = device
        scales = [candidates[row].generation.options.guidance_scale for row in guided]
        self._scales = torch.tensor(scales, device=device)[:, None]
        by_options: dict[SamplingOptions, list[int]] = {}
        for row, each in enumerate(candidates):
            options = each.generation.options
            by_options.setdefault(
                SamplingOptions(options.temperature, options.top_k, options.top_p), []
            ).append(row)
        self._draws = [
            (options, torch.tensor(rows, device=device)) for options, rows in by_options.items()
        ]

    def advance(self) -> None:
        """Every candidate is one position further."""
        for each in self.candidates:
            each.position += 1
        self.numpy_positions += 1
        self.places += 1

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
        return codes if self._guided is None else torch.cat([codes, codes[self._guided]])

    def _guide(self, logits: Tensor) -> Tensor:
        """[B, V] -> [C, V]"""
        if self._guided is None:
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
