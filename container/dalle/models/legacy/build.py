"""A transformer from its config, whichever graph it names, and the config's form in a file."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from dalle.models.legacy.config import (
    KIND,
    LegacyTransformerConfig,
    is_legacy,
    legacy_content,
)
from dalle.models.legacy.transformer import LegacyTransformer
from dalle.models.transformer import Dalle, TransformerConfig

AnyTransformerConfig = TransformerConfig | LegacyTransformerConfig


def build_transformer(config: AnyTransformerConfig) -> Dalle:
    """Return a transformer with new weights. Raises ValueError for sizes that do not fit."""
    if isinstance(config, LegacyTransformerConfig):
        return LegacyTransformer(config)
    return Dalle(config)


def parse_transformer_config(content: Any) -> AnyTransformerConfig:
    """Return the config of `transformer/config.json`. Raises ValueError naming a wrong field."""
    if is_legacy(content):
        fields = {name: value for name, value in content.items() if name != "kind"}
        return TypeAdapter(LegacyTransformerConfig).validate_python(fields)
    if isinstance(content, dict) and "kind" in content:
        raise ValueError(f"kind must be {KIND} or absent, got {str(content['kind'])[:60]!r}")
    return TypeAdapter(TransformerConfig).validate_python(content)


def transformer_content(config: AnyTransformerConfig) -> dict[str, Any]:
    """Return the content of `transformer/config.json`."""
    fields = asdict(config)
    return legacy_content(fields) if isinstance(config, LegacyTransformerConfig) else fields
