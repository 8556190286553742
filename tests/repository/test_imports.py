"""The arrows between the packages, and that importing anything does nothing else.

training -> dalle <- inference          infra -> the torch-free modules of dalle and inference
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests import REPOSITORY

FOLDERS = {
    "dalle": REPOSITORY / "container" / "dalle",
    "training": REPOSITORY / "training",
    "inference": REPOSITORY / "inference",
    "infra": REPOSITORY / "infra",
}
TORCH_FREE = {
    "dalle.errors",
    "dalle.manifest",
    "dalle.platform.disk",
    "dalle.platform.environment",
    "dalle.platform.metric_lines",
    "dalle.preprocess.images",
    "dalle.types",
    "dalle.versions",
    "inference.api.parsing",
    "inference.api.replies",
    "inference.api.schema",
    "inference.server.body_process",
}
MAY_IMPORT: dict[str, set[str]] = {
    "dalle": set(),
    "training": {"dalle"},
    "inference": {"dalle"},
    "infra": TORCH_FREE,
}
# Each part's floors, from the ground up: a folder or file imports what stands below it, and what is
# in the same folder. A file that is not named belongs to its folder's floor.
FLOORS = {
    "dalle": [
        "errors",
        "types",
        "versions",
        "platform",
        "preprocess",
        "models",
        "manifest",
        "artefact",
        "decoding",
        "decoding.cpu",
        "decoding.gpu",
        "decoding.select",
        "decoding.engine",
        "decoding.validate",
        "peers",
    ],
    "training": [
        "stopping",
        "config",
        "distributed",
        "data.skips",
        "data.pairs",
        "data.sharded",
        "data.sources",
        "data.pipe",
        "data.batching",
        "data.open",
        "data.tools",
        "data.__main__",
        "engine",
        "loop",
        "memory",
        "rainbow",
        "report",
        "scenes",
        "evaluate",
        "job",
        "demo",
        "bench",
        "soak",
        "__main__",
    ],
    "inference": ["api", "settings", "engine", "bench", "server", "__main__"],
    "infra": [
        "aws",
        "docker",
        "setup",
        "cost",
        "local",
        "endpoint",
        "jobs",
        "account",
        "benchmark",
        "compare",
        "__main__",
    ],
}
MOST_ROOMS = 12
HEAVY = {"clip", "deepspeed", "tokenizers", "torch", "torchvision"}
# Who alone may import what changes often, or speaks to an account.
ONLY_IN = {
    "boto3": "infra.aws.client",
    "botocore": "infra.aws.client",
    "sagemaker": "tests.image.sdk_local",
}


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

    `from dalle import contract` is reported as `dalle.platform.environment`, `from
    dalle.platform.environment import Job` as `dalle.platform.environment.Job`: whoever compares
    looks at the beginning of the name."""
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


def place(module: str) -> tuple[str, int] | None:
    """Where a module stands: its entry in `FLOORS` and that entry's height; None for a package's
    own `__init__`."""
    part, _, rest = module.partition(".")
    names = rest.split(".")
    for length in range(len(names), 0, -1):
        entry = ".".join(names[:length])
        if entry in FLOORS[part]:
            return entry, FLOORS[part].index(entry)
    return None


def steps_up(module: str, targets: Iterable[str]) -> list[str]:
    """One line for each module of the same part that stands above the one that imports it."""
    own = place(module)
    wrong = []
    for target in targets:
        other = place(target)
        is_same_part = target.split(".")[0] == module.split(".")[0]
        if own and other and is_same_part and own[0] != other[0] and own[1] < other[1]:
            wrong.append(f"{module} must not import {target}, which stands above it")
    return wrong


def graph() -> dict[str, set[str]]:
    """Which of our modules each of our modules imports."""
    known = modules()
    arrows: dict[str, set[str]] = {}
    for module, path in known.items():
        names = imported(module, path.read_text("utf-8"), path.name == "__init__.py")
        found = {owner for name in names if (owner := _owner(name, known))}
        arrows[module] = found - {module}
    return arrows


def _owner(name: str, known: Collection[str]) -> str:
    """The module that a dotted name is in; empty for one of somebody else's."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def test_every_module_imports_downwards():
    assert [line for module, targets in graph().items() for line in steps_up(module, targets)] == []


def test_every_floor_is_there_and_every_module_has_one():
    known = modules()
    for part, floors in FLOORS.items():
        for entry in floors:
            assert f"{part}.{entry}" in known, (
                f"{part}.{entry} is named in FLOORS, and is not there"
            )
    placeless = [
        module
        for module, path in known.items()
        if path.name != "__init__.py" and place(module) is None
    ]
    assert placeless == []


def test_modules_import_each_other_in_no_circle():
    TopologicalSorter(graph()).prepare()  # raises CycleError, which names them


def test_no_folder_has_more_rooms_than_a_reader_can_hold():
    crowded = {}
    for folder in {path.parent for path in modules().values()}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        folders = list(folder.glob("*/__init__.py"))
        if max(len(files), len(folders)) > MOST_ROOMS:
            crowded[str(folder.relative_to(REPOSITORY))] = len(files), len(folders)
    assert crowded == {}


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("dalle.models.dvae", "dalle.artefact"),
        ("dalle.decoding.step", "dalle.decoding.gpu.step"),
        ("inference.engine.scheduler", "inference.server.app"),
        ("training.data.pairs", "training.data.open"),
    ],
)
def test_a_step_up_is_caught(module, target):
    assert steps_up(module, [target]) == [
        f"{module} must not import {target}, which stands above it"
    ]
    assert steps_up(target, [module]) == []


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("dalle.models.dvae", "from training import loop", "must not import training.loop"),
        ("inference.server.app", "import training.data", "must not import training.data"),
        ("training.loop.loop", "def f():\n    from inference.api.schema import x", "schema.x"),
        ("training.loop.loop", "if TYPE_CHECKING:\n    import inference", "import inference"),
        ("training.loop.loop", "importlib.import_module('infra.aws')", "infra.aws"),
        ("training.data.pairs", "from ...inference import app", "app"),
        ("infra.aws.client", "from dalle.models import dvae", "import dalle.models.dvae"),
        ("infra.aws.client", "from dalle.artefact import load", "dalle.artefact.load"),
        ("infra.aws.client", "import dalle.errors_of_others", "dalle.errors_of_others"),
        ("infra.aws.client", "import torch.nn", "runs without torch"),
        ("infra.endpoint.deploy", "import boto3.session", "boto3.session: infra.aws.client does"),
        ("infra.local.endpoint", "from botocore import eventstream", "infra.aws.client does"),
        ("infra.jobs.train", "def f():\n    from sagemaker.train import x", "sdk_local does"),
        ("training.loop.loop", "import boto3", "infra.aws.client does"),
    ],
)
def test_a_wrong_arrow_is_caught(module, source, says):
    assert any(says in line for line in wrong_arrows(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "training.loop.loop",
            "from dalle.models.dvae import DiscreteVAE\nimport torch\nfrom training import data",
        ),
        ("training.data.pairs", "from . import sharded\nfrom ..rainbow import Caption"),
        (
            "inference.server.app",
            "from dalle import errors\nfrom inference.api.schema import parse",
        ),
        (
            "infra.aws.client",
            "from dalle import errors\nfrom inference.api.schema import parse\nimport boto3",
        ),
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
    assert len(import_side_effects("training.loop.loop", source)) == 1


def test_what_runs_later_is_no_side_effect_of_importing():
    source = "def f():\n    return os.environ\nif __name__ == '__main__':\n    print('x')"
    assert import_side_effects("training.loop.loop", source) == []
