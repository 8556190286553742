"""What is tracked: the files of the README's tree, locks that agree, nothing of one machine."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests import REPOSITORY

LOCKS = ["dev.txt", "image.txt", "infra.txt"]
MAX_BYTES = 500_000


@pytest.fixture(scope="module")
def tracked() -> dict[str, str]:
    """The text of every tracked file by its name; binary files are left out."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    texts = {}
    for name in listed.stdout.splitlines():
        path = REPOSITORY / name
        if path.is_file():
            assert path.stat().st_size <= MAX_BYTES, f"{name} is over {MAX_BYTES} bytes"
            content = path.read_bytes()
            if b"\0" not in content:
                texts[name] = content.decode("utf-8")
    return texts


def tree_paths(tree: str) -> list[str]:
    """The paths in a tree of one name a line, two or more spaces, and what it is for.

    A folder ends in `/`; what is in it stands below it, indented.
    """
    paths: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in tree.splitlines():
        parts = re.fullmatch(r"( *)([\w./-]+) {2,}\S.*", line)
        if not parts:
            if line:
                raise ValueError(f"not a name, two spaces and a remark: {line!r}")
            continue
        indent = len(parts[1])
        while folders and folders[-1][0] >= indent:
            folders.pop()
        path = (folders[-1][1] if folders else "") + parts[2]
        if path.endswith("/"):
            folders.append((indent, path))
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def tree() -> list[str]:
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```text\n(README\.md .*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, "README.md needs one ```text block that begins with README.md"
    return tree_paths(blocks[0])


def test_the_tree_in_the_readme_names_what_exists_and_names_it_once(tree, tracked):
    folders = {f"{parent}/" for name in tracked for parent in Path(name).parents}
    gone = [path for path in tree if path not in folders | tracked.keys()]
    assert not gone, f"README.md's tree names what is not there: {', '.join(gone)}"
    assert sorted(set(tree)) == sorted(tree)


def test_the_tree_in_the_readme_names_every_folder(tree, tracked):
    shown = [name for name in tracked if not name.startswith((".", "tests/"))]
    wanted = {name for name in shown if "/" not in name}
    wanted |= {f"{Path(name).parent}/" for name in shown if "/" in name}
    unnamed = sorted(wanted - set(tree))
    assert not unnamed, f"README.md's tree lacks {', '.join(unnamed)}"


def test_every_module_begins_with_a_sentence_about_itself(tracked):
    for name, text in tracked.items():
        if name.endswith(".py") and text and not name.startswith("tests/"):
            first = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
            assert first.endswith((".", ":")), f"{name} begins with {first!r}"


def test_a_tree_is_read_by_its_indentation():
    tree = "README.md  a\nbox/  b\n  lid.py    c\n  in/  d\n    e.py  f\nb.py  g"
    paths = ["README.md", "box/", "box/lid.py", "box/in/", "box/in/e.py", "b.py"]
    assert tree_paths(tree) == paths
    with pytest.raises(ValueError, match="'c.py d'"):
        tree_paths("box/  a\nc.py d")


def lines_with(pattern: str, texts: dict[str, str]) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_no_file_names_a_directory_of_somebodys_machine(tracked):
    assert lines_with(r"(?<![\w.$}~])/(?:home|root|Users)/[\w.-]", tracked) == []


def test_nothing_says_where_packages_come_from(tracked):
    installers = {
        name: text
        for name, text in tracked.items()
        if name.startswith(("requirements/", ".ci/", "container/Dockerfile"))
        or name in {"Makefile", "pyproject.toml", ".pre-commit-config.yaml"}
    }
    assert lines_with(r"https?://", installers) == []
    assert lines_with(r"--(?:extra-)?index-url|--find-links|--default-index", installers) == []


def pins(name: str) -> dict[str, set[str]]:
    """Package -> its versions (more than one where they differ by Python version)."""
    text = (REPOSITORY / "requirements" / name).read_text("utf-8")
    found: dict[str, set[str]] = {}
    for package, version in re.findall(r"^([\w.-]+(?:\[[\w,]+\])?)==([^\s;]+)", text, re.MULTILINE):
        found.setdefault(package, set()).add(version)
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_the_locks_agree_with_the_one_set_of_versions(lock):
    agreed = pins("versions.txt")
    assert len(pins(lock)) > 20
    assert {p: v for p, v in pins(lock).items() if not v <= agreed.get(p, set())} == {}


@pytest.mark.parametrize("lock", [*LOCKS, "uv.txt"])
def test_every_line_of_a_lock_carries_a_hash(lock):
    text = (REPOSITORY / "requirements" / lock).read_text("utf-8")
    entries = re.split(r"\n(?=[a-z0-9])", text)[1:]
    assert entries
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []


@pytest.mark.parametrize("pin", ["torch", "torchvision"])
def test_the_chosen_versions_are_the_locked_ones(pin):
    chosen = pins("pins.in")[pin]
    assert pins("dev.txt")[pin] == pins("image.txt")[pin] == chosen


def test_the_infrastructure_needs_no_torch():
    assert {"torch", "torchvision", "deepspeed"} & pins("infra.txt").keys() == set()


def test_continuous_integration_runs_the_test_command_of_the_readme():
    script = (REPOSITORY / ".ci" / "run").read_text("utf-8")
    extract = re.search(r"^test_command=\$\((sed .*)\)$", script, re.MULTILINE)
    assert extract is not None
    found = subprocess.run(
        ["bash", "-c", extract[1]], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "make test"
