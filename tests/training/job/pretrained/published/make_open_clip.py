"""Makes open_clip_*.safetensors beside this file by open_clip itself.

In an environment of its own, for a moment (the fixtures here are of open-clip-torch 3.3.0 and torch
2.10 on a CPU):

    uv venv reference && . reference/bin/activate
    uv pip install torch==2.10.0 torchvision open-clip-torch==3.3.0 safetensors numpy pillow
    python tests/training/job/pretrained/published/make_open_clip.py

The weights are those of `open_clip_weights`; the files hold their names and shapes, the content of
open_clip_config.json, captions, pictures of several sizes, what preprocessing makes of them, and
the probabilities of the captions for each picture.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[4]))

weights_module = importlib.import_module(
    "tests.training.job.pretrained.published.open_clip_weights"
)
models, tokenizers, transforms = (
    importlib.import_module(f"open_clip.{name}") for name in ("model", "tokenizer", "transform")
)

CAPTIONS = ["a photo of a cat", "x", "Café — 3 dogs’ &amp; 12 birds!  ", "日本語 😀", "word " * 200]
SIZES = ((60, 40), (50, 91), (32, 32), (120, 131))
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "open_clip_gelu": {
        "model_cfg": {
            "embed_dim": 24,
            "vision_cfg": {
                "image_size": 32,
                "layers": 2,
                "width": 64,
                "head_width": 32,
                "mlp_ratio": 4.3637,
                "patch_size": 8,
            },
            "text_cfg": TEXT | {"mlp_ratio": 2.0},
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    },
    "open_clip_quick_gelu": {
        "model_cfg": {
            "embed_dim": 24,
            "quick_gelu": True,
            "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "patch_size": 16},
            "text_cfg": TEXT,
        },
        "preprocess_cfg": {"interpolation": "bicubic", "resize_mode": "squash"},
    },
}


def picture(width: int, height: int) -> Image.Image:
    """Return a random picture of smooth colours with some noise."""
    random = np.random.default_rng(width)
    coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    noise = random.normal(0, 12, smooth.shape)
    return Image.fromarray(np.uint8((smooth + noise).clip(0, 255)))


@torch.no_grad()
def make(name: str, config: dict[str, Any]) -> None:
    settings, preprocess = config["model_cfg"], config["preprocess_cfg"]
    model = models.CLIP(**settings)
    shapes = {name: [*value.shape] for name, value in model.state_dict().items()}
    model.load_state_dict(weights_module.open_clip_weights(shapes))
    model.eval()
    pictures = [picture(*size) for size in SIZES]
    size = settings["vision_cfg"]["image_size"]
    wanted = transforms.PreprocessCfg(size=size, **preprocess)
    transform = transforms.image_transform_v2(wanted, is_train=False)
    images = torch.stack([transform(each) for each in pictures])
    tokens = tokenizers.SimpleTokenizer()(CAPTIONS)
    logits, _ = model.get_logits(images, tokens)
    probabilities = logits.softmax(dim=-1)
    print(name, probabilities)
    assert probabilities.max() < 0.99
    tensors = {"images": images, "tokens": tokens.to(torch.int32), "probabilities": probabilities}
    for number, each in enumerate(pictures):
        tensors[f"picture.{number}"] = torch.from_numpy(np.array(each))
    about = {"config": config, "captions": CAPTIONS, "shapes": shapes}
    save_file(tensors, HERE / f"{name}.safetensors", {"about": json.dumps(about)})


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each, content in CONFIGS.items():
        make(each, content)
