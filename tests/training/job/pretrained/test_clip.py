"""training.job.pretrained.clip: OpenAI's files give OpenAI's features and probabilities."""

import io
import json
from dataclasses import replace
from pathlib import Path

import clip
import pytest
import torch
import torch.nn.functional as F
from clip.model import CLIP, convert_weights
from PIL import Image
from pydantic import TypeAdapter

from dalle.errors import ArtefactError, ForeignFileError
from dalle.models.clip import Clip, ClipConfig
from dalle.models.uninitialised import without_memory
from dalle.preprocess.tokenizer import CaptionTokenizer
from inference.api.schema import GenerateRequest
from inference.engine.model_runner import ModelRunner
from inference.engine.scheduler import to_pixels
from tests.dalle.models.test_clip import CAPTIONS, MEAN, STD
from tests.training.job.pretrained.clip_files import (
    build_openai,
    open_clip,
    probabilities,
    save_state,
)
from training.job.pretrained.clip import _sizes, find_clip, load_clip

WORDS = ["a cat", "a dog", "a red star on white", "nothing at all"]
SIZES = {
    # image size, patch, layers and width of the image encoder; embedding, text width and heads
    "RN50": (224, None, (3, 4, 6, 3), 64, 1024, 512, 8),
    "RN101": (224, None, (3, 4, 23, 3), 64, 512, 512, 8),
    "RN50x4": (288, None, (4, 6, 10, 6), 80, 640, 640, 10),
    "RN50x16": (384, None, (6, 8, 18, 8), 96, 768, 768, 12),
    "RN50x64": (448, None, (3, 15, 36, 10), 128, 1024, 1024, 16),
    "ViT-B/32": (224, 32, 12, 768, 512, 512, 8),
    "ViT-B/16": (224, 16, 12, 768, 512, 512, 8),
    "ViT-L/14": (224, 14, 24, 1024, 768, 768, 12),
    "ViT-L/14@336px": (336, 14, 24, 1024, 768, 768, 12),
}
"""All that OpenAI published (openai/CLIP, model-card.md and the archives)."""


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
    compare(load_clip(tmp_path / "clip.pt"), original.float())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_openais_torchscript_archive_gives_openais_features(kind, tmp_path):
    original = build_openai(kind)
    save_archive(original, tmp_path / "clip.pt")
    compare(load_clip(tmp_path / "clip.pt"), original)


def test_a_loaded_clip_can_be_rebuilt_from_its_config(tmp_path):
    save_state(build_openai("resnet"), tmp_path / "clip.pt")
    loaded = load_clip(tmp_path / "clip.pt")
    text = json.dumps(TypeAdapter(ClipConfig).dump_python(loaded.config))
    config = TypeAdapter(ClipConfig).validate_json(text)
    assert config == loaded.config
    Clip(config).load_state_dict(loaded.state_dict())


def test_openais_weights_refuse_the_artefacts_tokens(tmp_path):
    save_state(build_openai("vit"), tmp_path / "clip.pt")
    loaded = load_clip(tmp_path / "clip.pt")
    with pytest.raises(AssertionError, match="use encode_captions"):
        loaded.encode_text(torch.zeros(1, 5, dtype=torch.int64))
    tokenizer = CaptionTokenizer.train(["a cat"], text_length=2)
    with torch.no_grad():
        features = loaded.encode_captions(["a cat with a hat"], tokenizer)
    assert features.shape == (1, 24)


def test_a_weight_beyond_float32_or_of_truth_values_is_refused_by_name(tmp_path):
    state = build_openai("resnet").state_dict()
    state["ln_final.weight"] = state["ln_final.weight"].double() * 1e300
    torch.save(state, tmp_path / "clip.pt")
    says = r"^clip\.pt: the weight ln_final\.weight has values that float32 cannot hold$"
    with pytest.raises(ForeignFileError, match=says):
        load_clip(tmp_path / "clip.pt")
    torch.save(state | {"ln_final.weight": torch.ones(64, dtype=torch.bool)}, tmp_path / "clip.pt")
    with pytest.raises(ForeignFileError, match=r"ln_final\.weight has the type torch\.bool"):
        load_clip(tmp_path / "clip.pt")


def small(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A vision transformer's weights where widths are 1 or 64, and some of other shapes."""
    model = CLIP(1, 1, 1, 64, 1, 77, 49408, 1, 1, 1)
    state = dict(model.state_dict())
    return state | {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"positional_embedding": (12_000, 1)}, "its captions have 12,000 text tokens, more than"),
        (
            {"visual__conv1__weight": (16_384, 3, 1, 1), "text_projection": (1, 16_384)},
            r"the weight visual\.\S+ has the shape \[.*\], and its sizes need \[.*16384",
        ),
    ],
)
def test_a_small_file_of_a_large_model_is_refused_before_the_model_has_memory(
    shapes, says, tmp_path, monkeypatch
):
    def fails() -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr("training.job.pretrained.clip.without_random_values", fails)
    torch.save(small(**shapes), tmp_path / "clip.pt")
    with pytest.raises(ForeignFileError, match=says):
        load_clip(tmp_path / "clip.pt")


