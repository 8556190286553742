"""Importing a module does nothing else. Who may import whom: pyproject.toml, `lint-imports`."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import REPOSITORY

FOLDERS = {
    "dalle": REPOSITORY / "container" / "dalle",
    "training": REPOSITORY / "training",
    "inference": REPOSITORY / "inference",
    "infra": REPOSITORY / "infra",
}
HEAVY = {"clip", "deepspeed", "sagemaker", "tokenizers", "torch", "torchvision"}
MAX_FILES = 12


def modules() -> dict[str, Path]:
    """Every module of ours by its import name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def test_no_folder_has_more_files_or_folders_than_a_reader_can_hold():
    crowded = {}
    for folder in {path.parent for path in modules().values()}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        folders = list(folder.glob("*/__init__.py"))
        if max(len(files), len(folders)) > MAX_FILES:
            crowded[str(folder.relative_to(REPOSITORY))] = len(files), len(folders)
    assert crowded == {}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that finds the same modules as this one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_infra_imports_no_torch_and_no_sdk():
    ours = ", ".join(name for name in modules() if name.startswith("infra") and "__" not in name)
    code = f"import sys, {ours}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    finished = run_python(code)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == []


@pytest.mark.slow
def test_serve_binds_its_port_before_torch_is_imported():
    code = "import sys, inference.__main__, inference.server.server; print('torch' in sys.modules)"
    finished = run_python(code)
    assert finished.stdout.split() == ["False"], finished.stderr


IMPORT_EVERYTHING = """
import importlib, json, logging, os, signal, sys, threading, warnings
import torch, torchvision  # theirs, whatever they do; what follows is ours

def state():
    return {{
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "log handlers": repr(logging.root.handlers),
        "log level": logging.root.level,
        "warning filters": len([f for f in warnings.filters if f[0] == "error"]),
        "SIGTERM": repr(signal.getsignal(signal.SIGTERM)),
        "threads": threading.active_count(),
        "gradients": torch.is_grad_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "torch threads": torch.get_num_threads(),
        "seed": torch.initial_seed(),
        "CUDA": torch.cuda.is_initialized(),
    }}

before = state()
for module in {modules!r}:
    importlib.import_module(module)
    after = state()
    changed = {{key: (before[key], after[key]) for key in before if before[key] != after[key]}}
    assert not changed, f"importing {{module}} changes (from, to): {{changed}}"
"""


@pytest.mark.slow
def test_importing_any_module_prints_nothing_and_changes_nothing():
    ours = [name for name in modules() if not name.startswith("infra")]
    finished = run_python(IMPORT_EVERYTHING.format(modules=ours))
    assert finished.returncode == 0, finished.stderr
    assert (finished.stdout, finished.stderr) == ("", "")


AT_IMPORT_NEVER = {
    "os.environ": "reads the environment",
    "os.getenv": "reads the environment",
    "logging.basicConfig": "configures logging",
    "print": "prints",
    "open": "touches the disk",
    "torch.set_grad_enabled": "changes torch for the whole process",
    "torch.set_num_threads": "changes torch for the whole process",
    "torch.manual_seed": "changes torch for the whole process",
    "torch.cuda.is_available": "chooses a device",
}


def import_time_nodes(statements: list[ast.stmt]) -> Iterator[ast.AST]:
    """The nodes that run on import: no function bodies, nothing under `if __name__ == …`."""
    for statement in statements:
        if isinstance(statement, ast.If) and "__main__" in ast.unparse(statement.test):
            continue
        waiting: list[ast.AST] = [statement]
        while waiting:
            node = waiting.pop()
            yield node
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                waiting += [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]
                waiting += getattr(node, "decorator_list", [])
            else:
                waiting += ast.iter_child_nodes(node)


def import_side_effects(module: str, source: str) -> list[str]:
    """One line for each thing that `source` does, on import, from the list `AT_IMPORT_NEVER`."""
    return [
        f"{module}:{node.lineno} {AT_IMPORT_NEVER[name]} on import"
        for node in import_time_nodes(ast.parse(source).body)
        if isinstance(node, ast.Name | ast.Attribute)
        and (name := ast.unparse(node)) in AT_IMPORT_NEVER
    ]


@pytest.mark.slow
def test_no_module_reads_the_environment_or_configures_anything_when_imported():
    found = [
        line
        for module, path in modules().items()
        for line in import_side_effects(module, path.read_text("utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nHOME = os.environ['HOME']",
        "class A:\n    root = os.getenv('ROOT')",
        "def f(home=os.environ): ...",
        "try:\n    logging.basicConfig()\nexcept Exception: ...",
        "torch.set_grad_enabled(False)",
    ],
)
def test_a_side_effect_of_importing_is_caught(source):
    assert len(import_side_effects("training.loop.loop", source)) == 1


def test_what_runs_later_is_no_side_effect_of_importing():
    source = "def f():\n    return os.environ\nif __name__ == '__main__':\n    print('x')"
    assert import_side_effects("training.loop.loop", source) == []
