"""An artefact: the servable directory that `train` writes and `serve` reads.

    dvae/ transformer/ clip/     config.json + weights.safetensors each; `kind` in dvae/config.json
                                 names the graph of a published image tokenizer, in
                                 transformer/config.json that of a published transformer
    tokenizer/tokenizer.json
    manifest.json                format, training history, and the sha256 of every component's file
    MODEL_CARD.md                what people should know of the model

No pickle, no symlink. The manifest is written last and lists every file: a directory without it, or
with a file that does not match, is not an artefact.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle.errors import ArtefactError, DivergenceError
from dalle.manifest import (
    FORMAT_VERSION,
    FORMER,
    MANIFEST,
    STAGING,
    Manifest,
    is_hidden,
    read_manifest,
)
from dalle.model_card import MODEL_CARD, ModelCard, describe, render
from dalle.models.clip import Clip, ClipConfig
from dalle.models.image_tokenizer import ImageTokenizer
from dalle.models.legacy.build import (
    build_transformer,
    parse_transformer_config,
    transformer_content,
)
from dalle.models.tokenizers.build import build_tokenizer
from dalle.models.tokenizers.configs import config_content, parse_config
from dalle.models.transformer import Dalle
from dalle.models.uninitialised import without_memory, without_random_values
from dalle.platform.disk import disk_error, sync
from dalle.platform.json_file import read_json
from dalle.preprocess.tokenizer import CaptionTokenizer
from dalle.types import COMPONENTS, ComponentName, StageName
from dalle.versions import OURS, installed

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"

# How a component's model is built, and its config read from JSON.
_MODELS: dict[StageName, tuple[Callable[[Any], nn.Module], Callable[[Any], Any]]] = {
    "dvae": (build_tokenizer, parse_config),
    "transformer": (build_transformer, parse_transformer_config),
    "clip": (Clip, TypeAdapter(ClipConfig).validate_python),
}

# Types of our weights, by their names in safetensors.
_DTYPES = {"F32": torch.float32, "I64": torch.int64, "BOOL": torch.bool}


@dataclass
class Artefact:
    """Components of one artefact; None for a component that it does not have."""

    dvae: ImageTokenizer | None = None
    transformer: Dalle | None = None
    clip: Clip | None = None
    tokenizer: CaptionTokenizer | None = None
    manifest: Manifest = field(default_factory=Manifest)

    def components(self) -> list[ComponentName]:
        """Return the names of the components that it has."""
        return [name for name in COMPONENTS if getattr(self, name) is not None]

    def card(self) -> ModelCard:
        """Return the model card."""
        models = {name: getattr(self, name) for name in _MODELS if getattr(self, name) is not None}
        return describe(self.manifest, models)

    @overload
    def require(self, name: Literal["dvae"], purpose: str = ...) -> ImageTokenizer: ...
    @overload
    def require(self, name: Literal["transformer"], purpose: str = ...) -> Dalle: ...
    @overload
    def require(self, name: Literal["clip"], purpose: str = ...) -> Clip: ...
    @overload
    def require(self, name: Literal["tokenizer"], purpose: str = ...) -> CaptionTokenizer: ...
    def require(self, name: ComponentName, purpose: str = "") -> nn.Module | CaptionTokenizer:
        """Return a component. Raises ArtefactError naming one that is missing and what for."""
        component: nn.Module | CaptionTokenizer | None = getattr(self, name)
        if component is None:
            stage = "transformer" if name == "tokenizer" else name
            has = ", ".join(self.components()) or "nothing"
            needed = f", which {purpose} needs" if purpose else ""
            raise ArtefactError(
                f"the artefact has no {name}{needed}; it has {has}: train the stage {stage} with "
                "this artefact in the channel `artefact`"
            )
        return component


def save(directory: Path, artefact: Artefact, *, git_revision: str = "") -> Manifest:
    """Write an artefact into `directory`, which may hold an older one; return its manifest.

    The new artefact is written whole beside the old one, which is then renamed away; only renames
    follow. A save that fails puts the old artefact back; one whose process is killed leaves what
    `restore` puts back. Raises DivergenceError for a weight that is NaN or infinite, DiskFullError,
    or PlatformError for other disk errors.
    """
    for stage in _MODELS:
        model = getattr(artefact, stage)
        if model is not None and (weight := not_finite(model.state_dict())):
            raise DivergenceError(f"the weight {weight} of {stage} is NaN or infinite; not saved")
    restore(directory)
    staging = directory / STAGING
    try:
        try:
            manifest = _stage(staging, artefact, git_revision)
            _put_in_place(staging, directory, artefact.components())
        except BaseException:
            restore(directory)
            raise
    except OSError as error:
        raise disk_error(
            error,
            f"write the artefact {directory}",
            if_full="give the job a larger volume",
            directory=directory,
            num_bytes=_num_bytes(artefact),
        ) from error
    return manifest


def save_manifest(directory: Path, artefact: Artefact) -> None:
    """Replace manifest and model card of a saved artefact, whose components stay as they are.

    Raises ArtefactError where there is none, DiskFullError, PlatformError.
    """
    saved = read_manifest(directory)
    kept = {"format_version", "library_version", "git_revision", "files"}
    manifest = artefact.manifest.model_copy(update=saved.model_dump(include=kept))
    texts = {
        MODEL_CARD: render(replace(artefact, manifest=manifest).card()),
        MANIFEST: manifest.model_dump_json(indent=1),
    }
    try:
        for name, text in texts.items():
            path = directory / f".{name}"
            path.write_text(text, encoding="utf-8")
            sync(path)
            os.replace(path, directory / name)
        sync(directory)
    except OSError as error:
        raise disk_error(
            error, f"write {directory / MANIFEST}", if_full="give the job a larger volume"
        ) from error


def _stage(staging: Path, artefact: Artefact, git_revision: str) -> Manifest:
    """Write a whole artefact into a new directory and flush it to the disk."""
    staging.mkdir(parents=True)
    components = artefact.components()
    for name in components:
        (staging / name).mkdir()
        if name == "tokenizer":
            artefact.require(name).save(staging / name)
        else:
            _save_model(staging / name, getattr(artefact, name))
    manifest = artefact.manifest.model_copy(
        update={
            "format_version": FORMAT_VERSION,
            "library_version": installed(OURS) or "",
            "git_revision": git_revision,
            "files": {path: sha256(staging / path) for path in _files(staging)},
        }
    )
    (staging / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    card = replace(artefact, manifest=manifest).card()
    (staging / MODEL_CARD).write_text(render(card), encoding="utf-8")
    for path in staging.rglob("*"):
        sync(path)
    return manifest


def _put_in_place(staging: Path, directory: Path, components: list[ComponentName]) -> None:
    """Replace the old artefact by the staged one, the manifest last."""
    former = directory / FORMER
    former.mkdir()
    for name in (MANIFEST, MODEL_CARD, *COMPONENTS):
        if (directory / name).exists():
            os.replace(directory / name, former / name)
    for name in (MODEL_CARD, *components):
        os.replace(staging / name, directory / name)
    sync(directory)  # the components must be on the disk before the manifest that lists them
    os.replace(staging / MANIFEST, directory / MANIFEST)
    sync(directory)
    shutil.rmtree(former, ignore_errors=True)
    staging.rmdir()


def restore(directory: Path) -> None:
    """Undo a save of an artefact that was interrupted; the artefact before it is back then.

    Without one, the components of the interrupted save stay and `load` refuses them. Raises
    PlatformError.
    """
    former = directory / FORMER
    try:
        if not (directory / MANIFEST).exists() and (had := _components_in(former)):
            if (directory / STAGING / MODEL_CARD).exists():  # the one in place is the old one
                had.add(MODEL_CARD)
            for name in (MODEL_CARD, *COMPONENTS):
                is_new = name not in had or (former / name).exists()
                if is_new and (directory / name).is_dir():
                    shutil.rmtree(directory / name)
                elif is_new:
                    (directory / name).unlink(missing_ok=True)
                if (former / name).exists():
                    os.replace(former / name, directory / name)
            os.replace(former / MANIFEST, directory / MANIFEST)
            sync(directory)
    except OSError as error:
        raise disk_error(
            error, f"put back the artefact in {former}", if_full="give the job a larger volume"
        ) from error
    shutil.rmtree(former, ignore_errors=True)
    shutil.rmtree(directory / STAGING, ignore_errors=True)


def _components_in(directory: Path) -> set[str]:
    """Return the names of the components that a manifest lists; none without a sound manifest."""
    try:
        return read_manifest(directory).components()
    except ArtefactError:
        return set()


def load(directory: Path, device: torch.device | str = "cpu") -> Artefact:
    """Read an artefact and check all hashes; models are in evaluation mode, without gradients.

    Raises ArtefactError naming the file that is missing, damaged, unexpected or of another format.
    """
    manifest = read_manifest(directory)
    _check_files(directory, manifest)
    artefact = Artefact(manifest=manifest)
    if (directory / "tokenizer").is_dir():
        artefact.tokenizer = CaptionTokenizer.load(directory / "tokenizer")
    for name in _MODELS:
        if (directory / name).is_dir():
            setattr(artefact, name, _load_model(directory / name, name, device))
    return artefact


def _save_model(directory: Path, model: nn.Module) -> None:
    if isinstance(model, ImageTokenizer):
        content = config_content(model.config)
    elif isinstance(model, Dalle):
        content = transformer_content(model.config)
    else:
        content = asdict(model.config)  # type: ignore[call-overload]
    (directory / CONFIG).write_text(json.dumps(content, indent=1), encoding="utf-8")
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    try:
        save_file(weights, directory / WEIGHTS)
        (directory / WEIGHTS).chmod(0o644)  # save_file makes it 0600; `serve` may be another user
    except SafetensorError as error:  # has the number of an OSError in its text only
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _load_model(directory: Path, name: StageName, device: torch.device | str) -> nn.Module:
    build, parse = _MODELS[name]
    try:
        config = parse(read_json(directory / CONFIG))
        _check_shapes(directory / WEIGHTS, build, config)
        with without_random_values():
            model = build(config)
        model.load_state_dict(load_file(directory / WEIGHTS), assign=True)
    except (
        ValueError,
        RuntimeError,
        ArithmeticError,  # a width or number of heads of 0
        AssertionError,
        SafetensorError,
        OSError,
    ) as error:
        raise ArtefactError(f"{directory} cannot be loaded as {name}: {error}") from error
    if weight := not_finite(model.state_dict()):
        raise ArtefactError(f"{directory / WEIGHTS}: the weight {weight} is NaN or infinite")
    return model.eval().requires_grad_(False).to(device)


def _check_shapes(path: Path, build: Callable[[Any], nn.Module], config: Any) -> None:
    """Raise ValueError where the header of a weights file differs from the model of a config.

    The model is built without memory for its weights.
    """
    with without_memory():
        expected = build(config).state_dict()
    with safe_open(path, "pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    for name in sorted(expected.keys() ^ found.keys()):
        what = "misses" if name in expected else "has an unexpected"
        raise ValueError(f"{path.name} {what} weight: {name}")
    for name, weight in expected.items():
        shape, dtype = found[name].get_shape(), _DTYPES.get(found[name].get_dtype())
        if (shape, dtype) != ([*weight.shape], weight.dtype):
            raise ValueError(
                f"{path.name} has {name} as {shape} of {dtype}, {CONFIG} needs "
                f"{[*weight.shape]} of {weight.dtype}"
            )


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor with a NaN or infinite value, if there is one."""
    for name, value in tensors.items():
        if not (value.is_floating_point() and value.numel()):
            continue
        # The greatest magnitude is NaN where any value is: one pass, and no copy.
        if not torch.linalg.vector_norm(value, ord=math.inf).isfinite():
            return name
    return None


