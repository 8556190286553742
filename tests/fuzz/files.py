"""Damaged and hostile artefacts, archives and shards, from a seed, in processes of little memory.

Each is read by a child process with a limit of memory. It is read, or refused by an error of ours;
nothing else is raised, and nothing takes minutes.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import multiprocessing
import random
import resource
import shutil
import tarfile
import tempfile
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

from dalle import archive
from dalle import artefact as artefacts
from dalle.errors import DalleError
from tests.dalle.artefact_files import FILES, replace_file
from tests.training.pairs import SIZE, members_of, tar_of
from training.data.sources.channel import open_channel

MEMORY_BYTES = 1 << 30  # beyond what a process has before it reads anything
SECONDS = 120.0  # for one file, on a machine that is shared

_VALUES = (0, -1, 1, 10**9, 2**70, 1e308, True, None, "", "x", [], {}, [[1]], {"a": 1})


def mutated(chance: random.Random, content: bytes) -> bytes:
    """Return a content with a few bytes changed, a piece cut out, doubled or filled."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        if not changed:
            break
        start = chance.randrange(len(changed))
        end = min(len(changed), start + chance.choice((1, 1, 8, 512)))
        match chance.randrange(4):
            case 0:
                changed[start:end] = chance.randbytes(end - start)
            case 1:
                del changed[start:end]
            case 2:
                changed[start:start] = changed[start:end]
            case 3:
                changed[start:end] = bytes([chance.choice((0, 255, 0x80))]) * (end - start)
    return bytes(changed)


def mutated_json(chance: random.Random, content: bytes) -> bytes:
    """Return a JSON object with a few values replaced, wherever they are."""
    document = json.loads(content)
    for _ in range(chance.randint(1, 3)):
        place = document
        while isinstance(place, dict) and place:
            name = chance.choice(sorted(place))
            if isinstance(place[name], dict) and chance.random() < 0.7:
                place = place[name]
                continue
            place[name] = chance.choice(_VALUES)
            break
    return json.dumps(document).encode()


def read_artefact(chance: random.Random, model: Path, scratch: Path) -> None:
    """Load an artefact of which one file was changed, its hash along with it."""
    shutil.copytree(model, scratch / "model")
    name = chance.choice([*FILES, "manifest.json"])
    content = (scratch / "model" / name).read_bytes()
    change = mutated_json if name.endswith(".json") and chance.random() < 0.7 else mutated
    if name == "manifest.json":
        (scratch / "model" / name).write_bytes(change(chance, content))
    else:
        replace_file(scratch / "model", name, change(chance, content))
    artefacts.load(scratch / "model")


def read_archive(chance: random.Random, model: Path, scratch: Path) -> None:
    """Unpack and load an archive whose tar file or whose compressed bytes were changed."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=chance.choice((0, 1, 2))) as packer:
        packer.add(model, arcname=".")
    content = file.getvalue()
    inside = chance.random() < 0.7
    content = mutated(chance, _changed_headers(chance, content)) if inside else content
    packed = gzip.compress(content, 1)
    (scratch / "channel").mkdir()
    (scratch / "channel" / "model.tar.gz").write_bytes(
        packed if inside else mutated(chance, packed)
    )
    artefacts.load(archive.locate(scratch / "channel", scratch / "unpacked"))


def read_shard(chance: random.Random, model: Path, scratch: Path) -> None:
    """Read a channel of a sound shard and one that was changed."""
    tar_of(scratch / "channel" / "a.tar", members_of(range(4)))
    path = tar_of(scratch / "channel" / "b.tar", members_of(range(4, 12)))
    content = path.read_bytes()
    path.write_bytes(mutated(chance, _changed_headers(chance, content)))
    dataset = open_channel(scratch / "channel", image_size=SIZE, max_bad_share=1.0)
    for index in range(len(dataset)):
        dataset.captions(index)
        dataset.image(index)


def _changed_headers(chance: random.Random, content: bytes) -> bytes:
    """Return a tar file with fields of a few headers replaced, and their checksums made right."""
    changed = bytearray(content)
    for _ in range(chance.randint(0, 2)):
        at = 512 * chance.randrange(max(1, len(changed) // 512))
        header = changed[at : at + 512]
        if len(header) < 512 or header[257:262] != b"ustar":
            continue
        match chance.randrange(4):
            case 0:  # the size: a huge, a negative and a strange one
                header[124:136] = chance.choice(
                    (b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"-0000000001\0")
                )
            case 1:
                header[156:157] = chance.choice(b"0123456789xgLKS").to_bytes(1)
            case 2:
                header[0:100] = chance.choice((b"../x", b"/etc/x", b"a/" * 49, b"\xff", b""))[
                    :100
                ].ljust(100, b"\0")
            case 3:
                header[136:148] = b"\xff" * 12
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        changed[at : at + 512] = header
    return bytes(changed)


READERS = {"artefact": read_artefact, "archive": read_archive, "shard": read_shard}


def _read(kind: str, seed: str, model: Path, connection: Connection) -> None:
    present = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (present + MEMORY_BYTES,) * 2)
    logging.disable()  # what is skipped of a channel
    with tempfile.TemporaryDirectory() as scratch:
        try:
            READERS[kind](random.Random(seed), model, Path(scratch))
            result = "read"
        except DalleError as error:
            result = f"refused ({error.code})"
        except BaseException as error:
            result = f"fault: {type(error).__name__}: {error}"
    connection.send(result)


def fuzz(model: Path, num_files: int, seed: int) -> Counter[str]:
    """Read so many files of each kind in turn; count the results.

    Raises AssertionError for the first fault, crash or hang, with the seed of its file.
    """
    counts: Counter[str] = Counter()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    for number in range(num_files):
        kind = [*READERS][number % len(READERS)]
        name = f"{seed} {number}"
        ours, its = context.Pipe(duplex=False)
        process = context.Process(target=_read, args=(kind, name, model, its))
        process.start()
        its.close()
        try:
            assert ours.poll(SECONDS), f"{kind} of seed {name!r} is still read after {SECONDS:g} s"
            result = ours.recv()
            process.join(SECONDS)
        except EOFError:
            process.join()
            raise AssertionError(f"{kind} of seed {name!r}: exit {process.exitcode}") from None
        finally:
            process.kill()
            process.join()
            ours.close()
        assert not result.startswith("fault"), f"{kind} of seed {name!r}: {result}"
        counts[f"{kind} {result}"] += 1
    return counts