def lacking(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not a checkpoint at all", "cannot be read as weights"),
        (None, "cannot be read: No such file"),
        ([torch.zeros(3)], "is not a CLIP"),
        ({"weight": torch.zeros(3)}, r"is not a CLIP: it lacks \['logit_scale'"),
        ("visual.", "is not a CLIP"),
        ("visual.conv1", "is not a CLIP"),
        ("transformer.resblocks.1.mlp", "is not a CLIP"),
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
        load_clip(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_of_every_published_model_are_found(name):
    size, patch, layers, width, embed_size, text_width, heads = SIZES[name]
    with without_memory():
        original = CLIP(embed_size, size, layers, width, patch, 77, 49408, text_width, heads, 12)
        config = ClipConfig(**_sizes(original.state_dict()), tokenizer="openai")
        rebuilt = Clip(config).model
    assert (config.image_size, config.text_heads) == (size, heads)
    for ours, theirs in zip(rebuilt.modules(), original.modules(), strict=True):
        assert type(ours).__name__ == type(theirs).__name__
        assert getattr(ours, "num_heads", 0) == getattr(theirs, "num_heads", 0)
    shapes = {name: value.shape for name, value in original.state_dict().items()}
    assert shapes == {name: value.shape for name, value in rebuilt.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_pictures_of_any_shape_are_classified_as_the_original_classifies_them(kind, tmp_path):
    original = build_openai(kind)
    save_state(original, tmp_path / "clip.pt")
    transform = clip.clip._transform(64)
    files = [*open_clip("gelu").pictures, *open_clip("quick_gelu").pictures]
    pictures = [transform(Image.open(io.BytesIO(each))) for each in files]
    logits, _ = original(torch.stack(pictures), clip.tokenize(WORDS))
    got = probabilities(load_clip(tmp_path / "clip.pt"), WORDS, files)
    torch.testing.assert_close(got, logits.softmax(dim=-1), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("size", [40, 64, 224])
def test_generated_pictures_are_ranked_as_the_original_ranks_their_files(size, tmp_path):
    """The original reads eight bits a colour from the file, and resizes them by Pillow."""
    original = build_openai("vit")
    save_state(original, tmp_path / "clip.pt")
    loaded = load_clip(tmp_path / "clip.pt")
    generator = torch.Generator().manual_seed(size)
    smooth = F.interpolate(torch.rand(4, 3, 5, 5, generator=generator), size=size, mode="bicubic")
    noise = 0.2 * torch.rand(4, 3, size, size, generator=generator)
    images = (smooth + noise).clamp(0, 1)
    transform = clip.clip._transform(64)
    files = [Image.fromarray(each) for each in to_pixels(images)]
    logits, _ = original(torch.stack([transform(each) for each in files]), clip.tokenize(WORDS))
    cosines = loaded.encode_generated(images) @ loaded.encode_captions(WORDS, None).T
    got = (original.logit_scale.exp() * cosines).softmax(dim=-1)
    torch.testing.assert_close(got, logits.softmax(dim=-1), atol=1e-4, rtol=0)


@torch.no_grad()
def test_candidates_have_the_scores_that_the_original_gives_their_files(tiny_models, tmp_path):
    original = build_openai("vit")
    save_state(original, tmp_path / "clip.pt")
    artefact = replace(tiny_models, clip=load_clip(tmp_path / "clip.pt"))
    runner = ModelRunner(artefact, torch.device("cpu"))
    request = GenerateRequest(caption="a red square", num_candidates=3, num_images=3, seed=7)
    result = runner.run(runner.prepare(request))
    assert result.ranked_by == "clip"
    transform = clip.clip._transform(64)
    pictures = [transform(Image.fromarray(each.pixels)) for each in result.ranked]
    images = F.normalize(original.encode_image(torch.stack(pictures)), dim=-1)
    caption = F.normalize(original.encode_text(clip.tokenize("a red square")), dim=-1)
    expected = (images @ caption.T)[:, 0].tolist()
    assert [each.clip_score for each in result.ranked] == pytest.approx(expected, abs=1e-5)
    assert expected == sorted(expected, reverse=True)


@pytest.mark.parametrize("weight", ["ln_final.weight", "visual.class_embedding", "logit_scale"])
def test_a_clip_with_a_weight_that_is_not_a_number_is_refused_by_name(weight, tmp_path):
    state = build_openai("vit").state_dict()
    state[weight] = torch.full_like(state[weight], float("nan"))
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(ForeignFileError, match=rf"clip\.pt: the weight {weight} has values"):
        load_clip(tmp_path / "clip.pt")


def test_a_text_tower_with_another_vocabulary_is_refused(tmp_path):
    state = build_openai("vit").state_dict()
    state["token_embedding.weight"] = torch.zeros(32_000, 64)
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(ForeignFileError, match="has 32,000 text tokens, and OpenAI's"):
        load_clip(tmp_path / "clip.pt")


def test_a_file_that_does_not_say_its_activation_is_taken_for_openais_with_a_warning(
    tmp_path, caplog
):
    torch.save(build_openai("vit").state_dict(), tmp_path / "clip.pt")
    assert load_clip(tmp_path / "clip.pt").config.activation == "quick_gelu"
    assert "clip.pt does not say its activation" in caplog.text
    caplog.clear()
    save_state(build_openai("vit"), tmp_path / "clip.pt")
    load_clip(tmp_path / "clip.pt")
    assert not caplog.text


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "open_clip_pytorch_model.bin", "a.safetensors"])
def test_the_channel_has_one_file_of_weights_and_perhaps_open_clips_config(name, tmp_path):
    for other in (name, "README.md", "open_clip_config.json", ".hidden.pt"):
        (tmp_path / other).touch()
    found = find_clip(tmp_path)
    assert [path.name for path in found] == [name, "open_clip_config.json"]
    (tmp_path / "b.bin").touch()
    with pytest.raises(ForeignFileError, match="must hold one file of a CLIP's weights"):
        find_clip(tmp_path)
