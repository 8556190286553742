"""Which of our code decides what a step of the demo leaves, as one digest for each step.

A model that older code trained is not this code's, and the demo's figures are to be: so the code
is part of a step's key. Comments, docstrings and layout are not; a module that is new belongs to
the training until it is named here.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

NOT_TRAINING = frozenset({"bench", "demo", "evaluate", "rainbow.py", "report", "scenes.py", "soak"})
"""What no weight depends on, of `training`: its files and folders. The data's key has rainbow.py,
and a step's key the recipe."""


def training_code() -> list[Path]:
    """What decides the weights."""
    own = _folder("training")
    modules = [
        path for path in _modules("training") if path.relative_to(own).parts[0] not in NOT_TRAINING
    ]
    return [*modules, *_modules("dalle")]


def serving_code() -> list[Path]:
    """What decides the pictures that a served artefact draws."""
    return [*_modules("inference"), *_modules("dalle")]


def showing_code() -> list[Path]:
    """What decides the caption accuracy of an artefact, and the report."""
    templates = sorted((_folder("training.report") / "templates").iterdir())
    return [*_modules("training"), *templates, *_modules("dalle")]


def digest_of_code(paths: Iterable[Path]) -> str:
    """sha256 of what the files mean: of Python its statements, of anything else its bytes."""
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        if path.suffix == ".py":
            tree = _WithoutDocstrings().visit(ast.parse(content))
            content = ast.dump(tree).encode()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node


def _modules(package: str) -> list[Path]:
    return sorted(_folder(package).rglob("*.py"))


def _folder(package: str) -> Path:
    with resources.as_file(resources.files(package)) as folder:
        return folder
