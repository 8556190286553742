"""Old models as files and as artefacts, by the importer."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from dalle.artefact import Artefact
from tests.training.job.legacy.published.files import Old, old
from training.job.legacy.config.choices import Choices
from training.job.legacy.importer import Beside, import_model

WORDS = [f"w{number}" for number in range(30)]


def write_tokenizer(path: Path, words: list[str] = WORDS) -> Path:
    """Write a file of Hugging Face's tokenizers with a word for each id."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def choices_of(model: Old) -> Choices:
    """What the owner of a file has to say: nothing from 1.1.6 on."""
    if model.version == "0.1.19":
        return Choices(tuple(model.settings["attn_types"]), "0.1.19", 2, hides_padding=model.mask)
    if model.version == "0.2.8":
        return Choices(version="0.2.8")
    return Choices(hides_padding=None if model.mask else False)


def greedy_pictures(model: Old, artefact: Artefact) -> list[tuple[str, np.ndarray]]:
    """Return the fixture's captions, and pictures [32, 32, 3] of its greedy tokens, up to 255."""
    dvae = artefact.require("dvae")
    pictures = (dvae.decode(model.greedy[..., None]) * 255).permute(0, 2, 3, 1).numpy()
    captions = [" ".join(WORDS[number] for number in ids if number) for ids in model.text.tolist()]
    return list(zip(captions, pictures, strict=True))


def pixels_of(reply: Any) -> np.ndarray:
    """Return the only image of a JSON reply of `serve`, [32, 32, 3] in 0 to 255."""
    (image,) = reply["images"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["image"]))), dtype=np.float32)


def import_old(name: str, folder: Path) -> Artefact:
    """Write a fixture as the file of its version, and import it."""
    model = old(name)
    path = folder / f"{name}.pt"
    torch.save(model.file(), path)
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    return import_model(path, choices_of(model), Beside(str(tokenizer)))
