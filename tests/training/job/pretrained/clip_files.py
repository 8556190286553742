"""CLIPs in the files that people hold, and what `serve` makes of pictures with them."""

import base64
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from clip.model import CLIP
from safetensors import safe_open

from dalle.artefact import Artefact
from dalle.models.clip import Clip
from dalle.preprocess.images import encode_image
from inference.api.schema import ClassifyRequest
from inference.engine.model_runner import ModelRunner
from tests.training.job.pretrained.published.open_clip_weights import open_clip_weights

PUBLISHED = Path(__file__).parent / "published"


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


@dataclass(frozen=True)
class OpenClip:
    """A fixture of `make_open_clip`: what open_clip makes of pictures and captions."""

    config: dict[str, Any]
    captions: list[str]
    weights: dict[str, torch.Tensor]
    pictures: list[bytes]
    """PNG files."""
    images: torch.Tensor
    """[pictures, 3, S, S], as open_clip's encoder takes them."""
    probabilities: torch.Tensor
    """[pictures, captions]"""

    def put(self, folder: Path, name: str = "open_clip_pytorch_model.bin") -> list[Path]:
        """Write weights and config as they are published."""
        paths = [folder / name, folder / "open_clip_config.json"]
        if name.endswith(".safetensors"):
            safetensors.torch.save_file(self.weights, paths[0])
        else:
            torch.save(self.weights, paths[0])
        paths[1].write_text(json.dumps(self.config))
        return paths


@cache
def open_clip(name: str) -> OpenClip:
    with safe_open(PUBLISHED / f"open_clip_{name}.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
    numbers = range(sum(each.startswith("picture.") for each in tensors))
    return OpenClip(
        about["config"],
        about["captions"],
        open_clip_weights(about["shapes"]),
        [encode_image(tensors[f"picture.{number}"].numpy(), "png") for number in numbers],
        tensors["images"],
        tensors["probabilities"],
    )


def probabilities(model: Clip, captions: list[str], pictures: list[bytes]) -> torch.Tensor:
    """Return those of captions for picture files, [pictures, captions], as `serve` gives them."""
    runner = ModelRunner(Artefact(clip=model), torch.device("cpu"))
    images = [base64.b64encode(each).decode() for each in pictures]
    request = ClassifyRequest(images=images, classes=captions, top=len(captions))
    found = torch.zeros(len(pictures), len(captions))
    result = runner.run(runner.prepare(request))
    for row, (indices, _, values) in zip(found, result.predictions, strict=True):
        row[indices] = torch.tensor(values)
    return found
