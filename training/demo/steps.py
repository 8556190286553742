"""Steps that are done once: a later run reuses what an earlier one left.

    run_steps(steps, out / "state.json", say)

A step is reused when its key and its input files are those it was done with and its outputs exist.
Keys hold a digest of the code that decides the outcome, without comments, docstrings and layout.
Knows nothing of what the steps do.
"""

from __future__ import annotations

import ast
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import CodeType

from dalle.platform.disk import write_atomically

NOT_TRAINING = frozenset({"bench", "demo", "evaluate", "rainbow.py", "report", "scenes.py", "soak"})
"""Files and folders of `training` on which no weight depends. rainbow.py is an input of the data,
and the recipe is in the key of the training."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a run.

    title: printed when it begins. seconds: about how long it takes.
    key, inputs: JSON values, and files of earlier steps, on which the outcome depends.
    outputs: the files that it leaves. action: does it; its argument says whether an earlier run
    with the same key began and did not finish.
    """

    name: str
    title: str
    seconds: float
    key: object
    inputs: Sequence[Path] = ()
    outputs: Sequence[Path]
    action: Callable[[bool], None]

    def digest(self) -> str:
        """Return sha256 of key and inputs as they are now; a missing input counts as empty."""
        inputs = [_sha256(path.read_bytes()) if path.is_file() else "" for path in self.inputs]
        return _sha256(json.dumps([self.key, inputs], sort_keys=True).encode())


def run_steps(steps: Sequence[Step], state: Path, say: Callable[[str], None]) -> int:
    """Do all steps in order, announcing each with the time left; return how many were not reused.

    state: a JSON file of the steps that were begun and done; a damaged one is ignored. The time
    left counts every later step: a step that is done again changes the inputs of the next.
    """
    try:
        entries: dict[str, dict[str, str | bool]] = json.loads(state.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        entries = {}
    num_done = 0
    for number, step in enumerate(steps):
        digest = step.digest()
        before = entries.get(step.name)
        done, begun = ({"key": digest, "is_done": is_done} for is_done in (True, False))
        if before == done and all(output.exists() for output in step.outputs):
            say(f"{step.title}: reused")
            continue
        left = sum(each.seconds for each in steps[number:])
        say(f"{step.title}; about {duration(left)} left in all")
        write_atomically(state, json.dumps(entries | {step.name: begun}, indent=1) + "\n")
        step.action(before == begun)
        entries[step.name] = done
        write_atomically(state, json.dumps(entries, indent=1) + "\n")
        num_done += 1
    return num_done


def announcer() -> Callable[[str], None]:
    """Return a function that prints a line after the time since now."""
    began = time.monotonic()

    def say(line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        print(f"[{minutes:2}:{seconds:02}] {line}", flush=True)

    return say


def duration(seconds: float) -> str:
    """`8 min 05 s` or `41 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def training_code() -> list[Path]:
    """Return the modules that decide the weights."""
    own = _folder("training")
    modules = [
        path for path in _modules("training") if path.relative_to(own).parts[0] not in NOT_TRAINING
    ]
    return [*modules, *_modules("dalle")]


def serving_code() -> list[Path]:
    """Return the modules that decide the images of a served artefact."""
    return [*_modules("inference"), *_modules("dalle")]


def reporting_code() -> list[Path]:
    """Return the files that decide the caption accuracy of an artefact, and the report."""
    templates = sorted((_folder("training.report") / "templates").iterdir())
    layout = sorted(_folder("dalle.pages").glob("page.*"))
    return [*_modules("training"), *templates, *layout, *_modules("dalle")]


def digest_of_code(paths: Iterable[Path]) -> str:
    """Return sha256 of files: of a Python file what it compiles to, of any other its bytes."""
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        if path.suffix == ".py":
            content = _compiled(content)
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


@cache
def _compiled(source: bytes) -> bytes:
    """Return what of a module's code runs: neither docstrings nor line numbers."""
    tree = ast.parse(source)
    _strip_docstrings(tree)
    code = compile(ast.fix_missing_locations(tree), "", "exec", dont_inherit=True)
    return repr(_parts(code)).encode()


def _strip_docstrings(node: ast.AST) -> None:
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        statements = getattr(node, field, None)
        if not isinstance(statements, list):
            continue
        for each in statements:
            _strip_docstrings(each)
        if statements:
            statements[:] = [each for each in statements if not _is_text(each)] or [ast.Pass()]


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _parts(value: object) -> object:
    if isinstance(value, CodeType):
        constants = [_parts(each) for each in value.co_consts]
        return (
            *(value.co_name, value.co_names, value.co_varnames, value.co_cellvars),
            *(value.co_freevars, value.co_argcount, value.co_posonlyargcount),
            *(value.co_kwonlyargcount, value.co_flags, value.co_code, value.co_exceptiontable),
            constants,
        )
    if isinstance(value, frozenset):  # in another order in each process
        return sorted(map(repr, value))
    return value


def _modules(package: str) -> list[Path]:
    return sorted(_folder(package).rglob("*.py"))


def _folder(package: str) -> Path:
    return Path(str(resources.files(package)))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
