"""Imported models compute what the package that trained them computed."""

import pytest
import torch

from dalle.decoding.engine import DecodeEngine
from dalle.decoding.sampling import SamplingOptions
from tests.training.job.legacy.imported import import_old
from tests.training.job.legacy.published.files import NAMES, old

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
    """An old model's results, and the transformer that was imported from its file."""
    name = request.param
    artefact = import_old(name, tmp_path_factory.mktemp(name))
    return old(name), artefact.require("transformer")


@torch.inference_mode()
def test_the_logits_are_those_of_the_old_code(pair):
    expected, model = pair
    text, image = model._hidden(expected.text, expected.image[:, :-1, None])
    logits = model.to_text_logits(model.normalised(text))
    assert (logits - expected.text_logits).abs().max() < TOLERANCE
    assert (model.code_logits(image, 0, image) - expected.image_logits).abs().max() < TOLERANCE


def test_the_engine_samples_the_greedy_tokens_of_the_old_code(pair, request):
    expected, model = pair
    # The first rows are given to most models: each step takes as long as all rows together.
    name = request.node.callspec.params["pair"]
    num_given = 0 if name in ("0.8.3-four", "1.6.6-all") else 5 * 8
    engine = DecodeEngine(model, num_slots=2)
    requests = [
        engine.submit(
            caption[None],
            candidates=[0],
            seed=0,
            options=SamplingOptions(temperature=0),
            prime_tokens=tokens[:num_given, None] if num_given else None,
        )
        for caption, tokens in zip(expected.text, expected.greedy, strict=True)
    ]
    found = {}
    while not engine.is_idle:
        found |= {requests.index(each.request): each for each in engine.step()}
    for number, tokens in enumerate(expected.greedy):
        assert torch.equal(found[number].image_tokens[:, 0], tokens)


@torch.inference_mode()
def test_the_greedy_tokens_of_the_old_code_are_the_likeliest_when_they_are_given(pair):
    expected, model = pair
    _, hidden = model._hidden(expected.text, expected.greedy[:, :-1, None])
    assert torch.equal(model.code_logits(hidden, 0, hidden).argmax(dim=-1), expected.greedy)
