"""The artefact of a channel: a directory, or a model.tar.gz that is not trusted. No torch."""

from __future__ import annotations

import shutil
import tarfile
import zlib
from pathlib import Path

from dalle.errors import ArtefactError, DiskFullError
from dalle.manifest import MANIFEST, deeper_manifest, is_hidden
from dalle.platform.disk import disk_error, is_full
from dalle.platform.tar import TAR_ERRORS, BoundedTarInfo

OTHER_ARCHIVE = "output.tar.gz"
"""The report of a job. The SageMaker SDK v2 serves both archives of a job in one directory."""
MAX_ENTRIES = 1_000  # of a model.tar.gz; ours have about fifteen


def locate(channel: Path, scratch: Path) -> Path:
    """Return the artefact of a channel: the directory itself, or its model.tar.gz unpacked.

    An archive is unpacked into `scratch`; links, devices and paths outside of it are refused.
    Raises ArtefactError, or DiskFullError when there is no room for the content.
    """
    try:
        if (channel / MANIFEST).is_file():
            return channel
        names = sorted(path.name for path in channel.iterdir() if not is_hidden(path.name))
    except OSError as error:
        raise ArtefactError(f"{channel} cannot be read: {error.strerror}") from error
    packed = [name for name in names if name.endswith(".tar.gz") and name != OTHER_ARCHIVE]
    archives = [channel / name for name in packed]
    if len(archives) != 1:
        raise ArtefactError(
            f"{channel} must hold {MANIFEST} or exactly one model.tar.gz, found {names[:5]}"
            + deeper_manifest(channel)
        )
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        _unpack(archives[0], scratch)
        if not (scratch / MANIFEST).is_file():
            names = sorted(path.name for path in scratch.iterdir() if not is_hidden(path.name))
            raise ArtefactError(
                f"{archives[0]} has no {MANIFEST} at its top, where `train` puts it, but "
                f"{names[:5]}{deeper_manifest(scratch)}; pack the content of the model directory: "
                f"tar czf {archives[0].name} -C model ."
            )
    except (*TAR_ERRORS, zlib.error, OSError) as error:
        if isinstance(error, OSError) and is_full(error):
            raise disk_error(
                error, f"unpack {archives[0]} into {scratch}", if_full="give it a larger disk"
            ) from error
        reason = str(error) or type(error).__name__
        raise ArtefactError(f"{archives[0]} cannot be unpacked: {reason}") from error
    return scratch


def _unpack(path: Path, scratch: Path) -> None:
    """Unpack at most MAX_ENTRIES plain files and directories.

    Free space is checked per file, as the total size is only known after decompression.
    """
    if not path.is_file():
        raise ArtefactError(f"{path} is not a regular file")
    with tarfile.open(path, "r:gz", tarinfo=BoundedTarInfo) as archive:
        for number, member in enumerate(archive, start=1):
            if number > MAX_ENTRIES:
                raise ArtefactError(
                    f"{path} has more than {MAX_ENTRIES:,} entries; a model.tar.gz of `train` has "
                    "a few files for each model"
                )
            if not (member.isfile() or member.isdir()):
                raise ArtefactError(f"{path.name}: {member.name} is not a plain file")
            free = shutil.disk_usage(scratch).free
            if member.size > free:
                raise DiskFullError(
                    f"no room to unpack {path} into {scratch}: {member.name} has {member.size:,} "
                    f"bytes, {free:,} are free; give it a larger disk"
                )
            archive.extract(member, scratch, filter="data")
