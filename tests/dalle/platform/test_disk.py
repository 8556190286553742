"""Disk errors: a full disk, and all others."""

import errno
import re

import pytest

from dalle.errors import DiskFullError, PlatformError
from dalle.platform.disk import disk_error, free_bytes, is_full, sync


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_reported_with_the_remedy(number):
    cause = OSError(number, "no space")
    error = disk_error(cause, "write a.pt", if_full="take a larger one")
    assert is_full(cause)
    assert type(error) is DiskFullError
    assert str(error) == "no room to write a.pt (no space); take a larger one"


def test_needed_and_free_bytes_are_reported_where_known(tmp_path):
    cause, hint = OSError(errno.ENOSPC, "no space"), {"if_full": "take a larger one"}
    missing = tmp_path / "not" / "there"
    free = r"[\d,]+"  # others write here too
    assert free_bytes(missing)
    told = disk_error(cause, "write a.pt", directory=missing, num_bytes=12_345, **hint)
    assert re.search(rf"a.pt \(no space\): it takes 12,345 bytes, {free} are free; take", str(told))
    told = disk_error(cause, "write a.pt", directory=missing, **hint)
    assert re.search(rf"a.pt \(no space\): {free} bytes are free; take", str(told))


@pytest.mark.parametrize("cause", [OSError(errno.EIO, "bad sector"), OSError("bad sector")])
def test_other_disk_errors_are_platform_errors(cause):
    error = disk_error(cause, "write a.pt", if_full="take a larger one")
    assert not is_full(cause)
    assert type(error) is PlatformError
    assert str(error) == "cannot write a.pt: bad sector"


def test_files_and_directories_are_synced_and_missing_ones_named(tmp_path):
    (tmp_path / "file").write_text("content")
    sync(tmp_path / "file")
    sync(tmp_path)
    with pytest.raises(FileNotFoundError, match="other"):
        sync(tmp_path / "other")
