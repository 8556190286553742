"""infra/README.md: its commands are run, and do what it shows, from bootstrap to teardown.

The account is a moto_server; its jobs train and its endpoints serve for real, with tiny models (see
tests/infra/aws_platform.py). Figures that differ from machine to machine are not compared. As a
program, this file writes the transcript again (all of it but `push`, which needs a Docker engine):

    python tests/repository/test_readme_infra.py
"""

import os
import re
import shlex
import sys

import pytest

from infra.__main__ import COMMANDS, overview
from tests import REPOSITORY

pytestmark = pytest.mark.slow

README = REPOSITORY / "infra" / "README.md"
WRITE = "WRITE_README"
PROMPT = "$ python -m infra "
TRANSCRIPT = "infra-transcript"
OVERVIEW = "infra-commands"

# Every command that speaks to AWS, in an order in which a project may live.
LIFE = (
    "bootstrap --pipelines yes --mail team@example.com",
    "push",
    "upload pictures",
    "train --data pictures --set size=tiny --set max_steps=20 --set log_every=10 "
    "--set num_validations=2 --spot",
    "status dalle-JOB-all",
    "logs dalle-JOB-all --tail 1",
    "tune --data pictures --float learning_rate=0.0001:0.01:log --max-jobs 4 --no-wait",
    "register dalle-JOB-all --approve",
    "pipeline --data pictures --set size=tiny --require transformer_validation_loss=4.5",
    "deploy --mode async --instance-type ml.g4dn.xlarge",
    "deploy --mode async --instance-type ml.g4dn.xlarge",
    "invoke 'big filled orange star' --num-candidates 4 --num-images 2 --seed 7 --out star",
    "monitor",
    "status",
    "teardown --yes",
)


def between(text: str, name: str) -> str:
    """What stands between a pair of markers, without its code fence."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    assert text.count(begin) == text.count(end) == 1, f"infra/README.md needs one pair of {begin}"
    inside = text.partition(begin)[2].partition(end)[0]
    return re.sub(r"^\s*```\w*\n|```\s*$", "", inside)


def replaced(text: str, name: str, block: str, language: str) -> str:
    head, _, rest = text.partition(f"<!-- {name}:begin -->")
    tail = rest.partition(f"<!-- {name}:end -->")[2]
    inside = f"<!-- {name}:begin -->\n```{language}\n{block}```\n<!-- {name}:end -->"
    return head + inside + tail


def steps(transcript: str) -> list[tuple[str, str]]:
    """Each command of a transcript, without `python -m infra`, and what it printed."""
    parts = re.split(rf"^{re.escape(PROMPT)}(.*)\n", transcript, flags=re.MULTILINE)
    return list(zip(parts[1::2], [output.strip() for output in parts[2::2]], strict=True))


def comparable(command: str, output: str) -> str:
    """An output without what differs from machine to machine."""
    output = re.sub(r"[\d.,]+ (?:bytes|kB|MB|GB)\b", "SIZE", output.strip())
    if command.split()[0] in ("train", "logs", "invoke") or command.startswith("status dalle-"):
        output = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+", "TIME", output)
        output = re.sub(r"=[^;= ]+;", "=N;", output)
        output = re.sub(r"-?\b\d+\.\d+(?:e[+-]\d+)?|\b\d+e[+-]\d+", "N", output)
        output = re.sub(r"[▁▂▃▄▅▆▇█]+", "COURSE", output)
    return re.sub(r" +", " ", output)


class Names:
    """Digests by the order in which they appear: those of what the role is part of differ from
    account to account, as its name does, and those of data from machine to machine."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def numbered(self, text: str) -> str:
        return re.sub(
            r"(?<=-)[0-9a-f]{10}\b",
            lambda found: self._seen.setdefault(found[0], f"digest-{len(self._seen) + 1}"),
            text,
        )

    def translated(self, text: str, other: "Names") -> str:
        """A text with the digests of `other` in place of those that appeared at the same time."""
        theirs = {name: digest for digest, name in other._seen.items()}
        for digest, name in self._seen.items():
            text = text.replace(digest, theirs.get(name, digest))
        return text


