"""dalle.models.uninitialised: the same shapes, the same constants, and no compiler."""

import sys

import torch

from dalle import artefact as artefacts
from dalle.models.uninitialised import without_memory, without_random_values
from tests.conftest import build_tiny_models


def shapes(models):
    return {
        (name, key): (value.shape, value.dtype)
        for name in ("dvae", "transformer", "clip")
        for key, value in getattr(models, name).state_dict().items()
    }


def test_models_without_memory_have_the_shapes_of_usual_ones(tiny_models):
    with without_memory():
        models = build_tiny_models()
    assert shapes(models) == shapes(tiny_models)
    assert {value.device.type for value in models.clip.state_dict().values()} == {"meta"}


def test_what_is_not_among_the_weights_has_its_value_all_the_same(tiny_models):
    with without_random_values():
        models = build_tiny_models()
    assert torch.equal(models.clip.mean, tiny_models.clip.mean)
    ours, theirs = (
        each.clip.model.transformer.resblocks[0].attn_mask for each in (models, tiny_models)
    )
    assert torch.equal(ours, theirs)


def test_an_artefact_is_loaded_without_the_compiler(tiny_artefact, monkeypatch):
    for module in ("torch._dynamo", "torch.fx.experimental.symbolic_shapes"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it is an error
    artefacts.load(tiny_artefact)
