"""What SageMaker asks of a Dockerfile, read from its text; no Docker needed."""

import os
import re
import shlex
import subprocess

import pytest

from tests import REPOSITORY

CONTAINER = REPOSITORY / "container"


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Every instruction and its words: comments left out, continued lines joined."""
    text = (CONTAINER / "Dockerfile").read_text("utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    parts = (line.partition(" ") for line in text.splitlines() if line.strip())
    return [(name, words.strip()) for name, _, words in parts]


def words_of(instructions, name):
    return [words for instruction, words in instructions if instruction == name]


def test_the_command_is_run_in_exec_form_and_trains_unless_told_otherwise(instructions):
    (entrypoint,) = words_of(instructions, "ENTRYPOINT")
    assert entrypoint.startswith('["/')
    assert "/sh" not in entrypoint
    assert words_of(instructions, "CMD") == ['["train"]']


@pytest.mark.parametrize("instruction", ["USER", "VOLUME", "SHELL", "HEALTHCHECK", "EXPOSE"])
def test_the_platforms_own_decisions_are_left_to_it(instructions, instruction):
    assert words_of(instructions, instruction) == []


def test_no_driver_is_demanded_before_a_line_of_log_can_be_written(instructions):
    text = " ".join(words for _, words in instructions)
    assert "NVIDIA_REQUIRE" not in text
    assert "tini" not in re.split(r"\W+", text)
    assert "nvidia/cuda" not in text


def test_the_base_can_be_chosen_and_is_plain_python_otherwise(instructions):
    assert instructions[0] == ("ARG", "BASE_IMAGE=python:3.11-slim-bookworm")
    bases = [words.split()[0] for words in words_of(instructions, "FROM")]
    assert set(bases) == {"${BASE_IMAGE}", "dependencies", "compiler"}


def test_both_builders_can_read_it(instructions):
    text = (CONTAINER / "Dockerfile").read_text("utf-8")
    assert "--mount" not in text
    assert "<<" not in text
    assert "# syntax" not in text
    assert not (CONTAINER / "Dockerfile.dockerignore").exists(), "only one builder would read it"


def test_what_changes_with_every_commit_comes_after_the_layers_that_are_large(instructions):
    copies = [i for i, (name, _) in enumerate(instructions) if name == "COPY"]
    assert instructions[copies[-1]][1] == "--from=code /opt/program /opt/program"
    revision = instructions.index(("ARG", "GIT_REVISION=unknown"))
    assert revision > copies[-1]


def test_every_cache_is_under_tmp(instructions):
    environment = " ".join(words_of(instructions, "ENV"))
    variables = dict(word.split("=", 1) for word in shlex.split(environment))
    caches = {
        n: v for n, v in variables.items() if n.endswith(("_HOME", "_DIR", "CACHE_PATH", "DIR"))
    }
    assert len(caches) >= 8
    assert {n: v for n, v in caches.items() if not v.startswith("/tmp/")} == {}


def test_what_the_build_sees_is_listed_by_name():
    lines = (REPOSITORY / ".dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert [path for path in allowed if not (REPOSITORY / path).exists()] in ([], ["build/ca.crt"])


@pytest.mark.parametrize("path", sorted(CONTAINER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_executable_and_read_by_bash(path):
    assert os.access(path, os.X_OK)
    assert b"\r" not in path.read_bytes()
    subprocess.run(["bash", "-n", path], check=True)
