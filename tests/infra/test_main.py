"""The command line itself: help, examples, exit codes, errors without tracebacks."""

import argparse
import ast
import importlib
import json
import shlex
import subprocess
import sys

import pytest

from infra.__main__ import COMMANDS, parser_of
from tests import REPOSITORY


def test_help_lists_every_command(infra):
    result = infra("--help")
    assert result.code == 0
    for name, command in COMMANDS.items():
        assert f"  {name}" in result.out
        assert command.summary in result.out


def test_no_command_is_a_usage_error(infra):
    assert infra().code == 2


def test_a_misspelt_command_suggests_the_nearest(infra):
    result = infra("teerdown")
    assert (result.code, result.err) == (
        2,
        "there is no command 'teerdown'; did you mean teardown?\n",
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_has_examples(infra, name):
    result = infra(name, "--help")
    assert result.code == 0
    assert "examples:\n  python -m infra " in result.out


@pytest.mark.parametrize(
    ("name", "example"),
    [(name, example) for name, command in COMMANDS.items() for example in command.examples],
)
def test_every_example_can_be_parsed(name, example):
    words = shlex.split(example)
    assert words[0] == name
    module = importlib.import_module(COMMANDS[name].module)
    parser = parser_of(name, COMMANDS[name], module)
    if "--help" not in words:
        assert isinstance(parser.parse_args(words[1:]), argparse.Namespace)


def test_an_unknown_option_is_a_usage_error(infra):
    result = infra("status", "--colour")
    assert result.code == 2
    assert "--colour" in result.err


@pytest.mark.slow
def test_an_error_is_one_message_and_with_json_an_object_too(account, infra):
    result = infra("deploy", "--json")
    assert result.code == 1
    assert "Traceback" not in result.err
    assert result.json["error"]["code"] == "bad_request"
    assert result.json["error"]["message"] == result.err.strip()


def test_expired_credentials_are_reported_by_every_command_alike(account, infra):
    for words in (["status"], ["bootstrap"], ["teardown", "--yes"], ["train", "--data", "x"]):
        account.refuse("DescribeStacks", "ExpiredToken", "The security token is expired")
        account.refuse("ListEndpoints", "ExpiredTokenException", "expired")
        result = infra(*words)
        assert result.code == 1, words
        assert result.err.startswith("the AWS credentials have expired; log in again"), words
        account.refusals.clear()


@pytest.mark.slow
def test_it_starts_without_torch_and_help_without_boto3():
    code = (
        "import sys; from infra.__main__ import main; main(['--help'])\n"
        "heavy = {'torch', 'boto3', 'sagemaker'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import infra.account.teardown, infra.endpoint.deploy, infra.endpoint.calls.command\n"
        "import infra.jobs.train, infra.jobs.tune\n"
        "heavy = {'torch', 'sagemaker'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_only_one_file_imports_boto3_and_none_the_sagemaker_sdk():
    users: dict[str, set[str]] = {"boto3": set(), "botocore": set(), "sagemaker": set()}
    for path in (REPOSITORY / "infra").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for library in {name.split(".")[0] for name in names} & users.keys():
                users[library].add(str(path.relative_to(REPOSITORY)))
    assert users == {
        "boto3": {"infra/aws/client.py"},
        "botocore": {"infra/aws/client.py"},
        "sagemaker": set(),
    }


@pytest.mark.slow
def test_the_json_of_every_command_is_one_object(account, infra):
    infra("bootstrap")
    result = infra("status", "--json")
    assert isinstance(json.loads(result.out), dict)
