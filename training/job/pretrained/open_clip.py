"""`open_clip_config.json`, which open_clip publishes beside weights: what they do not tell.

Activation, heads and preprocessing are in it alone. A setting that is not built here is refused by
its name, so that no model ranks otherwise than its original.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle.errors import ForeignFileError
from dalle.platform.json_file import read_json

FILE_NAME = "open_clip_config.json"
_MAX_BYTES = 1 << 20

_SIZES = {
    "": {"embed_dim": "embed_size"},
    "vision_cfg": {
        "image_size": "image_size",
        "layers": "vision_layers",
        "width": "vision_width",
        "patch_size": "patch_size",
    },
    "text_cfg": {
        "context_length": "text_length",
        "vocab_size": "text_vocab_size",
        "width": "text_width",
        "layers": "text_layers",
    },
}
"""Section -> its key -> field of `ClipConfig`; the weights have them too."""
_SIDES = ("image_size", "patch_size")
"""May be a height and a width."""
_HEAD_WIDTH = 64
_READ = {
    "": {"quick_gelu", "vision_cfg", "text_cfg"},
    "vision_cfg": {"head_width", "mlp_ratio"},
    "text_cfg": {"heads", "mlp_ratio"},
    "preprocess_cfg": {"mean", "std"},
}
_IGNORED = {
    "": {"init_logit_scale", "cast_dtype", "output_dict", "nonscalar_logit_scale"},
    "vision_cfg": {"patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "output_tokens"},
    "text_cfg": {"output_tokens", "pad_id", "eos_id"},
    "preprocess_cfg": {"size", "fill_color"},
}
"""Of training, or of parts that the model has not."""
_IGNORED_UNLESS_NAMED = ("timm_", "hf_")
"""Settings of towers of other packages; those are named by `timm_model_name`, `hf_model_name`."""
_NAMES = ("timm_model_name", "hf_model_name", "hf_tokenizer_name")
_ALLOWED: dict[str, dict[str, tuple[object, ...]]] = {
    "": {},
    "vision_cfg": {
        "pool_type": ("tok",),
        "pos_embed_type": ("learnable",),
        "block_type": ("default",),
    },
    "text_cfg": {"pool_type": ("argmax",), "proj_type": ("linear",), "block_type": ("default",)},
    "preprocess_cfg": {
        "mode": ("RGB",),
        "interpolation": ("bicubic",),
        "resize_mode": ("shortest", "squash"),
    },
}


@dataclass(frozen=True)
class OpenClipConfig:
    """What the file tells. fields: of `ClipConfig`; sizes: those that the weights must have."""

    fields: Mapping[str, Any]
    sizes: Mapping[str, Any]
    head_width: int
    """Channels of an attention head of the image tower."""

    def fields_of(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Return fields of `ClipConfig` for weights with these sizes, by field.

        Raises ValueError where the sizes of the file are others.
        """
        for name, size in self.sizes.items():
            if found[name] != size:
                raise ValueError(
                    f"{FILE_NAME} says that {name} is {size!r}, and the weights have "
                    f"{found[name]!r}: it is of another model"
                )
        if found["patch_size"] is None:
            if self.head_width != _HEAD_WIDTH:
                raise ValueError(
                    f"{FILE_NAME} has vision_cfg.head_width={self.head_width}, which is not built "
                    f"here for a ResNet; it must be {_HEAD_WIDTH}"
                )
            return dict(self.fields)
        width = found["vision_width"]
        if width % self.head_width:
            raise ValueError(
                f"{FILE_NAME} has vision_cfg.width={width}, which is no multiple of "
                f"head_width={self.head_width}"
            )
        return {**self.fields, "vision_heads": width // self.head_width}


def read_open_clip_config(path: Path) -> OpenClipConfig:
    """Read the file. Raises ForeignFileError naming a setting that is wrong or not built here."""
    try:
        content = _section({"": read_json(path, _MAX_BYTES)}, "")
        if "vision_cfg" in content:  # as the package has it, without a section around
            content = {"model_cfg": content}
        model, preprocess = _section(content, "model_cfg"), content.get("preprocess_cfg") or {}
        sections = {
            "": model,
            "vision_cfg": _section(model, "vision_cfg"),
            "text_cfg": _section(model, "text_cfg"),
            "preprocess_cfg": _section({"preprocess_cfg": preprocess}, "preprocess_cfg"),
        }
        sizes: dict[str, Any] = {}
        for name, section in sections.items():
            _refuse_others(name, section)
            for key, field in _SIZES.get(name, {}).items():
                if key in section:
                    sizes[field] = _size(section[key], key, f"{name}.{key}" if name else key)
        head_width = sections["vision_cfg"].get("head_width", _HEAD_WIDTH)
        return OpenClipConfig(_fields(sections), sizes, _whole(head_width, "vision_cfg.head_width"))
    except OSError as error:
        raise ForeignFileError(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ForeignFileError(f"{path.name} {error}") from error


def _section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name)
    if not isinstance(section, dict):
        raise ValueError(f"must have a mapping {name or 'of settings'}, got {section!r:.80}")
    return section


def _refuse_others(name: str, section: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that changes the model and is not built here."""
    known = {*_SIZES.get(name, {}), *_READ[name], *_IGNORED[name]}
    for key, value in section.items():
        is_foreign = key.startswith(_IGNORED_UNLESS_NAMED) and key not in _NAMES
        if key in known or is_foreign or not value:
            continue
        allowed = _ALLOWED[name].get(key, ())
        if value not in allowed:
            wanted = f"; it must be {' or '.join(map(repr, allowed))}" if allowed else ""
            place = f"{name}.{key}" if name else key
            raise ValueError(f"has {place}={value!r:.80}, which is not built here{wanted}")


def _fields(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    preprocess = sections["preprocess_cfg"]
    is_quick = sections[""].get("quick_gelu", False)
    if not isinstance(is_quick, bool):
        raise ValueError(f"must have true or false as quick_gelu, got {is_quick!r:.80}")
    fields: dict[str, Any] = {
        "activation": "quick_gelu" if is_quick else "gelu",
        "text_heads": _whole(sections["text_cfg"].get("heads", 8), "text_cfg.heads"),
        "squashes": preprocess.get("resize_mode") == "squash",
    }
    for key in ("mean", "std"):
        if preprocess.get(key) is not None:
            fields[f"image_{key}"] = _colour(preprocess[key], f"preprocess_cfg.{key}")
    return fields


def _size(value: object, key: str, name: str) -> object:
    """Return a size as `ClipConfig` has it: the side of a square, the layers of a ResNet."""
    if value is None and key == "patch_size":  # of a ResNet
        return None
    if not isinstance(value, list):
        return _whole(value, name)
    numbers = tuple(_whole(each, name) for each in value)
    is_square = key in _SIDES and len(numbers) == 2 and numbers[0] == numbers[1]
    return numbers[0] if is_square else numbers


def _whole(value: object, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"must have a whole number from 1 as {name}, got {value!r:.80}")
    return value


def _colour(value: object, name: str) -> tuple[float, ...]:
    values: list[Any] = value if isinstance(value, list) else [value] * 3
    if len(values) != 3 or not all(
        isinstance(each, int | float) and not isinstance(each, bool) and math.isfinite(each)
        for each in values
    ):
        raise ValueError(f"must have three numbers as {name}, got {value!r:.80}")
    return tuple(float(each) for each in values)
