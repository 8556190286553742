"""CLIP trained from scratch, and OpenAI's checkpoints, which give OpenAI's features."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import clip
import clip.model
import pytest
import torch
import torch.nn.functional as F

from dalle.errors import ArtefactError, CaptionTooLong
from dalle.models.clip import Clip, ClipConfig, _openai_tokens
from dalle.preprocess.clip_tokenizer import ClipTokenizer

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
CAPTIONS = [
    "a photo of a cat",
    "",
    "Café — 3 dogs’ &amp; 12 birds!  ",
    "日本語 😀",
    "word " * 200,
]
TINY = ClipConfig(
    embed_size=16,
    image_size=16,
    vision_layers=1,
    vision_width=64,
    patch_size=4,
    text_vocab_size=12,  # 11 of the tokenizer and the end mark
    text_length=6,  # 5 and the end mark
    text_width=32,
    text_heads=2,
    text_layers=1,
)


@pytest.fixture
def model() -> Clip:
    torch.manual_seed(0)
    return Clip(TINY)


def random_pairs(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text_tokens = torch.randint(1, 11, (count, 5), generator=generator)
    text_tokens[::2, 3:] = 0
    return torch.rand(count, 3, 16, 16, generator=generator), text_tokens


@torch.no_grad()
def test_both_encoders_give_unit_vectors(model):
    images, text_tokens = random_pairs()
    copies = images.clone(), text_tokens.clone()
    for features in (model.encode_image(images), model.encode_text(text_tokens)):
        assert features.shape == (6, 16)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(6))
    assert (images == copies[0]).all()
    assert (text_tokens == copies[1]).all()


@torch.no_grad()
@pytest.mark.parametrize("size", [8, 17, 64])
def test_images_of_any_size_are_read(model, size):
    flat = torch.full((1, 3, size, size), 0.25)
    expected = model.encode_image(torch.full((1, 3, 16, 16), 0.25))
    torch.testing.assert_close(model.encode_image(flat), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_captions_vector_is_read_at_its_end_mark(model):
    text_tokens = torch.tensor([[3, 1, 10, 0, 0], [3, 1, 0, 0, 0], [0] * 5, [5, 4, 3, 2, 1]])
    # What stands behind the end mark, 11, is never seen: text attention is causal.
    marked = torch.tensor(
        [[3, 1, 10, 11, 4, 9], [3, 1, 11, 2, 2, 2], [11, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1, 11]]
    )
    expected = F.normalize(model.model.encode_text(marked), dim=-1)
    torch.testing.assert_close(model.encode_text(text_tokens), expected)


@torch.no_grad()
def test_equal_captions_count_as_positives(model):
    images, text_tokens = random_pairs(4)
    text_tokens[2] = text_tokens[0]
    logits = (
        model.model.logit_scale.exp()
        * model.encode_image(images)
        @ (model.encode_text(text_tokens).T)
    )
    pairs = {0: [0, 2], 1: [1], 2: [0, 2], 3: [3]}
    expected = 0.0
    for table in (logits.log_softmax(dim=1), logits.T.log_softmax(dim=1)):
        means = [table[row, columns].mean() for row, columns in pairs.items()]
        expected -= float(sum(means)) / 4 / 2
    loss = model.loss(images, text_tokens)
    assert float(loss.total) == pytest.approx(expected, rel=1e-4)
    right = [int(best) in pairs[row] for row, best in enumerate(logits.argmax(dim=1))]
    assert float(loss.accuracy) == pytest.approx(sum(right) / 4)


@torch.no_grad()
def test_pairs_with_the_same_picture_count_as_positives(model):
    images, text_tokens = random_pairs(4)
    images[2] = images[0]
    numbered = model.loss(images, text_tokens, image_numbers=torch.tensor([7, 1, 7, 3]))
    scale = model.model.logit_scale.exp()
    by_image = scale * model.encode_image(images) @ model.encode_text(text_tokens).T
    targets = torch.eye(4)
    targets[0, [0, 2]] = targets[2, [0, 2]] = 0.5
    expected = (F.cross_entropy(by_image, targets) + F.cross_entropy(by_image.T, targets)) / 2
    torch.testing.assert_close(numbered.total, expected)
    apart = model.loss(images, text_tokens, image_numbers=torch.arange(4))
    torch.testing.assert_close(apart.total, model.loss(images, text_tokens).total)


@torch.no_grad()
def test_a_batch_of_one_caption_has_accuracy_1(model):
    images, text_tokens = random_pairs(4)
    loss = model.loss(images, text_tokens[:1].expand(4, -1))
    assert float(loss.accuracy) == 1


@torch.no_grad()
def test_the_temperature_stays_within_openais_bound(model):
    pairs = random_pairs()
    model.model.logit_scale.fill_(math.log(100))
    expected = float(model.loss(*pairs).total)
    model.model.logit_scale.fill_(50.0)
    assert float(model.loss(*pairs).total) == pytest.approx(expected)


@pytest.mark.slow
def test_it_learns_which_caption_belongs_to_which_image(model):
    images, text_tokens = random_pairs()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    first = model.loss(images, text_tokens)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.loss(images, text_tokens)
        loss.total.backward()
        optimizer.step()
    assert loss.total.item() < 0.2 * first.total.item()
    assert loss.accuracy.item() == 1


def test_captions_for_training_have_openais_ids_and_long_ones_are_refused():
    tokenizer = ClipTokenizer(77)
    assert (tokenizer.encode(CAPTIONS[:4]) == clip.tokenize(CAPTIONS[:4])).all()
    longest = "word " * 75
    assert (tokenizer.encode([longest]) == clip.tokenize([longest])).all()
    with pytest.raises(CaptionTooLong, match="at most 75 tokens long, got 76"):
        tokenizer.encode([longest + "word"])
    assert tokenizer.encode([tokenizer.fitting(longest + "word")]).shape == (1, 77)


def test_a_published_clip_has_the_loss_of_the_original():
    torch.manual_seed(0)
    original = clip.model.CLIP(16, 32, 1, 64, 16, 77, 49408, 64, 1, 1)
    config = replace(
        TINY, image_size=32, patch_size=16, text_vocab_size=49408, text_length=77, text_width=64
    )
    model = Clip(replace(config, text_heads=1, tokenizer="openai"))
    model.model.load_state_dict(original.state_dict())
    captions = ["a cat", "a dog", "three red stars"]
    images = torch.rand(3, 3, 32, 32)
    loss = model.loss(images, ClipTokenizer(77).encode(captions)).total
    by_image, by_caption = original((images - MEAN) / STD, clip.tokenize(captions))
    pairs = torch.arange(3)
    expected = (F.cross_entropy(by_image, pairs) + F.cross_entropy(by_caption, pairs)) / 2
    torch.testing.assert_close(loss, expected)


def test_a_resnet_keeps_its_statistics_in_training():
    config = replace(TINY, vision_layers=(1, 1, 1, 1), vision_width=8, patch_size=None)
    model = Clip(replace(config, image_size=32)).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.encode_image(torch.rand(2, 3, 32, 32)).sum().backward()
    assert model.training
    assert model.model.visual.bn1.weight.grad is not None
    assert all((value == before[name]).all() for name, value in model.named_buffers())


@torch.no_grad()
def test_captions_are_read_with_the_artefacts_tokenizer(tiny_models):
    captions = ["big filled red star", "small blue circle"]
    model, tokenizer = tiny_models.clip, tiny_models.tokenizer
    expected = model.encode_text(tokenizer.encode(captions))
    assert (model.encode_captions(captions, tokenizer) == expected).all()
    with pytest.raises(ArtefactError, match="reads the artefact's tokenizer, which is missing"):
        model.encode_captions(captions, None)


def test_openai_tokenization_is_openais():
    expected = clip.tokenize(CAPTIONS, truncate=True)
    assert (_openai_tokens(CAPTIONS, 77) == expected).all()


@pytest.mark.slow
def test_importing_our_clip_brings_neither_torchvision_nor_torchs_compiler():
    code = "import sys, dalle.models.clip; print({'torchvision', 'torch._dynamo'} & {*sys.modules})"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.strip() == "set()"