@pytest.fixture
def live(account, platform, infra, tmp_path, monkeypatch, rainbow_pairs):
    """A function: a command of the transcript -> what it prints, in a folder with pictures."""
    rainbow_pairs(tmp_path / "pictures", train=40, validation=8)
    monkeypatch.chdir(tmp_path)

    def run(command: str) -> str:
        if command.split()[0] == "push":  # the engine's part is tested beside the registry
            account.put_image()
            return ""
        result = infra(*shlex.split(command))
        assert result.code == 0, result.err
        return str(result.out).strip()

    return run


def written_again(text: str, run) -> str:
    """infra/README.md with a transcript of now; that of `push` stays as it is."""
    before = dict(steps(between(text, TRANSCRIPT)))
    block, job = "", "JOB"
    for planned in LIFE:
        command = planned.replace("JOB", job)
        output = run(command) or before.get(command, "")
        found = re.search(r"training job dalle-(\w+)-all", output)
        job = found[1] if found else job
        block += f"{PROMPT}{command}\n{output}\n\n"
    text = replaced(text, TRANSCRIPT, block.rstrip() + "\n", "console")
    return replaced(text, OVERVIEW, overview() + "\n", "text")


def test_the_transcript_is_what_happens(live):
    text = README.read_text("utf-8")
    if os.environ.get(WRITE):
        README.write_text(written_again(text, live), "utf-8")
        return
    happened, shown = Names(), Names()
    for command, output in steps(between(text, TRANSCRIPT)):
        printed = live(shown.translated(command, happened))
        if command.split()[0] != "push":
            now = happened.numbered(comparable(command, printed))
            assert now == shown.numbered(comparable(command, output)), command


@pytest.mark.docker
def test_a_push_prints_what_the_transcript_shows(registry, tiny_image, infra):
    (output,) = [
        output
        for command, output in steps(between(README.read_text("utf-8"), TRANSCRIPT))
        if command == "push"
    ]
    result = infra("push", "--image", tiny_image)
    assert comparable("push", result.out) == comparable("push", output)


def test_the_transcript_has_every_command_that_speaks_to_aws():
    shown = {command.split()[0] for command, _ in steps(between(README.read_text(), TRANSCRIPT))}
    assert shown == set(COMMANDS) - {"prices", "cost", "benchmark", "compare"}


def test_the_readme_lists_the_commands_as_help_does():
    assert between(README.read_text("utf-8"), OVERVIEW) == overview() + "\n"


def test_a_transcript_is_cut_at_its_prompts():
    text = f"{PROMPT}status\na  b\n\nc\n\n{PROMPT}logs x\nd\n"
    assert steps(text) == [("status", "a  b\n\nc"), ("logs x", "d")]


def test_only_figures_of_a_machine_are_passed_over():
    assert comparable("status", "costs  537.57 USD, 1.2 kB") == "costs 537.57 USD, SIZE"
    assert comparable("train x", "a_loss=0.5; b=1e-05;") == "a_loss=N; b=N;"
    assert comparable("status dalle-x", "loss 0.8 ▁▂█") == "loss N COURSE"


def test_names_are_distinguished_though_their_digests_are_ignored():
    one, other = Names(), Names()
    assert one.numbered("dalle-0123456789 dalle-aaaaaaaaaa") == other.numbered(
        "dalle-bbbbbbbbbb dalle-cccccccccc"
    )
    assert one.numbered("dalle-0123456789") != other.numbered("dalle-cccccccccc")


if __name__ == "__main__":
    os.environ[WRITE] = "1"
    sys.exit(pytest.main([__file__, "-q", "-k", "transcript_is_what_happens"]))
