"""Single modules of clip-anytorch, without what importing the whole package brings along.

Its `__init__` imports torchvision, and that torch's compiler; and it reads a vocabulary that may
not be wanted. That is more than half of what `train` and `serve` would take to import.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType


@cache
def clip_module(name: str) -> ModuleType:
    """The package's module of that name, run by itself. Raises ModuleNotFoundError."""
    package = importlib.util.find_spec("clip")  # finds it and does not run it
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
