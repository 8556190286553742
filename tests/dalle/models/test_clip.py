"""CLIP trained from scratch, and OpenAI's checkpoints, which give OpenAI's features."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import clip
import pytest
import torch
import torch.nn.functional as F
from clip.model import CLIP, convert_weights
from pydantic import TypeAdapter

from dalle.errors import ArtefactError
from dalle.models.clip import Clip, ClipConfig, _openai_tokens
from dalle.preprocess.tokenizer import CaptionTokenizer

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


@torch.no_grad()
def test_captions_are_read_with_the_artefacts_tokenizer(tiny_models):
    captions = ["big filled red star", "small blue circle"]
    model, tokenizer = tiny_models.clip, tiny_models.tokenizer
    expected = model.encode_text(tokenizer.encode(captions))
    assert (model.encode_captions(captions, tokenizer) == expected).all()
    with pytest.raises(ArtefactError, match="reads the artefact's tokenizer, which is missing"):
        model.encode_captions(captions, None)


def build_openai(kind: str) -> CLIP:
    """Build OpenAI's class, tiny and with random weights."""
    torch.manual_seed(0)
    vision = {
        "vit": {"vision_layers": 2, "vision_width": 64, "vision_patch_size": 8},
        "resnet": {"vision_layers": (1, 2, 1, 1), "vision_width": 8, "vision_patch_size": None},
    }[kind]
    text = {"transformer_width": 64, "transformer_heads": 1, "transformer_layers": 2}
    model = CLIP(
        embed_dim=24, image_resolution=64, context_length=77, vocab_size=49408, **vision, **text
    )
    return model.eval().requires_grad_(False)


def save_state(model: CLIP, path: Path) -> None:
    numbers = {"input_resolution": 64, "context_length": 77, "vocab_size": 49408}
    state = model.state_dict()
    torch.save(state | {name: torch.tensor(value) for name, value in numbers.items()}, path)


def save_archive(model: CLIP, path: Path) -> None:
    example = torch.zeros(1, 3, 64, 64), clip.tokenize(["a"])
    torch.jit.trace(model, example, check_trace=False).save(str(path))


def compare(loaded: Clip, original: CLIP) -> None:
    """Compare the features of images in [0, 1] and of captions."""
    assert loaded.config.tokenizer == "openai"
    assert not loaded.training
    images = torch.rand(3, 3, 64, 64)
    expected = F.normalize(original.encode_image((images - MEAN) / STD), dim=-1)
    torch.testing.assert_close(loaded.encode_image(images), expected, atol=1e-5, rtol=0)
    tokens = clip.tokenize(CAPTIONS, truncate=True)
    expected = F.normalize(original.encode_text(tokens), dim=-1)
    torch.testing.assert_close(loaded.encode_captions(CAPTIONS, None), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_openais_state_dict_gives_openais_features(kind, half, tmp_path):
    original = build_openai(kind)
    if half:
        convert_weights(original)
    save_state(original, tmp_path / "clip.pt")
    compare(Clip.from_openai(tmp_path / "clip.pt"), original.float())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_openais_torchscript_archive_gives_openais_features(kind, tmp_path):
    original = build_openai(kind)
    save_archive(original, tmp_path / "clip.pt")
    compare(Clip.from_openai(tmp_path / "clip.pt"), original)


def test_a_loaded_clip_can_be_rebuilt_from_its_config(tmp_path):
    save_state(build_openai("resnet"), tmp_path / "clip.pt")
    loaded = Clip.from_openai(tmp_path / "clip.pt")
    text = json.dumps(TypeAdapter(ClipConfig).dump_python(loaded.config))
    config = TypeAdapter(ClipConfig).validate_json(text)
    assert config == loaded.config
    Clip(config).load_state_dict(loaded.state_dict())


def test_openai_tokenization_is_openais():
    expected = clip.tokenize(CAPTIONS, truncate=True)
    assert (_openai_tokens(CAPTIONS, 77) == expected).all()


def test_openais_weights_refuse_the_artefacts_tokens(tmp_path):
    save_state(build_openai("vit"), tmp_path / "clip.pt")
    loaded = Clip.from_openai(tmp_path / "clip.pt")
    with pytest.raises(AssertionError, match="use encode_captions"):
        loaded.encode_text(torch.zeros(1, 5, dtype=torch.int64))
    tokenizer = CaptionTokenizer.train(["a cat"], text_length=2)
    with torch.no_grad():
        features = loaded.encode_captions(["a cat with a hat"], tokenizer)
    assert features.shape == (1, 24)


def lacking(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not an OpenAI CLIP"),
        (b"not a checkpoint at all", "is not an OpenAI CLIP"),
        (b"PK\x03\x04" + b"\0" * 100, "is not an OpenAI CLIP"),
        (None, "is not an OpenAI CLIP"),
        ([torch.zeros(3)], "is not an OpenAI CLIP"),
        ({"weight": torch.zeros(3)}, r"is not an OpenAI CLIP: it lacks \['logit_scale'"),
        ("visual.", "is not an OpenAI CLIP"),
        ("visual.conv1", "is not an OpenAI CLIP"),
        ("transformer.resblocks.1.mlp", "is not an OpenAI CLIP"),
    ],
)
def test_a_file_that_is_no_clip_is_named(content, says, tmp_path):
    path = tmp_path / "cat.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        torch.save(lacking(build_openai("vit").state_dict(), content), path)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ArtefactError, match=f"cat.pt {says}"):
        Clip.from_openai(path)


def test_nothing_in_a_checkpoint_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(ArtefactError, match="evil.pt is not an OpenAI CLIP"):
        Clip.from_openai(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


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
