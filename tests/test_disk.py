"""dalle.disk: whose fault it is when nothing can be written."""

import errno

import pytest

from dalle.disk import disk_error, is_full, sync
from dalle.errors import DiskFullError, PlatformError


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_is_told_with_the_remedy(number):
    cause = OSError(number, "no space")
    error = disk_error(cause, "write a.pt", if_full="take a larger one")
    assert is_full(cause)
    assert type(error) is DiskFullError
    assert str(error) == "no room to write a.pt (no space); take a larger one"


@pytest.mark.parametrize("cause", [OSError(errno.EIO, "bad sector"), OSError("bad sector")])
def test_other_trouble_is_the_platforms(cause):
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
