"""Muon for the hidden matrices, AdamW for everything else, under one schedule.

Muon is Keller Jordan's (https://kellerjordan.github.io/posts/muon/, 2024): the momentum of a
matrix is replaced by the nearest matrix with orthonormal rows or columns, which a few
Newton-Schulz iterations approximate. `torch.optim.Muon` iterates in bfloat16 only; on a CPU
without bf16 units that takes four times as long as here (12 matrices of 192 x 768, one thread:
260 ms against 65 ms), and it refuses weights that are not matrices.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ADAM_BETAS = (0.9, 0.99)
MOMENTUM = 0.95
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TOGETHER_ELEMENTS = 1 << 27
"""Most elements in one batched product: all equal matrices of a large model take gigabytes."""


class Muon(torch.optim.Optimizer):
    """Muon: Nesterov momentum, orthogonalised, so that all directions get steps of similar size.

    Weights with more than two dimensions (convolutions) are taken as matrices [first, rest].
    learning_rate: size of a step for a square matrix; tall ones take sqrt(rows / columns) more.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float = 0.0
    ) -> None:
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.ndim < 2:
                raise ValueError(f"Muon takes matrices only, got shape {tuple(parameter.shape)}")
        super().__init__(parameters, {"lr": learning_rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group["lr"], group["weight_decay"])

    def _update(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        momenta = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            momenta.append(state["momentum"])
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        directions = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        if weight_decay:
            torch._foreach_mul_(parameters, 1 - lr * weight_decay)

        by_shape: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for index, parameter in enumerate(parameters):
            by_shape[(parameter.shape[0], parameter[0].numel())].append(index)
        for (rows, columns), same in by_shape.items():
            size = lr * max(1.0, rows / columns) ** 0.5
            number = _together(rows, columns)
            for first in range(0, len(same), number):
                some = same[first : first + number]
                _move([parameters[i] for i in some], [directions[i] for i in some], size)


def _move(parameters: Sequence[Tensor], directions: Sequence[Tensor], size: float) -> None:
    """Update some matrices of one shape; a function, so that its temporaries are freed."""
    stacked = torch.stack([each.flatten(1) for each in directions])
    for parameter, update in zip(parameters, orthogonalise(stacked), strict=True):
        parameter.add_(update.view_as(parameter), alpha=-size)


def orthogonalise(matrices: Tensor) -> Tensor:
    """[B, rows, columns] -> the same shape and dtype, with all singular values near 1.

    Quintic Newton-Schulz iteration: not exact, the values end up between about 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = matrices.to(_iteration_type(matrices.device))
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    if is_tall:
        x = x.mT
    return x.to(matrices.dtype)


def muon_update_elements(parameters: Sequence[Tensor]) -> int:
    """Return the peak number of temporary elements in a step of `Muon`.

    All directions, and for the largest batch of matrices: a copy of them, the iteration's old and
    new matrices, and two products.
    """
    held = [0]
    groups = Counter((each.shape[0], each[0].numel()) for each in parameters)
    for (rows, columns), number in groups.items():
        together = min(number, _together(rows, columns))
        held.append(together * (3 * rows * columns + 2 * min(rows, columns) ** 2))
    return sum(each.numel() for each in parameters) + max(held)


def _together(rows: int, columns: int) -> int:
    """Return the number of matrices in one batched product; large batches fill a GPU."""
    return max(1, TOGETHER_ELEMENTS // (rows * columns))


def _iteration_type(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware has it: exact enough for the iteration, and faster."""
    is_native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_native else torch.float32


class ModelOptimizers:
    """Muon and AdamW of one model, with a common schedule and state.

    Muon gets the model's `muon_parameters()`, AdamW all others. A model without that method, or
    muon_learning_rate 0, has AdamW only.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        muon_learning_rate: float = 0.0,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
    ) -> None:
        self.warmup_steps = warmup_steps
        hidden = hidden_matrices(model) if muon_learning_rate else []
        hidden_ids = {id(parameter) for parameter in hidden}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in hidden_ids]
        self.optimizers: list[torch.optim.Optimizer] = []
        if hidden:
            muon = Muon(hidden, learning_rate=muon_learning_rate, weight_decay=weight_decay)
            self.optimizers.append(muon)
        if rest:
            # No weight decay on gains and biases: a norm with gain 0 is a dead layer.
            groups = [
                {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
                {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            ]
            adam = torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=learning_rate,
                betas=ADAM_BETAS,
                fused=True,
            )
            self.optimizers.append(adam)
        self._full_rates = [
            [float(group["lr"]) for group in optimizer.param_groups]
            for optimizer in self.optimizers
        ]

    def schedule(self, step: int, progress: float) -> float:
        """Set the learning rates for one step and return their share of the full ones.

        step counts from 0; progress is the share of the whole budget done, in [0, 1].
        """
        share = learning_rate_share(step, progress, self.warmup_steps)
        for optimizer, rates in zip(self.optimizers, self._full_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
        return share

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def learning_rate_share(step: int, progress: float, warmup_steps: int) -> float:
    """Return the share of the full learning rate: linear warm-up, then linear decay to 0.

    The decay follows progress, not steps, so that a budget in minutes ends at 0 as well.
    """
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return rise * (1.0 - min(1.0, max(0.0, progress)))


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters for Muon."""
    choose = getattr(model, "muon_parameters", None)
    if choose is None:
        return []
    return [parameter for parameter in choose() if parameter.requires_grad]
