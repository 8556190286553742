"""training.job.pretrained.openai_clip: OpenAI's files give OpenAI's features."""

import json
from pathlib import Path

import clip
import pytest
import torch
import torch.nn.functional as F
from clip.model import CLIP, convert_weights
from pydantic import TypeAdapter

from dalle.errors import ArtefactError, ForeignFileError
from dalle.models.clip import Clip, ClipConfig
from dalle.preprocess.tokenizer import CaptionTokenizer
from training.job.pretrained.openai_clip import load_openai_clip

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
CAPTIONS = [
    "a photo of a cat",
    "",
    "Café — 3 dogs’ &amp; 12 birds!  ",
    "日本語 😀",
    "word " * 200,
]


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
    compare(load_openai_clip(tmp_path / "clip.pt"), original.float())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_openais_torchscript_archive_gives_openais_features(kind, tmp_path):
    original = build_openai(kind)
    save_archive(original, tmp_path / "clip.pt")
    compare(load_openai_clip(tmp_path / "clip.pt"), original)


def test_a_loaded_clip_can_be_rebuilt_from_its_config(tmp_path):
    save_state(build_openai("resnet"), tmp_path / "clip.pt")
    loaded = load_openai_clip(tmp_path / "clip.pt")
    text = json.dumps(TypeAdapter(ClipConfig).dump_python(loaded.config))
    config = TypeAdapter(ClipConfig).validate_json(text)
    assert config == loaded.config
    Clip(config).load_state_dict(loaded.state_dict())


def test_openais_weights_refuse_the_artefacts_tokens(tmp_path):
    save_state(build_openai("vit"), tmp_path / "clip.pt")
    loaded = load_openai_clip(tmp_path / "clip.pt")
    with pytest.raises(AssertionError, match="use encode_captions"):
        loaded.encode_text(torch.zeros(1, 5, dtype=torch.int64))
    tokenizer = CaptionTokenizer.train(["a cat"], text_length=2)
    with torch.no_grad():
        features = loaded.encode_captions(["a cat with a hat"], tokenizer)
    assert features.shape == (1, 24)


def test_a_weight_beyond_float32_is_refused_by_name(tmp_path):
    state = build_openai("resnet").state_dict()
    state["ln_final.weight"] = state["ln_final.weight"].double() * 1e300
    torch.save(state, tmp_path / "clip.pt")
    says = r"^clip\.pt: the weight ln_final\.weight has values that float32 cannot hold$"
    with pytest.raises(ForeignFileError, match=says):
        load_openai_clip(tmp_path / "clip.pt")


def lacking(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not a checkpoint at all", "cannot be read as weights"),
        (None, "cannot be read: No such file"),
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
        load_openai_clip(path)
