"""Import of single modules of clip-anytorch without the package's `__init__`.

The `__init__` imports torchvision, which imports torch's compiler, and reads a vocabulary. That
would be more than half of the import time of `train` and `serve`.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any


@cache
def clip_module(name: str) -> ModuleType:
    """Return the package's module of that name. Raises ModuleNotFoundError."""
    package = importlib.util.find_spec("clip")  # does not run the package
    locations = [] if package is None else package.submodule_search_locations or []
    for location in locations:
        path = Path(location) / f"{name}.py"
        if path.is_file():
            spec = importlib.util.spec_from_file_location(f"clip_anytorch_{name}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise ModuleNotFoundError(f"clip-anytorch has no module {name}, or is not installed")


@cache
def openai_tokenizer() -> Any:
    """Return the package's byte-pair encoding, which takes a second to build."""
    return clip_module("simple_tokenizer").SimpleTokenizer()