def _num_bytes(artefact: Artefact) -> int:
    """Return the size of the weights; the other files are a few thousand bytes."""
    models = filter(None, (getattr(artefact, name) for name in _MODELS))
    return sum(value.nbytes for model in models for value in model.state_dict().values())


def _files(directory: Path) -> list[str]:
    """Return the relative paths of all files below a directory, sorted."""
    paths = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(directory).as_posix() for path in paths)


def _check_files(directory: Path, manifest: Manifest) -> None:
    """Raise ArtefactError unless the components' files are those of the manifest."""
    for name in manifest.files:
        path = directory / name
        try:
            if path.is_symlink() or not path.is_file():
                raise ArtefactError(f"{path} is missing, but {MANIFEST} lists it")
            digest = sha256(path)
        except OSError as error:
            raise ArtefactError(f"{path} cannot be read: {error.strerror}") from error
        if digest != manifest.files[name]:
            raise ArtefactError(f"{path} does not match its sha256 in {MANIFEST}: it was changed")
    for component in COMPONENTS:
        if (directory / component).is_symlink():
            raise ArtefactError(f"{directory / component} is a symlink, which an artefact has not")
        for name in _files(directory / component):
            if f"{component}/{name}" not in manifest.files and not is_hidden(name):
                raise ArtefactError(f"{directory / component / name} is not in {MANIFEST}")


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
