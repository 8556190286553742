"""The arrows between the packages, and that importing anything does nothing else.

training -> dalle <- inference          infra -> the torch-free modules of dalle and inference
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = {
    "dalle": REPOSITORY / "container" / "dalle",
    "training": REPOSITORY / "training",
    "inference": REPOSITORY / "inference",
    "infra": REPOSITORY / "infra",
}
TORCH_FREE = {
    "dalle.contract",
    "dalle.errors",
    "dalle.images",
    "dalle.manifest",
    "dalle.metric_lines",
    "dalle.names",
    "dalle.versions",
    "inference.parsing",
    "inference.replies",
    "inference.schema",
    "inference.shrinking",
}
MAY_IMPORT: dict[str, set[str]] = {
    "dalle": set(),
    "training": {"dalle"},
    "inference": {"dalle"},
    "infra": TORCH_FREE,
}
HEAVY = {"clip", "deepspeed", "tokenizers", "torch", "torchvision"}
# Who alone may import what changes often, or speaks to an account.
ONLY_IN = {"boto3": "infra.aws", "botocore": "infra.aws", "sagemaker": "infra.local.sdk"}


def modules() -> dict[str, Path]:
    """Every module of ours by its import name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(module: str, source: str, is_package: bool = False) -> Iterator[str]:
    """The full name of everything `source` imports: inside functions, conditions and strings too.

    `from dalle import contract` is reported as `dalle.contract`, `from dalle.contract import Job`
    as `dalle.contract.Job`: whoever compares looks at the beginning of the name.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                parents = module.split(".")[: None if is_package else -1]
                above = parents[: max(0, len(parents) - level + 1)] if level else []
                where = [*above, *([base] if base else [])]
                yield from (".".join([*where, name.name]) for name in names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def wrong_arrows(module: str, source: str, is_package: bool = False) -> list[str]:
    """One line for each import that `MAY_IMPORT` does not allow."""
    own = module.split(".")[0]
    allowed = MAY_IMPORT[own] | {own}
    wrong = []
    for name in imported(module, source, is_package):
        ours = name.split(".")[0] in FOLDERS
        if ours and not any(name == right or name.startswith(right + ".") for right in allowed):
            wrong.append(f"{module} must not import {name}")
        if ONLY_IN.get(name.split(".")[0], module) != module:
            wrong.append(f"{module} must not import {name}: {ONLY_IN[name.split('.')[0]]} does")
        if own == "infra" and name.split(".")[0] in HEAVY:
            wrong.append(f"{module} must not import {name}: infra runs without torch")
    return wrong


def test_every_import_follows_the_arrows():
    wrong = [
        line
        for module, path in modules().items()
        for line in wrong_arrows(module, path.read_text("utf-8"), path.name == "__init__.py")
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("dalle.dvae", "from training import loop", "dalle.dvae must not import training.loop"),
        ("inference.app", "import training.data", "inference.app must not import training.data"),
        ("training.loop", "def f():\n    from inference.schema import x", "inference.schema.x"),
        ("training.loop", "if TYPE_CHECKING:\n    import inference", "import inference"),
        ("training.loop", "importlib.import_module('infra.aws')", "infra.aws"),
        ("training.data.folder", "from ...inference import app", "app"),
        ("infra.aws", "from dalle import dvae", "infra.aws must not import dalle.dvae"),
        ("infra.aws", "from dalle.artefact import load", "dalle.artefact.load"),
        ("infra.aws", "import dalle.contractor", "dalle.contractor"),
        ("infra.aws", "import torch.nn", "runs without torch"),
        ("infra.deploy", "import boto3.session", "boto3.session: infra.aws does"),
        ("infra.local.endpoint", "from botocore import eventstream", "infra.aws does"),
        ("infra.train", "def f():\n    from sagemaker.train import x", "infra.local.sdk does"),
        ("training.loop", "import boto3", "infra.aws does"),
    ],
)
def test_a_wrong_arrow_is_caught(module, source, says):
    assert any(says in line for line in wrong_arrows(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "training.loop",
            "from dalle.dvae import DiscreteVAE\nimport torch\nfrom training import data",
        ),
        ("training.data.folder", "from . import pairs\nfrom ..rainbow import Caption"),
        ("inference.app", "from dalle import errors\nfrom inference.schema import parse"),
        (
            "infra.aws",
            "from dalle import contract\nfrom inference.schema import parse\nimport boto3",
        ),
        ("infra.local.sdk", "from sagemaker.train.model_trainer import ModelTrainer"),
    ],
)
def test_a_right_arrow_is_left_alone(module, source):
    assert wrong_arrows(module, source) == []


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


def test_the_torch_free_modules_import_nothing_heavy():
    present = sorted(TORCH_FREE & modules().keys())
    assert present, f"none of {sorted(TORCH_FREE)} exists"
    for module in present:
        code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
        finished = run_python(code)
        assert finished.returncode == 0, finished.stderr
        assert HEAVY & set(json.loads(finished.stdout)) == set(), module


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
    assert len(import_side_effects("training.loop", source)) == 1


def test_what_runs_later_is_no_side_effect_of_importing():
    source = "def f():\n    return os.environ\nif __name__ == '__main__':\n    print('x')"
    assert import_side_effects("training.loop", source) == []
