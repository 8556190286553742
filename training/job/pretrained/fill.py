"""A model from a config and the weights of a file that others wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from dalle.models.uninitialised import without_memory
from training.job.pretrained.weights_file import to_float32

Model = TypeVar("Model", bound=nn.Module)


def fill_model(build: Callable[[], Model], state: Mapping[str, Tensor]) -> Model:
    """Return the model with these weights in float32, in evaluation mode, without gradients.

    Raises ValueError naming a weight that is missing, unknown or of another shape.
    """
    with without_memory():
        model = build()
    expected = model.state_dict()
    require_weights(expected, state)
    masks = {name: state[name] for name, each in expected.items() if each.dtype == torch.bool}
    numbers = {name: value for name, value in state.items() if name not in masks}
    model.load_state_dict({**to_float32(numbers), **masks}, assign=True)
    return model.eval().requires_grad_(False)


def require_weights(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming a weight that is missing, unknown, of another shape, or no mask.

    expected: of the model, which may be without memory. Its masks must be truth values.
    """
    for name in sorted(expected.keys() ^ state.keys()):
        raise ValueError(f"it {'lacks' if name in expected else 'has an unknown'} weight {name}")
    for name, weight in expected.items():
        if state[name].shape != weight.shape:
            raise ValueError(
                f"the weight {name} has the shape {[*state[name].shape]}, and its sizes need "
                f"{[*weight.shape]}"
            )
        if weight.dtype == torch.bool and state[name].dtype != torch.bool:
            raise ValueError(
                f"the weight {name} has the type {state[name].dtype}, and must have torch.bool"
            )
